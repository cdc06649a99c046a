"""`precision="best"`: convert with every precision, compare and measure the results, and keep one of them.

A candidate is converted, and its accuracy judged, as if its precision had been asked for, with two differences: one
that TensorRT resists or that is too far off is a loser and no error; and a comparison that proves nothing is enough for
float32, which is the graph that the user gave, and for no other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.backends.onnxruntime import check_installed
from mlflow_trt.convert.checks import FIRST_WITH_FP8
from mlflow_trt.convert.conversion import Conversion, ConversionTask, convert_source, runs_in_precision
from mlflow_trt.convert.onnx.reference import reference_outputs
from mlflow_trt.convert.onnx.rewrite import rewrite
from mlflow_trt.convert.precision.quantized import is_quantized
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.core.accuracy import Comparison, Tolerance, Verdict
from mlflow_trt.core.arrays import Feeds
from mlflow_trt.core.compatibility import check_targets
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.progress_event import BuildProgress, Progress
from mlflow_trt.core.selection import CANDIDATES, Candidate, Fate, Selection, choose, table_row
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.types import Gpu, Precision, Shape
from mlflow_trt.errors import (
    AccuracyError,
    BuildError,
    EngineMismatchError,
    ExecutionError,
    InputError,
    MlflowTrtError,
    OutOfMemoryError,
    RecipeError,
    RuntimeUnavailableError,
    UnsupportedModelError,
)
from mlflow_trt.pipeline.bench import Bench, GpuBench, Round, usual_feeds
from mlflow_trt.pipeline.verify import Verification, judge, measure_conversion

_log = get_logger(__name__)

ROUNDS = 9
_FLOAT32 = (Precision.FP32, Precision.TF32)
_QUANTIZED = (Precision.INT8, Precision.FP8)


def check_best(recipe: Recipe, settings: LoadSettings, verify: Tolerance | bool, bench: Bench | None = None) -> Bench:
    """The bench that the candidates are measured on, None for the GPU of this machine. Called before any work is done.

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
        check_installed()
        bench = bench or GpuBench(settings)
    except RuntimeUnavailableError as error:
        raise error.with_advice(
            wanted="precision 'best' measures engines on a GPU",
            advice="Convert on a GPU machine, or name a precision: fp32, fp16, bf16, int8 or fp8.",
        ) from error
    if recipe.targets or trt.load().is_rtx:  # by default, TensorRT builds for the GPU that it runs on
        check_targets(
            recipe.targets, bench.gpu, what="precision 'best' is measured", otherwise="name the precision instead"
        )
    return bench


@dataclass(frozen=True, kw_only=True)
class BestConversion:
    """The winner, exactly as it would have been made if its precision had been asked for, and how it won."""

    conversion: Conversion
    verification: Verification
    selection: Selection


@dataclass(kw_only=True)
class Trial:
    """What became of one precision: what was made, as far as it came, and the error that ended it."""

    candidate: Candidate
    conversion: Conversion | None = None
    verification: Verification | None = None
    error: MlflowTrtError | None = None

    @classmethod
    def ended(cls, precision: Precision, fate: Fate, reason: str, error: MlflowTrtError | None = None) -> Trial:
        """A trial that came to no engine that could be measured."""
        return cls(candidate=Candidate(precision=precision, fate=fate, reason=reason), error=error)

    @property
    def was_tried(self) -> bool:
        return self.candidate.fate is not Fate.LEFT_OUT

    def mark_not_run(self, error: MlflowTrtError) -> None:
        """What failed the gate, and cannot be run either, failed the gate."""
        if self.candidate.fate is Fate.PASSED:
            self.candidate = replace(self.candidate, fate=Fate.NOT_RUN, reason=error.message)
            self.error = error
        self.candidate = replace(self.candidate, milliseconds=())


def convert_best(task: ConversionTask, bench: Bench, settings: LoadSettings) -> BestConversion:
    """Convert with every candidate in a folder of its own in the task's `workdir`, and choose.

    Without sample inputs int8 and fp8 are left out. The task's tolerance holds for every candidate; None takes what is
    usual for each.

    Raises:
        AccuracyError, BuildError or ExecutionError: no candidate passed; the text shows what became of each.
        What `convert_source` raises about the model, the recipe and the data, whatever the precision.
    """
    if task.data is not None and isinstance(task.data.arrays, Iterator):
        # Every candidate reads it.
        task = replace(task, data=replace(task.data, arrays=list(task.data.arrays)))
    rewritten = rewrite(task.source.proto, task.source.path.parent, task.workdir)
    plan = _plan_candidates(task.recipe, bench.gpu, brings_quantized=is_quantized(rewritten.proto))
    steps = len([reason for reason in plan.values() if reason is None]) + 1
    trials: list[Trial] = []
    for precision, reason in plan.items():
        if reason is not None:
            trials.append(Trial.ended(precision, Fate.LEFT_OUT, reason))
            continue
        folder = task.workdir / str(precision)
        folder.mkdir()
        done = len([trial for trial in trials if trial.was_tried])
        attempt = replace(
            task,
            recipe=replace(task.recipe, precision=precision),
            workdir=folder,
            tolerance=task.tolerance or Tolerance.default(precision),
            progress=_as_step(task.progress, done, steps, f"{precision}: "),
        )
        trials.append(_try_precision(attempt, settings, demanded=task.tolerance is not None))
        _log.info("best: %s", ", ".join(filter(None, table_row(trials[-1].candidate))))
    shapes = _time_engines(trials, bench, _as_step(task.progress, steps - 1, steps, ""))
    return _choose_winner(trials, bench, shapes, demanded=task.tolerance is not None)


