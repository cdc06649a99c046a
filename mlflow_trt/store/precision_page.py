"""The precision report as a page that one can read, in the model folder beside the record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlflow_trt.core.accuracy import Comparison
from mlflow_trt.core.selection import Selection
from mlflow_trt.core.types import KeptNode, PrecisionReport
from mlflow_trt.store.record import Record

REPORT_FILE = "precision_report.md"


def report_text(record: Record) -> str:
    """Markdown: what was asked, what was measured, which nodes stayed in float32 and why, the ranges seen."""
    return "\n".join(_lines(record)) + "\n"


def _lines(record: Record) -> Iterator[str]:
    report = record.precision_report
    yield f"# Precision: {report.precision}"
    yield ""
    yield f"- nodes: {report.nodes}, of which {report.changed_nodes} run in {report.precision}"
    if report.share is not None:
        yield f"- share of the arithmetic with floats that runs in {report.precision}: {report.share:.1%}"
    for title, counts in (("nodes that compute with floats", report.node_types), ("weights", report.weight_types)):
        if counts:
            yield f"- {title}: {', '.join(f'{count:,} in {name}' for name, count in counts.items())}"
    if report.size_before and report.size_after:
        yield f"- size of the weights: {report.size_before:,} bytes before, {report.size_after:,} after"
    if report.calibration is not None:
        method = f", method {report.calibration.method}" if report.calibration.method else ""
        yield f"- ranges seen on {report.calibration.samples} (sha256 {report.calibration.sha256}){method}"
    for remark in record.remarks:
        yield f"- {remark}"
    if record.selection is not None:
        yield from _selection(record.selection)
    for comparison in record.comparisons:
        yield from _comparison(comparison)
    for title, nodes in (
        ("Nodes with quantized weights that compute in float32", report.weight_only),
        ("Nodes that stayed in float32", report.kept),
    ):
        yield from _nodes(title, nodes)
    yield from _values(report)


def _values(report: PrecisionReport) -> Iterator[str]:
    if report.not_finite:
        yield from _table(
            "Tensors with NaN or infinity on the samples",
            ("tensor", "values that are not finite"),
            [(name, f"{count:,}") for name, count in report.not_finite.items()],
        )
    if report.largest:
        yield from _table(
            "Largest values seen",
            ("tensor", "largest magnitude"),
            [(name, f"{value:.6g}") for name, value in report.largest.items()],
        )


def _nodes(title: str, nodes: Sequence[KeptNode]) -> Iterator[str]:
    if nodes:
        rows = [(node.name, node.operator, node.reason) for node in nodes]
        yield from _table(f"{title} ({len(nodes)})", ("node", "operator", "reason"), rows)


def _selection(selection: Selection) -> Iterator[str]:
    title = f"Candidates for {selection.asked}: {selection.winner} won"
    yield from _table(title, selection.headings, selection.rows())
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in selection.shapes.items())
    yield ""
    yield f"Latency is that of the engine alone on {selection.measured_on}, with {shapes}."


def _comparison(comparison: Comparison) -> Iterator[str]:
    yield from _table(
        f"Accuracy: {comparison.subject} {comparison.verdict} on {comparison.inputs}",
        ("output", "relative error", "median row", "worst row", "largest absolute error", "mean absolute error",
         "cosine similarity", "same best class", "NaN", "infinite"),
        [
            (
                output.name,
                f"{output.relative_error:.3g}",
                "" if output.median_row_error is None else f"{output.median_row_error:.3g}",
                "" if output.worst_row_error is None else f"{output.worst_row_error:.3g}",
                f"{output.max_abs_error:.3g}",
                f"{output.mean_abs_error:.3g}",
                f"{output.cosine_similarity:.6f}",
                "" if output.top_class_agreement is None else f"{output.top_class_agreement:.1%}",
                str(output.nans),
                str(output.infinities),
            )
            for output in comparison.outputs
        ],
    )  # fmt: skip


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield ""
    yield f"## {title}"
    yield ""
    for row in (headings, ["---"] * len(headings), *rows):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
