"""What the commands that convert and inspect print, in 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlflow_trt.cli.render_measures import number_text, print_accuracy, verdict_line
from mlflow_trt.cli.tables import print_facts, print_line, print_rows, shorten_digest
from mlflow_trt.cli.wording import in_own_words

if TYPE_CHECKING:
    from pathlib import Path

    from mlflow_trt.convert.recipe import Recipe
    from mlflow_trt.core.selection import Selection
    from mlflow_trt.core.types import BatchAxis, EngineRecord, PrecisionReport, ShapeProfile, TensorSpec
    from mlflow_trt.core.whole_model import WholeModel
    from mlflow_trt.registry.check import Finding
    from mlflow_trt.registry.convert_all import Outcome
    from mlflow_trt.registry.plan import Plan
    from mlflow_trt.store.cache_contents import CacheEntry
    from mlflow_trt.store.record import Record


def _whole_fact(whole: WholeModel | None) -> str | None:
    return None if whole is None else f"{whole.flavor}, of which {whole.network} is the network"


def print_record(uri: str, record: Record, digest: str | None = None) -> None:
    """The URI, what it is, and what was measured come first."""
    print_line(uri)
    print_line(_accuracy_line(record))
    print_line()
    print_facts(
        "recipe",
        {
            **_model_facts(record),
            "record": digest and f"sha256 {shorten_digest(digest)}",
            "made from": record.lineage.get("source"),
            "exported by": record.lineage.get("exporter"),
            "left out": record.lineage.get("left_out"),
            "whole model": _whole_fact(record.whole),
            "as its source": record.whole and record.whole.agreement and str(record.whole.agreement),
            "engines of": record.lineage.get("extends"),
            "made by": f"mlflow-trt {record.mlflow_trt_version}, format {record.format}",
            "remarks": in_own_words("\n".join(record.remarks)),
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
    print_facts("\nengines", {engine.file: _engine_text(engine) for engine in record.engines})
    kernels = {engine.kernels.file: _kernels_text(engine) for engine in record.engines if engine.kernels is not None}
    if kernels:
        print_facts("\nkernels, for GPUs of the same compute capability", kernels)


def _model_facts(record: Record) -> dict[str, Any]:
    """What it was made of and how; for a plan that was imported, nothing of that is known."""
    if record.is_engine_only:
        return {"source model": "none", "batch axis": _batch_text(record.batch_axis)}
    return {
        **_recipe_facts(record.recipe, record.batch_axis),
        **_selection_facts(record.selection),
        "source model": f"{record.source.file}, sha256 {shorten_digest(record.source.digest)}",
        "typed model": "equals the source model"
        if record.typed == record.source
        else f"{record.typed.file}, sha256 {shorten_digest(record.typed.digest)}",
    }


def _accuracy_line(record: Record) -> str:
    if not record.comparisons:
        return "accuracy not measured"
    last = record.comparisons[-1]
    return f"{verdict_line(last)}, relative error {number_text(last.relative_error)}, of {last.subject.rstrip(',')}"


def _engine_text(engine: EngineRecord) -> str:
    where = engine.gpu or "no GPU"
    return (
        f"{engine}, built on {where} in {engine.build_seconds:.1f} s\n"
        f"{engine.size / 1e6:.1f} MB, sha256 {shorten_digest(engine.sha256)}"
    )


def _kernels_text(engine: EngineRecord) -> str:
    stored = engine.kernels
    assert stored is not None  # noqa: S101  # the caller looked
    return (
        f"compiled by {engine.distribution.label} {stored.version} on {stored.gpu} ({stored.compute_capability}), "
        f"driver {stored.driver or 'unknown'}\n{stored.size / 1e6:.1f} MB, sha256 {shorten_digest(stored.sha256)}"
    )


def _selection_facts(selection: Selection | None) -> dict[str, str]:
    return {} if selection is None else {"asked for": f"{selection.asked}; {selection.winner} is {selection.reason}"}


def print_candidates(selection: Selection) -> None:
    print_rows(f"\ncandidates, measured on {selection.measured_on}", selection.headings, selection.rows())


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
            "source model": f"sha256 {shorten_digest(plan.source_digest)}",
            "remarks": in_own_words("\n".join(plan.remarks)),
        },
    )
    print_tensors(plan.inputs, plan.outputs)
    print_profiles(plan.profiles)


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    if not outcomes:
        print_line("no model matches")
        return
    rows = [
        (outcome.source, outcome.status, in_own_words(outcome.detail), f"{outcome.seconds:.1f}") for outcome in outcomes
    ]
    print_rows("conversions", ("source", "", "result", "seconds"), rows)


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


def print_cache(folder: Path, entries: Sequence[CacheEntry], limit: int | None) -> None:
    rows = [
        (entry.kind, entry.key[:12], f"{entry.size / 1e6:,.1f}", f"{entry.used:%Y-%m-%d %H:%M}") for entry in entries
    ]
    if rows:
        print_rows("", ("", "key", "MB", "used (UTC)"), rows)
    total = sum(entry.size for entry in entries)
    allowed = "no limit" if limit is None else f"up to {limit / 1e6:,.1f} MB are kept"
    print_line(f"{folder}: {len(entries)} entries of {total / 1e6:,.1f} MB; {allowed} (MLFLOW_TRT_CACHE_SIZE)")


def print_removed(entries: Sequence[CacheEntry]) -> None:
    size = sum(entry.size for entry in entries) / 1e6
    print_line(f"Removed {len(entries)} entries of {size:,.1f} MB")


def _batch_text(axis: BatchAxis | None) -> str:
    if axis is None:
        return "none"
    origin = "declared" if axis.declared else "read off the graph"
    use = "other sizes are split and padded" if axis.splits else "neither split nor padded"
    measured = "" if axis.dependence is None else f"; rows depend on each other: {axis.dependence}"
    return f"axis 0 of {', '.join(axis.inputs)} ({origin}; {use}{measured})"
