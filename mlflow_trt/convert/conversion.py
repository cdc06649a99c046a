"""The whole way down this storey: source model → typed model → engine."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx import NodeProto

from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.backends.onnxruntime_process import shared_process
from mlflow_trt.convert.checks import check_nodes, check_recipe, weight_only_operators
from mlflow_trt.convert.engine.builder import Built, build_engine
from mlflow_trt.convert.engine.fallback import build_with_retreat
from mlflow_trt.convert.onnx.graph import label_of
from mlflow_trt.convert.onnx.model import OnnxModel, subgraphs_of
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.convert.repeatability import check_repeatable
from mlflow_trt.convert.resolve_profiles import Profiles, resolve_profiles
from mlflow_trt.convert.row_dependence import check_rows
from mlflow_trt.convert.samples import (
    SampleData,
    SampleOrigin,
    Samples,
    cut_samples,
    generate_samples,
    warn_of_noise,
)
from mlflow_trt.convert.typed_model.maker import maker_for
from mlflow_trt.convert.typed_model.model import TypedModel
from mlflow_trt.core.accuracy import Tolerance
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.progress_event import Progress
from mlflow_trt.core.types import Distribution, EngineRecord, Interface, Precision, PrecisionReport, Shape
from mlflow_trt.errors import BuildError, InputError, UnsupportedModelError

_log = get_logger(__name__)
_SMALL_SHARE = 0.1
_FAR_WORSE = 2
"""How many times as large an error may be on inputs that ranges were not seen on before one is told."""


@dataclass(frozen=True, kw_only=True)
class ConversionTask:
    """What to make an engine of, by which recipe, and where.

    `data` are sample inputs; None generates some. `tolerance` is what the typed model may be off from the source
    model: nodes are kept in float32 until it is met, and None takes what comes. `example_shapes` fix the axes that
    nothing else says anything about. `distribution` is which TensorRT builds; None takes the preferred one of those
    installed. `calibration_cache` is a file that ranges for int8 and fp8 are read from, or written to.
    """

    source: OnnxModel
    recipe: Recipe
    workdir: Path
    data: SampleData | None = None
    tolerance: Tolerance | None = None
    example_shapes: Mapping[str, Shape] | None = None
    distribution: Distribution | None = None
    progress: Progress | None = None
    calibration_cache: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A source model and everything that was made of it. `plan` is the engine's file; `samples` were used on the way.

    `remarks` is what the user was told about choices made for them. `shapes` are those that TensorRT's network gives
    its inputs and outputs, -1 for what varies.
    """

    source: OnnxModel
    typed: TypedModel
    recipe: Recipe
    profiles: Profiles
    samples: Samples
    remarks: tuple[str, ...]
    engine: EngineRecord
    shapes: Mapping[str, Shape]
    plan: Path


@shared_process()
def convert_source(task: ConversionTask) -> Conversion:
    """Make the typed model and the engine of a source model, both in the task's `workdir`.

    Raises what its steps raise, and InputError for data that does not fit the model.
    """
    source, recipe = task.source, task.recipe
    tensorrt = trt.load(task.distribution)
    check_recipe(tensorrt, recipe)
    check_nodes(source.proto)
    profiles = resolve_profiles(source, recipe, task.example_shapes)
    samples = choose_samples(task.data, source, profiles)
    if task.tolerance is not None:
        check_repeatable(source, samples)
    profiles = check_rows(source, profiles, samples)
    maker = maker_for(
        source,
        recipe,
        profiles,
        task.workdir,
        samples=samples,
        tolerance=task.tolerance,
        weight_only=weight_only_operators(tensorrt, recipe.precision),
        calibration_cache=task.calibration_cache,
    )
    plan = task.workdir / "engine.plan"

    def build(typed: TypedModel) -> Built:
        return build_engine(
            typed.path,
            plan,
            recipe,
            profiles.profiles,
            interface=Interface(typed.inputs, typed.outputs),
            distribution=tensorrt.distribution,
            progress=task.progress,
        )

    try:
        typed, built = build_with_retreat(maker, build, plan)
    except BuildError as error:
        raise _naming_nodes(error, source) from error
    warnings = (
        *_remark_on_noise(recipe, samples),
        *_remark_on_share(typed.report),
        *_remark_on_few(typed, samples),
    )
    remarks = (
        *profiles.remarks,
        *typed.report.remarks,
        *_remark_on_float32(tensorrt, recipe),
        *_remark_on_unseen(typed),
    )
    for remark in remarks:
        _log.info("%s", remark)
    for warning in warnings:
        _log.warning("%s", warning)
    return Conversion(
        source=source,
        typed=typed,
        recipe=recipe,
        profiles=profiles,
        samples=samples,
        remarks=(*remarks, *warnings),
        engine=built.engine,
        shapes=built.shapes,
        plan=plan,
    )


def check_share(report: PrecisionReport) -> None:
    """Raise UnsupportedModelError where nothing runs in the precision asked for: the engine would be of another one."""
    if not runs_in_precision(report):
        raise UnsupportedModelError(
            f"nothing of this model runs in {report.precision}{_reasons(report)}. Take another precision",
            nodes=[f"{node.name} ({node.operator})" for node in report.kept],
        )


