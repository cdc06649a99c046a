"""Which way a typed model is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from mlflow_trt.convert.onnx.byte_inputs import cast_bytes_first
from mlflow_trt.convert.onnx.dimension_names import name_dimensions_apart
from mlflow_trt.convert.onnx.model import OnnxModel
from mlflow_trt.convert.onnx.rewrite import rewrite
from mlflow_trt.convert.precision import pass_for
from mlflow_trt.convert.precision.calibration import CALIBRATED, check_calibration, open_calibration_cache
from mlflow_trt.convert.precision.quantized import is_quantized
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.convert.resolve_profiles import Profiles
from mlflow_trt.convert.samples import Samples
from mlflow_trt.convert.typed_model.model import TypedModel, TypedModelTask
from mlflow_trt.convert.typed_model.retyped import RetypedModelMaker
from mlflow_trt.convert.typed_model.unchanged import UnchangedModelMaker
from mlflow_trt.core.accuracy import Tolerance


class TypedModelMaker(Protocol):
    """Makes the typed model of one source model, again and again where more nodes must stay in float32."""

    def make(self, kept: Mapping[str, str]) -> TypedModel:
        """`kept` has nodes that stay in float32, with the reason for each."""
        ...


def maker_for(
    source: OnnxModel,
    recipe: Recipe,
    profiles: Profiles,
    workdir: Path,
    *,
    samples: Samples,
    tolerance: Tolerance | None,
    weight_only: Mapping[str, str],
    calibration_cache: Path | None = None,
) -> TypedModelMaker:
    """What makes the typed model of `recipe`.

    Args:
        samples: what ranges are seen on, and results compared on.
        tolerance: nodes are kept in float32 until this is met; None accepts the first result.
        calibration_cache: for int8 and fp8, a file that ranges are read from, or written to where it has none.
        weight_only: operators of which no more than the weights can be quantized, with the reason for each.

    Raises:
        RecipeError: the precision needs calibration data and there is too little; `keep_float32` names nothing.
        UnsupportedModelError: the precision follows from the model's values, and ONNX Runtime cannot run it.
        MissingDependencyError: the precision needs ONNX Runtime, and it is not installed.
    """
    rewritten = rewrite(source.proto, source.path.parent, workdir)
    told_apart = name_dimensions_apart(rewritten.proto, profiles.profiles)
    task = TypedModelTask(
        source=source,
        rewritten=replace(rewritten, proto=cast_bytes_first(told_apart)),
        recipe=recipe,
        workdir=workdir,
        samples=samples,
        tolerance=tolerance,
        batch_axis=profiles.batch_axis,
    )
    precision_pass = pass_for(recipe.precision, recipe.calibration_method, weight_only)
    brings_its_own = recipe.precision in CALIBRATED and is_quantized(task.rewritten.proto)
    if precision_pass is None or brings_its_own:
        return UnchangedModelMaker(task)
    cache = open_calibration_cache(calibration_cache, source, recipe)
    check_calibration(task.rewritten.proto, recipe, samples, cache)
    return RetypedModelMaker(task, precision_pass, cache)
