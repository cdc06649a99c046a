"""What the commands that measure print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlflow_trt.cli.tables import print_line, print_rows
from mlflow_trt.cli.wording import in_own_words

if TYPE_CHECKING:
    from mlflow_trt.core.accuracy import Comparison
    from mlflow_trt.measure.benchmark import Benchmark
    from mlflow_trt.measure.doctor import Diagnosis
    from mlflow_trt.measure.layers import LayerReport
    from mlflow_trt.measure.side_by_side import SideBySide


def print_accuracy(comparisons: Sequence[Comparison]) -> None:
    """A table for each comparison."""
    for comparison in comparisons:
        title = f"{comparison.subject.rstrip(',')} against the source model on ONNX Runtime, {comparison.inputs}"
        print_rows(f"\naccuracy of {title}: {comparison.verdict}", _ACCURACY, _accuracy_rows(comparison))


_ACCURACY = ("output", "relative error", "median row", "worst row", "largest", "same class")


def _accuracy_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    return [
        (
            output.name,
            number_text(output.relative_error),
            number_text(output.median_row_error),
            number_text(output.worst_row_error),
            number_text(output.max_abs_error),
            "" if output.top_class_agreement is None else f"{output.top_class_agreement:.1%}",
        )
        for output in comparison.outputs
    ]


def print_verdict(comparison: Comparison) -> None:
    """The verdict first, and the numbers behind it."""
    print_line(verdict_line(comparison))
    if comparison.outputs:
        print_accuracy([comparison])


def verdict_line(comparison: Comparison) -> str:
    reasons = comparison.problems or ((comparison.reason,) if comparison.reason else ())
    if comparison.verdict == "inconclusive":
        reasons = ("the reference hardly varies, so that agreement proves nothing; give real inputs",)
    return f"{comparison.verdict}{': ' if reasons else ''}{in_own_words('; '.join(reasons))}"


def number_text(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def print_benchmark(uri: str, benchmark: Benchmark, run_id: str | None = None) -> None:
    print_measurements(uri, benchmark)
    if run_id is not None:
        print_line(f"\nlogged to run {run_id}")


def print_side_by_side(result: SideBySide, run_id: str | None = None) -> None:
    comparison = result.comparison
    print_line(verdict_line(comparison))
    for name, what in zip((result.reference, result.subject), result.compared, strict=True):
        print_line(f"{name}: {what}")
    if comparison.outputs:
        title = f"\n{result.subject} against {result.reference}, on {comparison.inputs}"
        print_rows(title, _ACCURACY, _accuracy_rows(comparison))
    print_line()
    print_benchmark("latency and throughput", result.benchmark, run_id)


def print_measurements(title: str, benchmark: Benchmark) -> None:
    print_line(title)
    models = dict.fromkeys(row.model for row in benchmark.measurements)
    for model in models:
        rows = []
        for row in benchmark.measurements:
            if row.model == model:
                times = (row.latency.p50, row.latency.p10, row.latency.p90, row.latency.p99)
                numbers = [f"{time:.3f}" for time in times]
                rows.append((row.runtime, row.part, row.batch, *numbers, f"{row.throughput:,.0f}"))
        headings = ("runtime", "", "batch", "median ms", "p10", "p90", "p99", "rows/s")
        print_rows(f"\n{model}" if len(models) > 1 else "", headings, rows)
    for description in benchmark.runtimes:
        print_line(f"measured on {description}")
    for problem in benchmark.problems:
        print_line(f"not measured: {in_own_words(problem)}")


def print_layers(report: LayerReport) -> None:
    timed = f", timed with {report.rows} rows" if report.rows is not None else ""
    print_line(f"{report.model} on {report.description}{timed}")
    rows = [
        (
            number,
            layer.name,
            layer.kind,
            ", ".join(map(str, layer.outputs)),
            "" if layer.milliseconds is None else f"{layer.milliseconds:.4f}",
        )
        for number, layer in report.slowest_first()
    ]
    columns = 5 if report.milliseconds else 4
    print_rows("", ("", "layer", "type", "outputs", "ms")[:columns], [row[:columns] for row in rows])


def print_diagnosis(diagnosis: Diagnosis) -> None:
    rows = [("ok" if check.ok else "no", check.name, check.detail) for check in diagnosis.checks]
    print_rows("mlflow-trt doctor", ("", "", ""), rows)
