"""One candidate of `precision="best"`: what is made of it, and whether it is accurate enough to be measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mlflow_trt.convert.conversion import Conversion, convert
from mlflow_trt.convert.onnx.model import OnnxModel
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.convert.samples import SampleData
from mlflow_trt.convert.typed_model import reference_outputs
from mlflow_trt.core.accuracy import Comparison, Tolerance, Verdict
from mlflow_trt.core.progress_event import Progress
from mlflow_trt.core.selection import Candidate, Fate
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.types import Precision, Shape
from mlflow_trt.errors import (
    AccuracyError,
    BuildError,
    EngineMismatchError,
    ExecutionError,
    InputError,
    MlflowTrtError,
    RecipeError,
    UnsupportedModelError,
)
from mlflow_trt.pipeline.verify import Verification, measure_conversion

_FLOAT32 = (Precision.FP32, Precision.TF32)
QUANTIZED = (Precision.INT8, Precision.FP8)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What it takes to try one precision."""

    source: OnnxModel
    recipe: Recipe
    folder: Path
    settings: LoadSettings
    data: SampleData | None
    tolerance: Tolerance | None
    example_shapes: Mapping[str, Shape] | None
    progress: Progress | None


@dataclass(kw_only=True)
class Trial:
    """What became of one precision: what was made, as far as it came, and the error that ended it."""

    candidate: Candidate
    conversion: Conversion | None = None
    verification: Verification | None = None
    error: MlflowTrtError | None = None

    @property
    def was_tried(self) -> bool:
        return self.candidate.fate is not Fate.LEFT_OUT

    def loses(self, fate: Fate, reason: str, error: MlflowTrtError) -> None:
        """What failed the gate, and cannot be run either, failed the gate."""
        if self.candidate.fate is Fate.PASSED:
            self.candidate = replace(self.candidate, fate=fate, reason=reason)
            self.error = error
        self.candidate = replace(self.candidate, milliseconds=())


def tried(attempt: Attempt) -> Trial:
    """Convert with one precision, and judge its accuracy.

    Raises what is no fault of the precision: RecipeError, InputError, UnsupportedModelError for float32, and
    AccuracyError where ONNX Runtime cannot run the source model.
    """
    precision, demanded = attempt.recipe.precision, attempt.tolerance is not None
    tolerance = attempt.tolerance or Tolerance.default(precision)
    conversion = _converted(attempt, tolerance)
    if isinstance(conversion, Trial):
        return conversion
    if precision is Precision.FP32:
        _check_reference(conversion)
    elif precision is not Precision.TF32 and not conversion.typed.changed:
        return lost(precision, Fate.LEFT_OUT, f"nothing of this model runs in {precision}")
    try:
        verification = measure_conversion(conversion, tolerance, attempt.settings, demanded=demanded)
    except (ExecutionError, EngineMismatchError) as error:
        return lost(precision, Fate.NOT_RUN, error.message, error)
    except UnsupportedModelError as error:
        return lost(precision, Fate.FAILED_GATE, error.message, error)
    return _judged(conversion, verification, demanded=demanded)


def _converted(attempt: Attempt, tolerance: Tolerance) -> Conversion | Trial:
    """The conversion; or the trial, where it has ended with it."""
    precision = attempt.recipe.precision
    try:
        return convert(
            attempt.source,
            attempt.recipe,
            attempt.folder,
            data=attempt.data,
            tolerance=tolerance,
            example_shapes=attempt.example_shapes,
            progress=attempt.progress,
        )
    except RecipeError as error:
        # Too little calibration data, or a target that cannot execute it; else the recipe itself is wrong.
        if precision not in QUANTIZED or error.option not in ("calibration_data", "targets"):
            raise
        return lost(precision, Fate.LEFT_OUT, error.message)
    except BuildError as error:
        if precision is Precision.FP32 and isinstance(error, UnsupportedModelError):
            raise  # no other precision makes nodes known to TensorRT
        return lost(precision, Fate.NOT_BUILT, error.message, error)
    except ExecutionError as error:
        return lost(precision, Fate.NOT_RUN, error.message, error)


def _check_reference(conversion: Conversion) -> None:
    """Raise AccuracyError where the source model cannot be run, so that nothing can be compared with it."""
    names = [spec.name for spec in conversion.source.outputs]
    try:
        reference_outputs(conversion.source.path, names, conversion.samples.feeds[:1])
    except (ExecutionError, InputError) as error:
        raise AccuracyError(
            "precision 'best' compares engines with the source model on ONNX Runtime, which cannot run it: "
            f"{error.message} Nothing was logged. Name a precision instead."
        ) from error


def _judged(conversion: Conversion, verification: Verification, *, demanded: bool) -> Trial:
    precision = conversion.recipe.precision
    typed = conversion.typed.comparison
    engine = next((comparison for comparison in verification.comparisons if comparison is not typed), None)
    reason = next(filter(None, (_objection(c, precision, demanded) for c in verification.comparisons)), "")
    # What is the source model's own graph is not compared with it.
    typed_error = 0.0 if typed is None else typed.relative_error
    candidate = Candidate(
        precision=precision,
        fate=Fate.FAILED_GATE if reason else Fate.PASSED,
        reason=reason,
        typed_error=typed_error,
        engine_error=None if engine is None else engine.relative_error,
        engine_bytes=conversion.engine.size,
    )
    return Trial(candidate=candidate, conversion=conversion, verification=verification)


def _objection(comparison: Comparison, precision: Precision, demanded: bool) -> str | None:
    if comparison.verdict is Verdict.FAILED:
        return f"{comparison.subject} is too far off: {'; '.join(comparison.problems)}"
    if comparison.verdict is Verdict.INCONCLUSIVE and (demanded or precision not in _FLOAT32):
        return f"nothing proves that {comparison.subject} is right: the reference hardly varies on {comparison.inputs}"
    return None


def lost(precision: Precision, fate: Fate, reason: str, error: MlflowTrtError | None = None) -> Trial:
    return Trial(candidate=Candidate(precision=precision, fate=fate, reason=reason), error=error)
