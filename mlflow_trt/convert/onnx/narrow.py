"""Make float32 of the float64 in a model: TensorRT has none, and its parser narrows what is inside without a word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto

from mlflow_trt.convert.onnx.insert import label
from mlflow_trt.convert.onnx.model import bodies_of, graphs_below, tensors_of
from mlflow_trt.convert.onnx.weights import SETTING
from mlflow_trt.convert.onnx.widen import NAMING_TYPES, retype_attributes, retype_values
from mlflow_trt.errors import UnsupportedModelError

if TYPE_CHECKING:
    import onnx_ir as ir  # imported where it is used: it takes a second

_SMALLEST = float(np.finfo(np.float32).tiny)
"""Below, float32 loses its digits one by one, and GPUs may make 0 of it."""


def has_float64(model: ModelProto) -> bool:
    """Whether anything in a model comes in, is stored or is made as float64: nothing else is computed in it."""
    graphs = (model.graph, *graphs_below(model.graph.node))
    return (
        any(value.type.tensor_type.elem_type == TensorProto.DOUBLE for graph in graphs for value in graph.input)
        or any(tensor.data_type == TensorProto.DOUBLE for tensor in tensors_of(model))
        or any(kind == TensorProto.DOUBLE for kind in _named_types(model))
    )


def _named_types(model: ModelProto) -> Iterator[int]:
    for body in bodies_of(model):
        for node in body.node:
            yield from (attribute.i for attribute in node.attribute if attribute.name in NAMING_TYPES)


def narrow_float64(model: ir.Model) -> None:
    """In place, its inputs and outputs included. Functions have to be inlined.

    Raises UnsupportedModelError for a constant that is infinite in float32, or a setting that is 0 there.
    """
    import onnx_ir as ir

    for graph in (model.graph, *model.graph.subgraphs()):
        for name, tensor in _constants(graph):
            if tensor.dtype == ir.DataType.DOUBLE:
                _check(name, tensor.numpy())
        retype_values(graph, graph.inputs, ir.DataType.DOUBLE)
        for node in graph:
            retype_attributes(node, ir.DataType.DOUBLE)


def _constants(graph: ir.Graph) -> Iterator[tuple[str, ir.TensorProtocol]]:
    import onnx_ir as ir

    for name, value in graph.initializers.items():
        if value.const_value is not None:
            yield name, value.const_value
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                yield label(node), attribute.as_tensor()


def _check(name: str, array: npt.NDArray[np.generic]) -> None:
    """Single small weights may vanish among others; the least that a logarithm or a quotient takes may not."""
    with np.errstate(over="ignore"):
        overflows = np.isinf(array.astype(np.float32)) & np.isfinite(array)
    vanishes = (array != 0) & (np.abs(array) < _SMALLEST)
    is_setting = array.size <= SETTING or bool(vanishes.sum() == np.count_nonzero(array))
    if overflows.any() or (is_setting and vanishes.any()):
        size, value = ("large", array[overflows][0]) if overflows.any() else ("small", array[vanishes][0])
        raise UnsupportedModelError(
            f"the constant {name} is of float64, which TensorRT does not have, and has {value:.4g}, which is too "
            f"{size} for float32. Export the model in float32, or log it with mlflow.onnx, which runs it on ONNX "
            "Runtime",
            nodes=[name],
        )
