"""The whole way down this storey: source model → typed model → engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from mlflow_trt import trt
from mlflow_trt._logging import get_logger
from mlflow_trt.convert.builder import Progress, build_engine
from mlflow_trt.convert.dimension_names import tell_apart
from mlflow_trt.convert.onnx_model import MODEL_FILE, OnnxModel, copy_files, describe, sha256_of, subgraphs_of
from mlflow_trt.convert.precision import PASSES
from mlflow_trt.convert.profiles import Profiles, resolve_profiles
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.errors import BuildError, UnsupportedModelError
from mlflow_trt.spec import Distribution, EngineRecord, Precision, PrecisionReport, Shape, TensorSpec

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class TypedModel:
    """The ONNX that TensorRT parses. `path` is the source model's own where nothing was changed.

    `inputs` and `outputs` are the source model's, but for dimension names that were told apart.
    """

    path: Path
    sha256: str
    is_source: bool
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A source model and everything that was made of it. `plan` is the engine's file.

    `remarks` is what the user was told about choices made for them.
    """

    source: OnnxModel
    typed: TypedModel
    recipe: Recipe
    profiles: Profiles
    precision_report: PrecisionReport
    remarks: tuple[str, ...]
    engine: EngineRecord
    plan: Path


def convert(
    source: OnnxModel,
    recipe: Recipe,
    workdir: Path,
    *,
    example_shapes: Mapping[str, Shape] | None = None,
    distribution: Distribution | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Make the typed model and the engine of `source` in `workdir`. Raises what its steps raise."""
    tensorrt = trt.load(distribution)
    profiles = resolve_profiles(source, recipe, example_shapes)
    typed, report = make_typed_model(source, recipe, profiles, workdir)
    remarks = (*profiles.remarks, *report.remarks, *_about_float32(tensorrt, recipe))
    for remark in remarks:
        _log.info("%s", remark)
    plan = workdir / "engine.plan"
    try:
        engine = build_engine(
            typed.path, plan, recipe, profiles.profiles, distribution=tensorrt.distribution, progress=progress
        )
    except BuildError as error:
        raise _naming_control_flow(error, source) from error
    return Conversion(
        source=source,
        typed=typed,
        recipe=recipe,
        profiles=profiles,
        precision_report=report,
        remarks=remarks,
        engine=engine,
        plan=plan,
    )


def make_typed_model(
    source: OnnxModel, recipe: Recipe, profiles: Profiles, workdir: Path
) -> tuple[TypedModel, PrecisionReport]:
    """Run the passes. The typed model is written to `workdir` only where it differs from the source model."""
    told_apart = tell_apart(source.proto, profiles.profiles)
    proto, report = PASSES[recipe.precision](told_apart)
    if proto is source.proto:
        typed = TypedModel(
            path=source.path,
            sha256=source.files[MODEL_FILE],
            is_source=True,
            inputs=source.inputs,
            outputs=source.outputs,
        )
        return typed, report
    folder = workdir / "typed"
    folder.mkdir()
    path = folder / f"{recipe.precision}.onnx"
    onnx.save_model(proto, path)
    copy_files(source.external_files, source.path.parent, folder)
    inputs, outputs = describe(proto, path)
    return TypedModel(path=path, sha256=sha256_of(path), is_source=False, inputs=inputs, outputs=outputs), report


def _about_float32(tensorrt: trt.TensorRT, recipe: Recipe) -> tuple[str, ...]:
    if recipe.precision is not Precision.FP32 or not tensorrt.is_rtx:
        return ()
    remark = (
        "fp32 was asked for, but TensorRT-RTX ignores the TF32 flag: its float32 matrix products and convolutions have "
        "the relative error of TF32, about 3e-4"
    )
    return (remark,)


def _naming_control_flow(error: BuildError, source: OnnxModel) -> BuildError:
    """TensorRT refuses nested control flow with an internal error: name the nodes that are the likely cause."""
    if isinstance(error, UnsupportedModelError):
        return error
    nodes = [
        f"{node.name or 'unnamed'} ({node.op_type})"
        for node in source.proto.graph.node
        if any(attribute.HasField("g") for attribute in node.attribute)
    ]
    if not nodes or not any(list(subgraphs_of(inner)) for inner in subgraphs_of(source.proto.graph)):
        return error
    return UnsupportedModelError(
        f"{error.message} The likely cause is control flow inside control flow, at {', '.join(nodes)}: "
        "TensorRT cannot run nested If, Loop or Scan; export the model without it.",
        nodes=nodes,
        log=error.log,
    )