def _plan_candidates(recipe: Recipe, gpu: Gpu, *, brings_quantized: bool) -> dict[Precision, str | None]:
    """The candidates, with the reason why one is left out. The builder and the calibration may add more reasons."""
    tensorrt = trt.load()
    reasons: dict[Precision, str] = {}
    if tensorrt.is_rtx:
        reasons[Precision.TF32] = "TensorRT-RTX ignores the TF32 flag: its fp32 is the same"
    if not recipe.allow_tf32:
        reasons[Precision.TF32] = "allow_tf32=False forbids it"
    if not tensorrt.is_rtx and gpu.compute_capability < FIRST_WITH_FP8:
        reasons[Precision.FP8] = f"{gpu} cannot execute fp8, which came with {FIRST_WITH_FP8}"
    if brings_quantized:
        reasons |= dict.fromkeys(_QUANTIZED, "the model brings its own QuantizeLinear nodes, and fp32 keeps them")
    return {precision: reasons.get(precision) for precision in CANDIDATES}


def _try_precision(attempt: ConversionTask, settings: LoadSettings, *, demanded: bool) -> Trial:
    """Convert with one precision, and judge its accuracy.

    Raises what is no fault of the precision: RecipeError, InputError, UnsupportedModelError for float32, and
    AccuracyError where ONNX Runtime cannot run the source model.
    """
    precision = attempt.recipe.precision
    assert attempt.tolerance is not None  # noqa: S101  # set for every attempt
    conversion = _convert_attempt(attempt)
    if isinstance(conversion, Trial):
        return conversion
    if precision is Precision.FP32:
        _check_reference(conversion)
    elif precision is not Precision.TF32 and not runs_in_precision(conversion.typed.report):
        return Trial.ended(precision, Fate.LEFT_OUT, f"nothing of this model runs in {precision}")
    try:
        verification = measure_conversion(conversion, attempt.tolerance, settings, demanded=demanded)
    except (ExecutionError, EngineMismatchError) as error:
        return Trial.ended(precision, Fate.NOT_RUN, error.message, error)
    except UnsupportedModelError as error:
        return Trial.ended(precision, Fate.FAILED_GATE, error.message, error)
    return _judge_trial(conversion, verification, demanded=demanded)


def _convert_attempt(attempt: ConversionTask) -> Conversion | Trial:
    """The conversion; or the trial, where it has ended with it."""
    precision = attempt.recipe.precision
    try:
        return convert_source(attempt)
    except RecipeError as error:
        # Too little calibration data, or a target that cannot execute it; else the recipe itself is wrong.
        if precision not in _QUANTIZED or error.option not in ("calibration_data", "targets"):
            raise
        return Trial.ended(precision, Fate.LEFT_OUT, error.message)
    except BuildError as error:
        if precision is Precision.FP32 and isinstance(error, UnsupportedModelError):
            raise  # no other precision makes nodes known to TensorRT
        return Trial.ended(precision, Fate.NOT_BUILT, error.message, error)
    except ExecutionError as error:
        return Trial.ended(precision, Fate.NOT_RUN, error.message, error)


def _check_reference(conversion: Conversion) -> None:
    """Raise AccuracyError where the source model cannot be run, so that nothing can be compared with it."""
    try:
        reference_outputs(conversion.source, conversion.samples.feeds[:1])
    except (ExecutionError, InputError) as error:
        raise AccuracyError(
            "precision 'best' compares engines with the source model on ONNX Runtime, which cannot run it: "
            f"{error.message} Nothing was logged. Name a precision instead."
        ) from error


def _judge_trial(conversion: Conversion, verification: Verification, *, demanded: bool) -> Trial:
    precision = conversion.recipe.precision
    typed = conversion.typed.comparison
    engine = next((comparison for comparison in verification.comparisons if comparison is not typed), None)
    objections = (_find_objection(comparison, precision, demanded) for comparison in verification.comparisons)
    reason = next(filter(None, objections), "")
    candidate = Candidate(
        precision=precision,
        fate=Fate.FAILED_GATE if reason else Fate.PASSED,
        reason=reason,
        # What is the source model's own graph is not compared with it.
        typed_error=0.0 if typed is None else typed.relative_error,
        engine_error=None if engine is None else engine.relative_error,
        engine_bytes=conversion.engine.size,
    )
    return Trial(candidate=candidate, conversion=conversion, verification=verification)


