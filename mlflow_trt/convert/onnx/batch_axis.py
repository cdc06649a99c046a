"""Find the batch axis of a model, and out whether a batch can be cut into pieces along it."""

from __future__ import annotations

import re

import onnx.shape_inference
from google.protobuf.message import EncodeError
from onnx import ModelProto

from mlflow_trt.convert.onnx.model import OnnxModel
from mlflow_trt.core.types import BatchAxis, Dim, TensorSpec, is_placeholder

# Rows are known not to depend on each other where the user says so, or the model does by such a name.
_BATCH_NAME = re.compile(r"n|b|bs|.*batch.*", re.IGNORECASE)
# The range of a batch is no guess for an axis of such a name.
_SEQUENCE_NAME = re.compile(r"seq|time|len|frame|token|step|^[tls]$", re.IGNORECASE)
_MARK = "mlflow_trt_rows"


def find_batch_axis(model: OnnxModel, *, declared: bool) -> BatchAxis | None:
    """Axis 0 of the inputs, where it varies, is one and the same for all that have it, and reaches every output.

    Whether rows depend on each other cannot be seen: nodes of a graph and points of a cloud are rows too. So the batch
    can be split only where the user declared it by `batch=`, or where the model calls the axis a batch, and then
    `row_dependence` measures whether that is true. And it cannot be where an input or output has it on another axis
    too, like a matrix of similarities between all rows.
    """
    leading = [spec for spec in model.inputs if spec.shape and not isinstance(spec.shape[0], int)]
    names = {spec.shape[0] for spec in leading if not is_placeholder(spec.shape[0])}
    name = next(iter(names), None)
    if not leading or len(names) > 1 or not all(_carries(spec, name) for spec in model.outputs):
        return None
    if not declared and isinstance(name, str) and _SEQUENCE_NAME.search(name):
        return None
    inputs = tuple(spec.name for spec in leading)
    independent = declared or (isinstance(name, str) and _BATCH_NAME.fullmatch(name) is not None)
    splits = independent and _is_leading_only(model, name) and _reaches_leading_axes_only(model.proto, inputs)
    return BatchAxis(inputs=inputs, splits=splits, declared=declared)


def _carries(output: TensorSpec, name: Dim) -> bool:
    return bool(output.shape) and (not isinstance(output.shape[0], int) or (name is not None and name in output.shape))


def _is_leading_only(model: OnnxModel, name: Dim) -> bool:
    """By the names: every output begins with the axis, and nothing has it elsewhere."""
    elsewhere = {dim for spec in (*model.inputs, *model.outputs) for dim in spec.shape[1:] if isinstance(dim, str)}
    other_axes = {dim for spec in model.inputs for dim in spec.shape[1:] if not is_placeholder(dim)}
    return (name is None or name not in elsewhere) and all(
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
