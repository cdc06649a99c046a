"""The ranges of the precisions that are calibrated: seen on samples, chosen by a method, or read from a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
from onnx import ModelProto

from mlflow_trt.backends.onnxruntime_process import calibrated_magnitudes
from mlflow_trt.convert.onnx.graph import FlatModel
from mlflow_trt.convert.onnx.model import OnnxModel
from mlflow_trt.convert.precision.calibration_cache import CalibrationCache, SavedRanges
from mlflow_trt.convert.precision.quantized import QUANTIZABLE, is_quantized
from mlflow_trt.convert.precision.ranges import Evidence, gather_evidence, measured_tensors
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.convert.samples import Samples
from mlflow_trt.core.types import CalibrationMethod, Precision
from mlflow_trt.errors import RecipeError

CALIBRATED = (Precision.INT8, Precision.FP8)
_FEWEST_ROWS = 8
"""What a range for quantization has to be seen on. A hundred and more are usual."""


def open_calibration_cache(path: Path | None, source: OnnxModel, recipe: Recipe) -> CalibrationCache | None:
    """The file of ranges, for a precision that has some. Raises RecipeError for a file of something else."""
    if path is None or recipe.precision not in CALIBRATED:
        return None
    return CalibrationCache(path, source.digest)


def check_calibration(
    model: ModelProto, recipe: Recipe, samples: Samples, cache: CalibrationCache | None = None
) -> None:
    """Raise RecipeError where the precision is calibrated on the samples, and they are too few or noise."""
    if recipe.precision not in CALIBRATED or is_quantized(model):
        return
    if cache is not None and cache.saved is not None and not samples.is_evidence:
        return
    if not samples.is_evidence or samples.rows < _FEWEST_ROWS:
        raise RecipeError(
            f"{recipe.precision} is calibrated on real inputs: pass calibration_data with at least {_FEWEST_ROWS} rows "
            f"(a hundred and more are usual); given is {samples}",
            option="calibration_data",
        )


def calibrate(
    model: FlatModel, samples: Samples, method: CalibrationMethod, cache: CalibrationCache | None
) -> Evidence:
    """The ranges that `cache` has for the model and the method; else those seen on the samples, which it then gets.

    Raises what `gather_evidence` raises, and RecipeError where the cache lacks ranges and the samples are none to see
    them on.
    """
    digest = samples.sha256 if samples.is_evidence else None
    saved = None if cache is None else cache.usable(measured_tensors(model), method, digest)
    evidence = gather_evidence(model, samples, saved)
    if saved is not None:
        return replace(evidence, cutoffs=saved.cutoffs.get(str(method), {}))
    if method is not CalibrationMethod.MINMAX:
        evidence = replace(evidence, cutoffs=_chosen_cutoffs(model, samples, method))
    if cache is not None:
        cache.write(_ranges_to_save(model, evidence, method, cache.source_sha256))
    return evidence


def _chosen_cutoffs(model: FlatModel, samples: Samples, method: CalibrationMethod) -> dict[str, float]:
    path = model.folder / "flat.onnx"
    onnx.save_model(model.proto, path)
    cutoffs = calibrated_magnitudes(path, samples.feeds, str(method), sorted(QUANTIZABLE), model.folder)
    return {name: cutoff for name, cutoff in cutoffs.items() if cutoff > 0}


def _ranges_to_save(model: FlatModel, evidence: Evidence, method: CalibrationMethod, source_sha256: str) -> SavedRanges:
    seen = {name: largest for name, largest in evidence.largest.items() if name not in model.constants}
    return SavedRanges(
        source_sha256=source_sha256,
        samples=str(evidence.samples),
        samples_sha256=evidence.samples.sha256,
        largest=seen,
        not_finite={name: count for name, count in evidence.not_finite.items() if name in seen},
        cutoffs={} if method is CalibrationMethod.MINMAX else {str(method): evidence.cutoffs},
    )
