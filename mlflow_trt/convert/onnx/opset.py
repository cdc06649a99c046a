"""Raise the opset of a model: the precisions need types that older operators do not have."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.version_converter
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, helper

from mlflow_trt.convert.onnx.model import attribute_of, copy_of, graphs_below

_RESIZE_WITH_MODES = 11
"""Since this opset, Resize has a mode for its coordinates, and its default is not what it did before."""
_PER_AXIS = 13
"""Since this opset, Hardmax looks along one axis; before, along all axes from this one on."""


class OpsetNotRaisedError(Exception):
    """Why onnx cannot raise the opset of a model; its text begins in lower case."""


def opset_of(model: ModelProto) -> int:
    """The version of ONNX's own operators that a model uses."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)


def raise_opset(model: ModelProto, opset: int, workdir: Path) -> ModelProto:
    """The model in this opset. Its weights stay where they are, relative to `workdir`.

    1. Where onnx's converter is known to change what an operator computes, the operator is rewritten first, or
       afterwards: Resize and Upsample of opset 10 and earlier, Hardmax of opset 12 and earlier.
    2. onnx.checker has to accept the result, and inputs and outputs keep their names, types and ranks.

    Raises OpsetNotRaisedError. What the result computes is for the caller to compare.
    """
    before = opset_of(model)
    if before >= opset:
        return model
    copy = ModelProto()
    copy.CopyFrom(model)
    if before < _PER_AXIS <= opset:
        for graph in _graphs_of(copy)[::-1]:  # those inside first: nodes are copied with the graphs in them
            _flatten_hardmax(graph)
    if before < _RESIZE_WITH_MODES <= opset:
        copy = _convert(copy, _RESIZE_WITH_MODES)
        _name_resize_modes(copy)
    raised = _convert(copy, opset)
    path = workdir / "raised.onnx"
    onnx.save_model(raised, path)
    try:
        onnx.checker.check_model(str(path))  # by its path: its weights lie beside it
    except onnx.checker.ValidationError as error:
        raise OpsetNotRaisedError(f"onnx raises it to an invalid model: {_first_line(error)}") from error
    _check_interface(model, raised)
    return raised


def _convert(model: ModelProto, opset: int) -> ModelProto:
    try:
        return onnx.version_converter.convert_version(model, opset)
    except Exception as error:  # the converter's own share no base class with others
        raise OpsetNotRaisedError(f"onnx's converter fails: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _check_interface(before: ModelProto, after: ModelProto) -> None:
    """Sizes may become known on the way; names, types and ranks stay."""
    old = [(value.name, value.type) for value in (*before.graph.input, *before.graph.output)]
    new = [(value.name, value.type) for value in (*after.graph.input, *after.graph.output)]
    if len(old) != len(new):
        raise OpsetNotRaisedError("onnx's converter changes its inputs and outputs")
    for (name, was), (name_after, becomes) in zip(old, new, strict=True):
        if name != name_after or not _is_same(was.tensor_type, becomes.tensor_type):
            # onnx takes the batch axis off a model with Scan of opset 8.
            raise OpsetNotRaisedError(f"onnx's converter changes the type or the shape of {name!r}")


def _is_same(before: TypeProto.Tensor, after: TypeProto.Tensor) -> bool:
    ranked = before.HasField("shape") and after.HasField("shape")
    return before.elem_type == after.elem_type and (not ranked or len(before.shape.dim) == len(after.shape.dim))


def _graphs_of(model: ModelProto) -> list[GraphProto]:
    """The graph, and those inside of its nodes."""
    return [model.graph, *graphs_below(model.graph.node)]


def _name_resize_modes(model: ModelProto) -> None:
    """Before opset 11, Resize divided coordinates by the scale, and rounded down where it enlarges."""
    graphs = _graphs_of(model)
    constants = {tensor.name: tensor for graph in graphs for tensor in graph.initializer}
    nodes = [node for graph in graphs for node in graph.node]
    constants |= {node.output[0]: attribute_of(node, "value").t for node in nodes if node.op_type == "Constant"}
    for node in nodes:
        if node.op_type != "Resize" or node.domain or attribute_of(node, "coordinate_transformation_mode").s:
            continue
        node.attribute.append(helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
        if attribute_of(node, "mode").s in (b"", b"nearest"):
            scales = constants.get(node.input[2]) if len(node.input) > 2 else None
            node.attribute.append(helper.make_attribute("nearest_mode", "ceil" if _shrinks(scales) else "floor"))


def _shrinks(scales: TensorProto | None) -> bool:
    return scales is not None and bool((onnx.numpy_helper.to_array(scales) < 1).any())


def _flatten_hardmax(graph: GraphProto) -> None:
    """Make all axes from `axis` on one, as Hardmax did before opset 13, and give the result its shape back."""
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type != "Hardmax" or node.domain:
            nodes.append(node)
            continue
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        source, result = node.input[0], node.output[0]
        flat, hard, shape = (f"{result}_{part}" for part in ("flat", "flat_hardmax", "shape"))
        name = node.name or f"Hardmax_of_{source}"
        nodes += [
            helper.make_node("Shape", [source], [shape], name=f"{name}_shape"),
            helper.make_node("Flatten", [source], [flat], name=f"{name}_flat", axis=axis),
            helper.make_node("Hardmax", [flat], [hard], name=name, axis=1),
            helper.make_node("Reshape", [hard, shape], [result], name=f"{name}_reshape"),
        ]
    kept = [copy_of(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
