"""Small changes to a graph of onnx-ir: constants and nodes put in before a node, or in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx_ir as ir  # imported where it is used: it takes a second


def label(node: ir.Node) -> str:
    """A node as messages call it: its name and its operator."""
    return f"{node.name or 'unnamed'} ({node.op_type})"


def constant_of(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    """The numbers of an initializer, also through Identity and Cast; None for what is computed, or comes in."""
    import onnx_ir as ir

    if value is None or value.is_graph_input():
        return None
    producer = value.producer()
    if producer is not None and producer.op_type in ("Identity", "Cast") and not producer.domain:
        numbers = constant_of(producer.inputs[0])
        if numbers is None or producer.op_type == "Identity":
            return numbers
        return numbers.astype(ir.DataType(producer.attributes["to"].as_int()).numpy())
    return None if value.const_value is None else value.const_value.numpy()


def insert_constant(node: ir.Node, values: npt.ArrayLike) -> ir.Value:
    """An initializer in the graph of `node`."""
    import onnx_ir as ir

    graph = node.graph
    if not isinstance(graph, ir.Graph):
        raise TypeError(f"{label(node)} is in no graph; inline functions first")
    base = f"{node.outputs[0].name}_constant"
    number = 0
    while f"{base}_{number}" in graph.initializers:
        number += 1
    tensor = ir.tensor(np.asarray(values), name=f"{base}_{number}")
    value = ir.Value(
        name=tensor.name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def insert_node(node: ir.Node, operator: str, inputs: Sequence[ir.Value | None], **attributes: float) -> ir.Value:
    """The only output of a new node before `node`. Names that are taken already are put right by NameFixPass."""
    import onnx_ir as ir

    added = ir.node(operator, inputs, attributes, name=f"{node.name}_{operator}")
    added.outputs[0].name = f"{node.outputs[0].name}_{operator}"
    node.prepend(added)
    return added.outputs[0]


def replace(node: ir.Node, value: ir.Value) -> None:
    """Let `value` stand for the only output of `node`, and remove the node. Outputs of the graph keep their names."""
    import onnx_ir as ir

    before = node.outputs[0]
    if before.is_graph_output():
        if value.producer() is None or value.is_graph_output():
            value = insert_node(node, "Identity", [value])
        value.type = before.type or value.type
        value.shape = before.shape or value.shape
        name = before.name
        before.name = None
        value.name = name
    ir.convenience.replace_all_uses_with(before, value, replace_graph_outputs=True)
    remove(node)


def remove(node: ir.Node) -> None:
    if node.graph is not None:
        node.graph.remove(node, safe=True)
