"""What a conversion would do: everything that can be found out without building an engine."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from mlflow import MlflowClient

from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.convert.checks import check_nodes, check_recipe
from mlflow_trt.convert.conversion import choose_samples
from mlflow_trt.convert.onnx.rewrite import rewrite
from mlflow_trt.convert.precision.calibration import check_calibration, open_calibration_cache
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.convert.resolve_profiles import resolve_profiles
from mlflow_trt.convert.row_dependence import check_rows
from mlflow_trt.core.output_folder import check_target
from mlflow_trt.core.scratch import scratch_folder
from mlflow_trt.core.types import BatchAxis, Precision, ShapeProfile, TensorSpec
from mlflow_trt.flavor.mlmodel import check_names
from mlflow_trt.pipeline.make import PreparedConversion, open_onnx
from mlflow_trt.pipeline.user_samples import example_shapes, sample_data_of
from mlflow_trt.registry.convert_version import whole_options, with_network_of
from mlflow_trt.registry.lineage import find_twin, recipe_digest
from mlflow_trt.registry.sources.open import open_source


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A conversion that was not done. `existing` is the version that would be found instead of made."""

    source: str
    source_digest: str
    recipe: Recipe
    tensorrt: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[ShapeProfile, ...]
    batch_axis: BatchAxis | None
    remarks: tuple[str, ...]
    destination: str
    existing: str | None


def plan_conversion(
    model_uri: str | os.PathLike[str],
    prepared: PreparedConversion,
    *,
    registered_model_name: str | None = None,
    alias: str | None = None,
    path: Path | None = None,
    force: bool = False,
) -> Plan:
    """Look at the source, resolve its profiles, and look for a version that exists. Writes nothing.

    Raises what the conversion would raise before it makes anything.
    """
    check_names(registered_model_name, alias=alias)
    if path is not None:
        check_target(path)
    options, tensorrt = prepared.options, trt.load()
    recipe = options.recipe
    if recipe.precision is Precision.BEST:
        check_recipe(tensorrt, replace(recipe, precision=Precision.FP32))
    else:
        check_recipe(tensorrt, recipe)
    with (
        open_source(model_uri, whole_options(options)) as source,
        open_onnx(source.path, options) as model,
        scratch_folder() as workdir,
    ):
        of_network = with_network_of(prepared, source)
        options, recipe = of_network.options, of_network.options.recipe
        example = source.input_example if source.whole is None else None
        check_nodes(model.proto)
        profiles = resolve_profiles(model, recipe, example_shapes(example, model.inputs))
        twin, digest = None, recipe_digest(prepared, source.whole)
        if registered_model_name is not None and not force:
            twin = find_twin(MlflowClient(), registered_model_name, source.lineage, model.digest, digest)
        remarks: tuple[str, ...] = ()
        if twin is None:
            data = sample_data_of(options.calibration_data, example, model.inputs)
            samples = choose_samples(data, model, profiles)
            profiles = check_rows(model, profiles, samples)
            rewritten = rewrite(model.proto, model.path.parent, workdir)
            cache = open_calibration_cache(options.calibration_cache_file, model, recipe)
            check_calibration(rewritten.proto, recipe, samples, cache)
            remarks = rewritten.remarks
        return Plan(
            source=source.lineage["source"],
            source_digest=model.digest,
            recipe=recipe,
            tensorrt=str(tensorrt),
            inputs=model.inputs,
            outputs=model.outputs,
            profiles=profiles.profiles,
            batch_axis=profiles.batch_axis,
            remarks=(*profiles.remarks, *remarks),
            destination=str(path) if registered_model_name is None else f"a version of {registered_model_name}",
            existing=None if twin is None else f"models:/{twin.name}/{twin.version}",
        )
