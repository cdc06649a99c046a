"""Find the batch axis of a model, and out whether a batch can be cut into pieces along it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

import onnx.shape_inference
from google.protobuf.message import EncodeError
from onnx import ModelProto

from mlflow_trt.convert.onnx.model import OnnxModel
from mlflow_trt.core.types import BatchAxis, Shape, TensorSpec, is_placeholder

# Rows are known not to depend on each other where the user says so, or the model does by such a name.
_BATCH_NAME = re.compile(r"n|b|bs|.*batch.*", re.IGNORECASE)
# The range of a batch is no guess for an axis of such a name.
_SEQUENCE_NAME = re.compile(r"seq|time|len|frame|token|step|^[tls]$", re.IGNORECASE)
_MARK = "mlflow_trt_rows"


def find_batch_axis(model: OnnxModel, *, declared: bool) -> BatchAxis | None:
    """Axis 0 of the inputs, where it varies, is one and the same for all that have it, and reaches every output.

    That axes of several names are the same only the user can tell, by `batch=`.

    Whether rows depend on each other cannot be seen: nodes of a graph and points of a cloud are rows too. So the batch
    can be split only where the user declared it by `batch=`, or where the model calls the axis a batch, and then
    `row_dependence` measures whether that is true. And it cannot be where an input or output has it on another axis
    too, like a matrix of similarities between all rows.
    """
    leading = [spec for spec in model.inputs if spec.shape and not isinstance(spec.shape[0], int)]
    names = _names_of(leading)
    if not leading or (len(names) > 1 and not declared) or not all(_carries(spec, names) for spec in model.outputs):
        return None
    if not declared and any(map(_SEQUENCE_NAME.search, names)):
        return None
    inputs = tuple(spec.name for spec in leading)
    independent = declared or (len(names) == 1 and all(map(_BATCH_NAME.fullmatch, names)))
    splits = independent and _is_leading_only(model, names) and _reaches_leading_axes_only(model.proto, inputs)
    return BatchAxis(inputs=inputs, splits=splits, declared=declared)


def count_rows(model: OnnxModel, shapes: Mapping[str, Shape]) -> int:
    """How many rows inputs of these shapes have, for a model without a batch axis.

    1. Where an axis is called a batch, wherever it is: as many as it has, if that is one number.
    2. Where all shapes are fixed, and all inputs and outputs begin with one size: so many.
    3. Where axis 0 of the inputs varies under several names, and outputs begin with one that varies: as many as it has,
       if that is one number. What is called a sequence is one row.
    4. Else one.
    """
    called = {
        shapes[spec.name][axis]
        for spec in model.inputs
        for axis, dim in enumerate(spec.shape)
        if isinstance(dim, str) and _BATCH_NAME.fullmatch(dim)
    }
    if called:
        return _only(called)
    if all(isinstance(dim, int) for spec in model.inputs for dim in spec.shape):
        begins = {spec.shape[:1] for spec in (*model.inputs, *model.outputs)}
        return _only({dim for begin in begins for dim in begin if isinstance(dim, int)}) if len(begins) == 1 else 1
    varying = [spec for spec in model.inputs if spec.shape and not isinstance(spec.shape[0], int)]
    if any(map(_SEQUENCE_NAME.search, _names_of(varying))) or not all(
        spec.shape and not isinstance(spec.shape[0], int) for spec in model.outputs
    ):
        return 1
    return _only({shapes[spec.name][0] for spec in varying})


def _only(sizes: Collection[int]) -> int:
    return next(iter(sizes)) if len(sizes) == 1 else 1


def _names_of(specs: Iterable[TensorSpec]) -> set[str]:
    """Those of axis 0 that mean anything."""
    return {dim for spec in specs if isinstance(dim := spec.shape[0], str) and not is_placeholder(dim)}


def _carries(output: TensorSpec, names: Collection[str]) -> bool:
    return bool(output.shape) and (not isinstance(output.shape[0], int) or not {*names}.isdisjoint(output.shape))


def _is_leading_only(model: OnnxModel, names: Collection[str]) -> bool:
    """By the names: every output begins with the axis, and nothing has it elsewhere."""
    elsewhere = {dim for spec in (*model.inputs, *model.outputs) for dim in spec.shape[1:] if isinstance(dim, str)}
    other_axes = {dim for spec in model.inputs for dim in spec.shape[1:] if not is_placeholder(dim)}
    return elsewhere.isdisjoint(names) and all(
        not isinstance(spec.shape[0], int) and spec.shape[0] not in other_axes for spec in model.outputs
    )


def _reaches_leading_axes_only(proto: ModelProto, inputs: tuple[str, ...]) -> bool:
    """By the operators: exporters name an output's axes as they please, so follow the axis through the graph."""
    marked = ModelProto()
    marked.CopyFrom(proto)
    for value in marked.graph.input:
        if value.name in inputs:
            value.type.tensor_type.shape.dim[0].dim_param = _MARK
    for value in marked.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.ClearField("dim_param")
    marked.graph.ClearField("value_info")
    try:
        inferred = onnx.shape_inference.infer_shapes(marked, data_prop=True)
    except (onnx.shape_inference.InferenceError, EncodeError, ValueError):
        return True  # too large to follow, or beyond what onnx knows: the names have to do
    shapes = [[dim.dim_param for dim in value.type.tensor_type.shape.dim] for value in inferred.graph.output]
    return not any(_MARK in shape[1:] for shape in shapes)
