"""`precision="best"`: convert with every precision, compare and measure the results, and keep one of them.

A candidate is converted, and its accuracy judged, as if its precision had been asked for, with two differences: one
that TensorRT resists or that is too far off is a loser and no error; and a comparison that proves nothing is enough for
float32, which is the graph that the user gave, and for no other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.backends.onnxruntime import import_onnxruntime
from mlflow_trt.convert.checks import FIRST_WITH_FP8
from mlflow_trt.convert.conversion import Conversion
from mlflow_trt.convert.onnx.model import OnnxModel
from mlflow_trt.convert.precision.quantized import is_quantized
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.convert.samples import SampleData
from mlflow_trt.core.accuracy import Tolerance, Verdict
from mlflow_trt.core.compatibility import check_targets
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.progress_event import BuildProgress, Progress
from mlflow_trt.core.selection import CANDIDATES, Fate, Selection, choose, table_row
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.types import Gpu, Precision, Shape
from mlflow_trt.errors import (
    AccuracyError,
    BuildError,
    EngineMismatchError,
    ExecutionError,
    MlflowTrtError,
    RecipeError,
    RuntimeUnavailableError,
)
from mlflow_trt.pipeline.bench import Bench, Round, open_bench, usual_feeds
from mlflow_trt.pipeline.trial import QUANTIZED, Attempt, Trial, lost, tried
from mlflow_trt.pipeline.verify import Verification, judge

_log = get_logger(__name__)

ROUNDS = 9


def check_best(recipe: Recipe, settings: LoadSettings, verify: Tolerance | bool) -> Bench:
    """The bench that the candidates are measured on. Called before any work is done.

    Raises:
        RecipeError: the accuracy is not to be verified, or the GPU of this machine is none of the targets.
        RuntimeUnavailableError: there is no GPU to measure on; MissingDependencyError: or no package to do it with.
    """
    if verify is False:
        raise RecipeError(
            "precision 'best' is the fastest of those that are accurate enough, so verify=False leaves nothing to "
            "choose by; leave it out, or name the precision",
            option="verify",
        )
    try:
        import_onnxruntime()
        bench = open_bench(settings)
    except RuntimeUnavailableError as error:
        raise error.retold(
            wanted="precision 'best' measures engines on a GPU",
            advice="Convert on a GPU machine, or name a precision: fp32, fp16, bf16, int8 or fp8.",
        ) from error
    if recipe.targets or trt.load().is_rtx:  # by default, TensorRT builds for the GPU that it runs on
        check_targets(
            recipe.targets, bench.gpu, what="precision 'best' is measured", otherwise="name the precision instead"
        )
    return bench


@dataclass(frozen=True, kw_only=True)
class Best:
    """The winner, exactly as it would have been made if its precision had been asked for, and how it won."""

    conversion: Conversion
    verification: Verification
    selection: Selection


def convert_best(
    source: OnnxModel,
    recipe: Recipe,
    workdir: Path,
    bench: Bench,
    settings: LoadSettings,
    *,
    data: SampleData | None = None,
    tolerance: Tolerance | None = None,
    example_shapes: Mapping[str, Shape] | None = None,
    progress: Progress | None = None,
) -> Best:
    """Convert with every candidate in a folder of its own in `workdir`, and choose.

    Args:
        data: sample inputs; None generates some, with which int8 and fp8 are left out.
        tolerance: what every candidate may be off by; None takes what is usual for each.

    Raises:
        AccuracyError, BuildError or ExecutionError: no candidate passed; the text shows what became of each.
        What `convert` raises about the model, the recipe and the data, whatever the precision.
    """
    if data is not None and isinstance(data.arrays, Iterator):
        data = replace(data, arrays=list(data.arrays))  # every candidate reads it
    plan = _planned(source, recipe, bench.gpu)
    steps = len([reason for reason in plan.values() if reason is None]) + 1
    trials: list[Trial] = []
    for precision, reason in plan.items():
        if reason is not None:
            trials.append(lost(precision, Fate.LEFT_OUT, reason))
            continue
        folder = workdir / str(precision)
        folder.mkdir()
        attempt = Attempt(
            source=source,
            recipe=replace(recipe, precision=precision),
            folder=folder,
            settings=settings,
            data=data,
            tolerance=tolerance,
            example_shapes=example_shapes,
            progress=_part(progress, len([trial for trial in trials if trial.was_tried]), steps, f"{precision}: "),
        )
        trials.append(tried(attempt))
        _log.info("best: %s", ", ".join(filter(None, table_row(trials[-1].candidate))))
    shapes = _measure(trials, bench, _part(progress, steps - 1, steps, ""))
    return _chosen(trials, bench, shapes, demanded=tolerance is not None)


def _planned(source: OnnxModel, recipe: Recipe, gpu: Gpu) -> dict[Precision, str | None]:
    """The candidates, with the reason why one is left out. The builder and the calibration may add more reasons."""
    tensorrt = trt.load()
    reasons: dict[Precision, str] = {}
    if tensorrt.is_rtx:
        reasons[Precision.TF32] = "TensorRT-RTX ignores the TF32 flag: its fp32 is the same"
    if not recipe.allow_tf32:
        reasons[Precision.TF32] = "allow_tf32=False forbids it"
    if not tensorrt.is_rtx and gpu.compute_capability < FIRST_WITH_FP8:
        reasons[Precision.FP8] = f"{gpu} cannot execute fp8, which came with {FIRST_WITH_FP8}"
    if is_quantized(source.proto):
        reasons |= dict.fromkeys(QUANTIZED, "the model brings its own QuantizeLinear nodes, and fp32 keeps them")
    return {precision: reasons.get(precision) for precision in CANDIDATES}


def _measure(trials: Sequence[Trial], bench: Bench, progress: Progress) -> Mapping[str, Shape]:
    """Time every engine, round after round, each time beginning with another; returns the shapes of the inputs.

    All are loaded at the same time: loading takes longer than a round, and what happens to the machine between two
    rounds happens to all of them.
    """
    runnable = [trial for trial in trials if trial.conversion is not None]
    if not any(trial.candidate.fate is Fate.PASSED for trial in runnable):
        return {}
    shapes: dict[str, Shape] = {}
    with contextlib.ExitStack() as stack:
        rounds: list[tuple[Trial, Round]] = []
        for trial in runnable:
            assert trial.conversion is not None  # noqa: S101  # filtered above
            feeds = usual_feeds(trial.conversion)
            shapes = {name: array.shape for name, array in feeds.items()}
            try:
                rounds.append((trial, stack.enter_context(bench.opened(trial.conversion, feeds))))
            except (ExecutionError, EngineMismatchError) as error:
                trial.loses(Fate.NOT_RUN, error.message, error)
        for number in range(ROUNDS):
            progress(BuildProgress(phase=f"measuring, round {number + 1} of {ROUNDS}", fraction=number / ROUNDS))
            first = number % max(len(rounds), 1)
            for trial, run in [*rounds[first:], *rounds[:first]]:
                try:
                    times = (*trial.candidate.milliseconds, run())
                except ExecutionError as error:
                    trial.loses(Fate.NOT_RUN, error.message, error)
                    rounds = [other for other in rounds if other[0] is not trial]
                else:
                    trial.candidate = replace(trial.candidate, milliseconds=times)
    return shapes


def _chosen(trials: Sequence[Trial], bench: Bench, shapes: Mapping[str, Shape], *, demanded: bool) -> Best:
    chosen = choose([trial.candidate for trial in trials])
    if chosen is None:
        raise _nothing_passed(trials)
    candidates, winner = chosen
    trial = next(trial for trial in trials if trial.candidate.precision is winner.precision)
    assert trial.conversion is not None and trial.verification is not None  # noqa: S101, PT018  # it passed
    judge(trial.verification, demanded=demanded, is_evidence=trial.conversion.samples.is_evidence)
    _log.info("best is %s: %s", winner.precision, winner.reason)
    selection = Selection(
        winner=winner.precision,
        reason=winner.reason,
        measured_on=bench.description,
        shapes=shapes,
        candidates=candidates,
    )
    return Best(conversion=trial.conversion, verification=trial.verification, selection=selection)


def _nothing_passed(trials: Sequence[Trial]) -> MlflowTrtError:
    """The error for candidates of which none passed: about the accuracy, if that is what any of them failed by."""
    listing = "; ".join(f"{t.candidate.precision}: {t.candidate.fate}: {t.candidate.reason}" for t in trials)
    text = f"precision 'best' found no engine that passes. {listing}. Nothing was logged."
    failed = [trial for trial in trials if trial.candidate.fate is Fate.FAILED_GATE and trial.verification is not None]
    if failed:
        comparisons = [c for t in failed for c in (t.verification.comparisons if t.verification else ())]
        beyond = [comparison for comparison in comparisons if comparison.verdict is Verdict.FAILED]
        nearest = min(beyond or comparisons, key=lambda comparison: comparison.severity)
        return AccuracyError(f"{text} Allow more with verify=Tolerance(...).", comparison=nearest)
    errors = [trial.error for trial in trials if trial.error is not None]
    build = next((error for error in errors if isinstance(error, BuildError)), None)
    return ExecutionError(text) if build is None else BuildError(text, log=build.log)


def _part(progress: Progress | None, number: int, count: int, prefix: str) -> Progress:
    """Progress of step `number` of `count` as a part of the whole."""

    def shown(event: BuildProgress) -> None:
        if progress is not None:
            progress(BuildProgress(phase=f"{prefix}{event.phase}", fraction=(number + event.fraction) / count))

    return shown