def runs_in_precision(report: PrecisionReport) -> bool:
    """Whether anything does, be it weights alone; for fp32 and tf32 everything."""
    return report.share is None or bool(report.changed_nodes or report.weight_only)


def _remark_on_share(report: PrecisionReport) -> tuple[str, ...]:
    if report.share is None or report.share >= _SMALL_SHARE:
        return ()
    return (f"only {report.share:.1%} of this model's arithmetic runs in {report.precision}{_reasons(report)}",)


def _reasons(report: PrecisionReport) -> str:
    reasons = collections.Counter(node.reason for node in (*report.kept, *report.weight_only))
    counted = [f"{why[:200]} ({count} nodes)" if count > 1 else why[:200] for why, count in reasons.most_common(3)]
    told = "; ".join((*counted, *report.remarks))
    return f": {told}" if told else ""


def choose_samples(data: SampleData | None, source: OnnxModel, profiles: Profiles) -> Samples:
    """The samples that a conversion works on: what was given, or noise for want of it.

    Raises InputError for data that does not fit the model; an input example that does not is passed over.
    """
    if data is None:
        return generate_samples(source, profiles)
    try:
        return cut_samples(data.arrays, data.origin, source, profiles)
    except InputError as error:
        if data.origin is not SampleOrigin.INPUT_EXAMPLE:
            raise
        warn_of_noise(error)
        return generate_samples(source, profiles)


def _remark_on_float32(tensorrt: trt.TensorRT, recipe: Recipe) -> tuple[str, ...]:
    if recipe.precision is not Precision.FP32 or not tensorrt.is_rtx:
        return ()
    remark = (
        "fp32 was asked for, but TensorRT-RTX ignores the TF32 flag: its float32 matrix products and convolutions have "
        "the relative error of TF32, about 3e-4"
    )
    return (remark,)


def _remark_on_noise(recipe: Recipe, samples: Samples) -> tuple[str, ...]:
    if samples.is_evidence or recipe.precision is not Precision.FP16:
        return ()
    remark = (
        f"the ranges of values were seen on {samples}, which is no evidence of what real inputs do: values may "
        "overflow in fp16. Pass calibration_data= or input_example= with real inputs"
    )
    return (remark,)


def _remark_on_unseen(typed: TypedModel) -> tuple[str, ...]:
    """What calibration does to inputs that it has not seen: far worse than to those that it has, and tolerated."""
    unseen, seen = typed.unseen, typed.comparison
    if unseen is None or seen is None or unseen.problems:
        return ()
    if unseen.relative_error <= _FAR_WORSE * seen.relative_error:
        return ()
    precision = typed.report.precision
    remark = (
        f"on inputs that {precision} was not calibrated on, its relative error was {unseen.relative_error:.2g}, and "
        f"{seen.relative_error:.2g} on those that it was, since values beyond a range are cut off; measured on one "
        "half of the samples, with ranges of the other"
    )
    return (remark,)


def _remark_on_few(typed: TypedModel, samples: Samples) -> tuple[str, ...]:
    """Where what it does to them would not be tolerated."""
    if typed.unseen is None or not typed.unseen.problems or typed.comparison is None or typed.comparison.problems:
        return ()
    remark = (
        f"{samples} may be too few for {typed.report.precision}: with ranges of one half of them, the other half is "
        f"beyond the tolerance ({'; '.join(typed.unseen.problems)}). Pass more calibration_data, in which all that "
        "comes is seen"
    )
    return (remark,)


def _names_of(node: NodeProto) -> tuple[str, ...]:
    """What its layers begin with: its name, or else what TensorRT, or a typed model, calls it."""
    return (node.name,) if node.name else (f"node_of_{node.output[0]}", f"{node.op_type}_")


def _naming_nodes(error: BuildError, source: OnnxModel) -> BuildError:
    """TensorRT refuses nested control flow, and what it has no kernel for, with an internal error: name the nodes."""
    if isinstance(error, UnsupportedModelError):
        return error
    without_kernel = re.search(r"(\S+) has no runners that implement it", error.message)
    if without_kernel is not None:
        layer = without_kernel[1]
        named = [(name, node) for node in source.proto.graph.node for name in _names_of(node) if layer.startswith(name)]
        # conv_1 is no part of the layer conv_10.
        nodes = [label_of(max(named, key=lambda pair: len(pair[0]))[1])] if named else []
        return UnsupportedModelError(
            f"TensorRT has no kernel for {', '.join(nodes) or layer}; export the model without it, or log it with "
            f"mlflow.onnx, which runs it on ONNX Runtime. {error.message}",
            nodes=nodes or [layer],
            log=error.log,
        )
    nodes = [
        label_of(node)
        for node in source.proto.graph.node
        if any(attribute.HasField("g") for attribute in node.attribute)
    ]
    if not nodes or not any(list(subgraphs_of(inner.node)) for inner in subgraphs_of(source.proto.graph.node)):
        return error
    return UnsupportedModelError(
        f"{error.message} The likely cause is control flow inside control flow, at {', '.join(nodes)}: "
        "TensorRT cannot run nested If, Loop or Scan; export the model without it.",
        nodes=nodes,
        log=error.log,
    )
