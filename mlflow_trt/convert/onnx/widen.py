"""Make float32 of the float16 inside a model, so that a pass can choose another type for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir  # imported where it is used: it takes a second

NAMING_TYPES = ("to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision")
"""Attributes that say of what type a node's output is, or what it computes in."""


def widen_float16(model: ir.Model) -> None:
    """In place. The types of tensors have to be known; inputs and outputs of the model keep theirs, and are cast."""
    import onnx_ir as ir

    for graph in (model.graph, *model.graph.subgraphs()):
        # The inputs of the model keep their types.
        inputs = () if graph is model.graph else graph.inputs
        for value in retype_values(graph, inputs, ir.DataType.FLOAT16):
            value.meta["was_float16"] = True
        for node in graph:
            retype_attributes(node, ir.DataType.FLOAT16)
    half = [value for value in model.graph.inputs if value.dtype == ir.DataType.FLOAT16]
    casts = [_cast(value, f"{value.name}_float32", ir.DataType.FLOAT) for value in half]
    for value, cast in zip(half, casts, strict=True):
        value.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, value)
    first = next(iter(model.graph), None)
    if first is not None and casts:
        model.graph.insert_before(first, casts)
    for index, value in enumerate(model.graph.outputs):
        if value.meta.pop("was_float16", False):
            name = value.name
            value.name = f"{name}_float32"
            cast = _cast(value, str(name), ir.DataType.FLOAT16)
            cast.outputs[0].shape = value.shape
            model.graph.append(cast)
            model.graph.outputs[index] = cast.outputs[0]


def _cast(value: ir.Value, name: str, to: ir.DataType) -> ir.Node:
    import onnx_ir as ir

    cast = ir.node("Cast", [value], {"to": to.value}, name=f"{name}_cast")
    cast.outputs[0].name, cast.outputs[0].type = name, ir.TensorType(to)
    return cast


def retype_values(graph: ir.Graph, inputs: Iterable[ir.Value], dtype: ir.DataType) -> list[ir.Value]:
    """Make float32 of what is of another type among these inputs, the initializers and what nodes compute.

    Returns the values that were.
    """
    import onnx_ir as ir

    retyped = []
    computed = (value for node in graph for value in node.outputs)
    for value in (*inputs, *graph.initializers.values(), *computed):
        if value.dtype == dtype:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            retyped.append(value)
        if value.const_value is not None and value.const_value.dtype == dtype:
            value.const_value = _converted(value.const_value)
    return retyped


def retype_attributes(node: ir.Node, dtype: ir.DataType) -> None:
    """Make float32 of a type in the attributes of a node: of constants, and where it is named."""
    import onnx_ir as ir

    for name, attribute in list(node.attributes.items()):
        if name in NAMING_TYPES and attribute.type == ir.AttributeType.INT:
            if attribute.as_int() == dtype.value:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT.value)
        elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == dtype:
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(attribute.as_tensor().numpy().astype(np.float32)))


def _converted(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Read and converted when it is written: all of them together would be twice the model in memory."""
    import onnx_ir as ir

    def converted() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    return ir.LazyTensor(converted, dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)
