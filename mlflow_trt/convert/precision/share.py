"""How much of a model's arithmetic runs in the precision that was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

import onnx
import onnx.shape_inference
from google.protobuf.message import EncodeError
from onnx import ModelProto, NodeProto, TensorProto

from mlflow_trt.convert.onnx.graph import FlatModel, producers_of
from mlflow_trt.convert.onnx.model import attribute_of
from mlflow_trt.core.arrays import Feeds

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
MOVING = frozenset(
    """Cast Concat DepthToSpace DequantizeLinear Expand Flatten Gather GatherElements GatherND Identity QuantizeLinear
    Reshape Shape Slice SpaceToDepth Split Squeeze Tile Transpose Unsqueeze""".split()  # noqa: SIM905  # easier to read
)
"""Operators that compute nothing new."""

Share = Callable[[Collection[str]], float]


def share_of(model: FlatModel, feeds: Feeds) -> Share:
    """What tells, of nodes by name, how much of the model's floating point arithmetic they do: 0 to 1.

    Arithmetic is counted in multiplications and additions, for inputs of the shapes of `feeds`; a node whose shapes
    cannot be inferred counts as one that makes a single value.
    """
    shapes = _shapes_for(model, feeds)
    work = {node.name: _work_of(node, shapes) for node in model.proto.graph.node if _computes_floats(node, model)}
    total = sum(work.values())

    def share(nodes: Collection[str]) -> float:
        return sum(work.get(name, 0) for name in nodes) / total if total else float(bool(nodes))

    return share


def quantized_nodes(model: FlatModel) -> frozenset[str]:
    """The nodes of a model that brings Q/DQ which TensorRT runs in 8 bits: those that read nothing but such tensors."""
    producers = producers_of(model)

    def is_quantized(name: str) -> bool:
        producer = producers.get(name)
        return producer is not None and producer.op_type == "DequantizeLinear"

    found = set()
    for node in model.proto.graph.node:
        operands = [name for name in node.input[:2] if is_quantized(name) or model.types.get(name) in _FLOATS]
        if node.op_type not in MOVING and operands and all(is_quantized(name) for name in operands):
            found.add(node.name)
    return frozenset(found)


def _computes_floats(node: NodeProto, model: FlatModel) -> bool:
    return node.op_type not in MOVING and any(model.types.get(name) in _FLOATS for name in (*node.input, *node.output))


def _shapes_for(model: FlatModel, feeds: Feeds) -> Mapping[str, tuple[int, ...]]:
    bound = ModelProto()
    bound.CopyFrom(model.proto)
    bound.graph.ClearField("value_info")
    for value in bound.graph.input:
        if value.name in feeds:
            for dim, size in zip(value.type.tensor_type.shape.dim, feeds[value.name].shape, strict=False):
                dim.dim_value = size
    for value in bound.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            dim.ClearField("dim_param")
    try:
        graph = onnx.shape_inference.infer_shapes(bound, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, EncodeError, ValueError):
        graph = bound.graph
    shapes = {
        value.name: tuple(dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
    return shapes | {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}


def _work_of(node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> float:
    made = math.prod(shapes.get(node.output[0] if node.output else "", ()))
    read = [shapes.get(name, ()) for name in node.input]
    if node.op_type == "MatMul" and read[0]:
        return made * read[0][-1]
    if node.op_type == "Gemm" and len(read[0]) == 2:
        return made * read[0][0 if attribute_of(node, "transA").i else 1]
    if node.op_type == "Conv" and len(read[1]) > 2:
        return made * math.prod(read[1][1:])
    if node.op_type == "ConvTranspose" and len(read[1]) > 2:
        return math.prod(read[0]) * math.prod(read[1][1:])
    if node.op_type in _RECURRENT and len(read[0]) == 3:
        return math.prod(read[0][:2]) * sum(math.prod(weight) for weight in read[1:3])
    return made
