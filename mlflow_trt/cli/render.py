"""What the commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pathlib import Path

    from mlflow_trt.convert.recipe import Recipe
    from mlflow_trt.core.accuracy import Comparison
    from mlflow_trt.core.selection import Selection
    from mlflow_trt.core.types import BatchAxis, EngineRecord, PrecisionReport, ShapeProfile, TensorSpec
    from mlflow_trt.core.whole_model import WholeModel
    from mlflow_trt.measure.benchmark import Benchmark
    from mlflow_trt.measure.doctor import Diagnosis
    from mlflow_trt.measure.layers import LayerReport
    from mlflow_trt.measure.side_by_side import SideBySide
    from mlflow_trt.registry.check import Finding
    from mlflow_trt.registry.convert_all import Outcome
    from mlflow_trt.registry.plan import Plan
    from mlflow_trt.store.cache_contents import CacheEntry
    from mlflow_trt.store.record import Record


def print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """A table of two columns; facts without a value are left out."""
    table = Table(title=Text(title), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value not in (None, "", ()):
            table.add_row(name, Text(str(value)))
    Console().print(table)


def print_rows(title: str, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console().print(table)


def _whole_fact(whole: WholeModel | None) -> str | None:
    return None if whole is None else f"{whole.flavor}, of which {whole.network} is the network"


def print_record(uri: str, record: Record) -> None:
    print_facts(
        uri,
        {
            **_recipe_facts(record.recipe, record.batch_axis),
            **_selection_facts(record.selection),
            "source model": f"{record.source.file}, sha256 {record.source.digest}",
            "typed model": "equals the source model"
            if record.typed == record.source
            else f"{record.typed.file}, sha256 {record.typed.digest}",
            "made from": record.lineage.get("source"),
            "exported by": record.lineage.get("exporter"),
            "left out": record.lineage.get("left_out"),
            "whole model": _whole_fact(record.whole),
            "engines of": record.lineage.get("extends"),
            "made by": f"mlflow-trt {record.mlflow_trt_version}, format {record.format}",
            "remarks": "\n".join(record.remarks),
        },
    )
    print_tensors(record.inputs, record.outputs)
    print_profiles(record.profiles)
    if record.selection is not None:
        print_candidates(record.selection)
    if record.comparisons:
        print_accuracy(record.comparisons)
    if record.precision_report.kept or record.precision_report.weight_only:
        _print_kept(record.precision_report)
    print_rows(
        "\nengines",
        ("file", "built by", "for", "on", "MB", "seconds", "sha256"),
        [
            (
                engine.file,
                f"{engine.distribution.label} {engine.version}",
                engine.target,
                engine.gpu or "no GPU",
                f"{engine.size / 1e6:.1f}",
                f"{engine.build_seconds:.1f}",
                engine.sha256,
            )
            for engine in record.engines
        ],
    )
    if any(engine.kernels is not None for engine in record.engines):
        _print_kernels(record.engines)


def _print_kernels(engines: Sequence[EngineRecord]) -> None:
    print_rows(
        "\nkernels, for GPUs of the same compute capability",
        ("file", "compiled by", "on", "driver", "MB", "sha256"),
        [
            (
                stored.file,
                f"{engine.distribution.label} {stored.version}",
                f"{stored.gpu} ({stored.compute_capability})",
                stored.driver or "unknown",
                f"{stored.size / 1e6:.1f}",
                stored.sha256,
            )
            for engine in engines
            if (stored := engine.kernels) is not None
        ],
    )


def _selection_facts(selection: Selection | None) -> dict[str, str]:
    return {} if selection is None else {"asked for": f"{selection.asked}; {selection.winner} is {selection.reason}"}


def print_candidates(selection: Selection) -> None:
    print_rows(f"\ncandidates, measured on {selection.measured_on}", selection.headings, selection.rows())


def print_accuracy(comparisons: Sequence[Comparison]) -> None:
    print_rows(
        "\naccuracy, against the source model on ONNX Runtime",
        ("what", "verdict", "output", "relative error", "median row", "worst row", "largest error", "same best class",
         "on"),
        [
            (
                comparison.subject,
                comparison.verdict,
                output.name,
                f"{output.relative_error:.2e}",
                _error_text(output.median_row_error),
                _error_text(output.worst_row_error),
                f"{output.max_abs_error:.2e}",
                "" if output.top_class_agreement is None else f"{output.top_class_agreement:.1%}",
                comparison.inputs,
            )
            for comparison in comparisons
            for output in comparison.outputs
        ],
    )  # fmt: skip


def _error_text(error: float | None) -> str:
    return "" if error is None else f"{error:.2e}"


def _print_kept(report: PrecisionReport) -> None:
    counts = ", ".join(f"{count} in {name}" for name, count in report.node_types.items())
    for what, nodes in (("stay in float32", report.kept), ("have quantized weights only", report.weight_only)):
        if nodes:
            print_rows(
                f"\nnodes: {counts}; these {what}",
                ("node", "operator", "reason"),
                [(node.name, node.operator, node.reason) for node in nodes],
            )


def print_plan(plan: Plan) -> None:
    print_facts(
        f"What would be done with {plan.source}",
        {
            "result": plan.destination,
            "exists already": plan.existing and f"{plan.existing}, made of the same source by the same recipe",
            **_recipe_facts(plan.recipe, plan.batch_axis),
            "built by": plan.tensorrt,
            "source model": f"sha256 {plan.source_digest}",
            "remarks": "\n".join(plan.remarks),
        },
    )
    print_tensors(plan.inputs, plan.outputs)
    print_profiles(plan.profiles)


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    rows = [(outcome.source, outcome.status, outcome.detail, f"{outcome.seconds:.1f}") for outcome in outcomes]
    print_rows("conversions", ("source", "", "result", "seconds"), rows or [("no model matches", "", "", "")])


def print_findings(subject: str, findings: Sequence[Finding]) -> None:
    rows = [(one.subject, one.problem, _remedy_of(one), "yes" if one.is_mended else "") for one in findings]
    nothing = [(subject, "nothing was left behind", "", "")]
    print_rows("findings", ("what", "problem", "remedy", "mended"), rows or nothing)


def _remedy_of(finding: Finding) -> str:
    return f"--mend: {finding.remedy}" if finding.can_be_mended and not finding.is_mended else finding.remedy


def _recipe_facts(recipe: Recipe, batch_axis: BatchAxis | None) -> dict[str, Any]:
    """What was asked for; options at their defaults have no value, and so are not shown."""
    return {
        "precision": recipe.precision,
        "strict float32": None if recipe.allow_tf32 else "yes",
        "batch axis": _batch_text(batch_axis),
        "targets": ", ".join(recipe.targets),
        "workspace": f"{recipe.workspace_bytes / 2**20:.0f} MiB" if recipe.workspace_bytes else None,
        "memory pools": ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in recipe.memory_pools.items()),
        "optimization level": recipe.optimization_level,
        "timing iterations": recipe.avg_timing_iterations,
        "timing cache": recipe.timing_cache or (None if recipe.builder_cache else "off"),
        "tactic sources": None if recipe.tactic_sources is None else ", ".join(recipe.tactic_sources) or "none",
        "sparsity": "yes" if recipe.sparsity else None,
        "weights": None if recipe.weights.value == "included" else recipe.weights,
        "weight streaming": "yes" if recipe.weight_streaming else None,
        "profiling verbosity": recipe.profiling_verbosity,
        "version compatible": "yes" if recipe.version_compatible else None,
    }


def print_tensors(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    tensors = [("input", spec) for spec in inputs] + [("output", spec) for spec in outputs]
    print_rows(
        "\ntensors",
        ("", "name", "dtype", "shape"),
        [
            (
                role,
                spec.name,
                spec.dtype,
                " x ".join("?" if dim is None else str(dim) for dim in spec.shape) or "scalar",
            )
            for role, spec in tensors
        ],
    )


def print_profiles(profiles: Sequence[ShapeProfile]) -> None:
    print_rows(
        "\noptimization profiles",
        ("", "input", "min", "opt", "max"),
        [
            (number, name, *str(limits).split(":"))
            for number, profile in enumerate(profiles)
            for name, limits in profile.ranges.items()
        ],
    )


def print_benchmark(uri: str, benchmark: Benchmark, run_id: str | None = None) -> None:
    print_measurements(uri, benchmark)
    if run_id is not None:
        typer.echo(f"\nlogged to run {run_id}")


def print_side_by_side(result: SideBySide, run_id: str | None = None) -> None:
    comparison = result.comparison
    headings = ("output", "relative error", "median row", "worst row", "largest error", "mean error", "cosine",
                "same best class")  # fmt: skip
    rows = [
        (
            output.name,
            f"{output.relative_error:.2e}",
            _error_text(output.median_row_error),
            _error_text(output.worst_row_error),
            f"{output.max_abs_error:.2e}",
            f"{output.mean_abs_error:.2e}",
            f"{output.cosine_similarity:.6f}",
            "" if output.top_class_agreement is None else f"{output.top_class_agreement:.1%}",
        )
        for output in comparison.outputs
    ]
    print_rows(f"{result.subject} against {result.reference}, on {comparison.inputs}", headings, rows)
    typer.echo(f"{comparison.verdict}{''.join(f'; {problem}' for problem in comparison.problems)}\n")
    print_benchmark("latency and throughput", result.benchmark, run_id)


def print_measurements(title: str, benchmark: Benchmark) -> None:
    several = len({row.model for row in benchmark.measurements}) > 1
    headings = ("model", "runtime", "", "batch", "mean ms", "p50", "p90", "p99", "rows/s")
    rows = []
    for row in benchmark.measurements:
        times = (row.latency.mean, row.latency.p50, row.latency.p90, row.latency.p99)
        numbers = [f"{time:.3f}" for time in times]
        rows.append((row.model, row.runtime, row.part, row.batch, *numbers, f"{row.throughput:,.0f}"))
    shown = slice(0 if several else 1, None)
    print_rows(title, headings[shown], [row[shown] for row in rows])
    for description in benchmark.runtimes:
        typer.echo(f"measured on {description}")
    for problem in benchmark.problems:
        typer.echo(f"not measured: {problem}")


def print_layers(report: LayerReport) -> None:
    rows = [
        (
            number,
            layer.name,
            layer.kind,
            ", ".join(map(str, layer.outputs)),
            "" if layer.milliseconds is None else f"{layer.milliseconds:.4f}",
        )
        for number, layer in enumerate(report.layers)
    ]
    title = f"{report.model} on {report.description}, timed with {report.rows} rows"
    print_rows(title, ("", "layer", "type", "outputs", "ms"), rows)


def print_cache(folder: Path, entries: Sequence[CacheEntry], limit: int | None) -> None:
    rows = [
        (entry.kind, entry.key[:12], f"{entry.size / 1e6:,.1f}", f"{entry.used:%Y-%m-%d %H:%M}") for entry in entries
    ]
    if rows:
        print_rows("", ("", "key", "MB", "used (UTC)"), rows)
    total = sum(entry.size for entry in entries)
    allowed = "no limit" if limit is None else f"up to {limit / 1e6:,.1f} MB are kept"
    typer.echo(f"{folder}: {len(entries)} entries of {total / 1e6:,.1f} MB; {allowed} (MLFLOW_TRT_CACHE_SIZE)")


def print_removed(entries: Sequence[CacheEntry]) -> None:
    size = sum(entry.size for entry in entries) / 1e6
    typer.echo(f"Removed {len(entries)} entries of {size:,.1f} MB")


def _batch_text(axis: BatchAxis | None) -> str:
    if axis is None:
        return "none"
    origin = "declared" if axis.declared else "read off the graph"
    use = "other sizes are split and padded" if axis.splits else "neither split nor padded"
    measured = "" if axis.dependence is None else f"; rows depend on each other: {axis.dependence}"
    return f"axis 0 of {', '.join(axis.inputs)} ({origin}; {use}{measured})"


def print_diagnosis(diagnosis: Diagnosis) -> None:
    rows = [("ok" if check.ok else "no", check.name, check.detail) for check in diagnosis.checks]
    print_rows("mlflow-trt doctor", ("", "", ""), rows)