def _find_objection(comparison: Comparison, precision: Precision, demanded: bool) -> str | None:
    if comparison.verdict is Verdict.FAILED:
        return f"{comparison.subject} is too far off: {'; '.join(comparison.problems)}"
    if comparison.verdict is Verdict.INCONCLUSIVE and (demanded or precision not in _FLOAT32):
        return f"nothing proves that {comparison.subject} is right: the reference hardly varies on {comparison.inputs}"
    return None


def _time_engines(trials: Sequence[Trial], bench: Bench, progress: Progress) -> Mapping[str, Shape]:
    """Time every engine for `ROUNDS` rounds; returns the shapes of the inputs."""
    runnable = [trial for trial in trials if trial.conversion is not None]
    if not any(trial.candidate.fate is Fate.PASSED for trial in runnable):
        return {}
    feeds = {trial.candidate.precision: usual_feeds(trial.conversion) for trial in runnable if trial.conversion}
    try:
        _time_together(runnable, feeds, bench, progress)
    except OutOfMemoryError as error:
        _log.warning("The GPU has no room for all engines at once, so each is timed by itself: %s", error.message)
        _time_in_turns(runnable, feeds, bench, progress)
    last = feeds[runnable[-1].candidate.precision]
    return {name: array.shape for name, array in last.items()}


_FeedsByPrecision = Mapping[Precision, Feeds]


def _time_together(runnable: Sequence[Trial], feeds: _FeedsByPrecision, bench: Bench, progress: Progress) -> None:
    """Round after round, each time beginning with another engine.

    All are loaded at the same time: loading takes longer than a round, and what happens to the machine between two
    rounds happens to all of them.

    Raises OutOfMemoryError where there is no room for all.
    """
    with contextlib.ExitStack() as stack:
        rounds: list[tuple[Trial, Round]] = []
        for trial in runnable:
            try:
                rounds.append((trial, stack.enter_context(_loaded(trial, feeds, bench))))
            except OutOfMemoryError:
                raise
            except (ExecutionError, EngineMismatchError) as error:
                trial.mark_not_run(error)
        for number in range(ROUNDS):
            progress(BuildProgress(phase=f"measuring, round {number + 1} of {ROUNDS}", fraction=number / ROUNDS))
            first = number % max(len(rounds), 1)
            for trial, run in [*rounds[first:], *rounds[:first]]:
                try:
                    times = (*trial.candidate.milliseconds, run())
                except OutOfMemoryError:
                    raise
                except ExecutionError as error:
                    trial.mark_not_run(error)
                    rounds = [other for other in rounds if other[0] is not trial]
                else:
                    trial.candidate = replace(trial.candidate, milliseconds=times)


def _time_in_turns(runnable: Sequence[Trial], feeds: _FeedsByPrecision, bench: Bench, progress: Progress) -> None:
    """One engine after the other, each alone on the GPU: what happens to the machine meanwhile counts for one of them.

    One that finds no room by itself either cannot be run.
    """
    for number, trial in enumerate(runnable):
        progress(BuildProgress(phase=f"measuring {trial.candidate.precision}", fraction=number / len(runnable)))
        try:
            with _loaded(trial, feeds, bench) as run:
                trial.candidate = replace(trial.candidate, milliseconds=tuple(run() for _ in range(ROUNDS)))
        except (ExecutionError, EngineMismatchError) as error:
            trial.mark_not_run(error)


def _loaded(trial: Trial, feeds: _FeedsByPrecision, bench: Bench) -> AbstractContextManager[Round]:
    assert trial.conversion is not None  # noqa: S101  # only those with one are timed
    return bench.load_engine(trial.conversion, feeds[trial.candidate.precision])


def _choose_winner(
    trials: Sequence[Trial], bench: Bench, shapes: Mapping[str, Shape], *, demanded: bool
) -> BestConversion:
    chosen = choose([trial.candidate for trial in trials])
    if chosen is None:
        raise _error_of(trials)
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
    return BestConversion(conversion=trial.conversion, verification=trial.verification, selection=selection)


def _error_of(trials: Sequence[Trial]) -> MlflowTrtError:
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


def _as_step(progress: Progress | None, number: int, count: int, prefix: str) -> Progress:
    """Progress of step `number` of `count` as a part of the whole."""

    def show(event: BuildProgress) -> None:
        if progress is not None:
            progress(BuildProgress(phase=f"{prefix}{event.phase}", fraction=(number + event.fraction) / count))

    return show
