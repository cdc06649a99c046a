"""Cast bytes before they are moved: TensorRT takes a uint8 input only where a Cast comes next."""

from __future__ import annotations

from onnx import ModelProto, NodeProto, TensorProto, helper

from mlflow_trt.convert.onnx.model import attribute_of, copy_of

_MOVES = frozenset(
    {
        "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape",
        "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Operators that move the values of their first input, and compute none: a Cast may come before or after them."""

_HOLD_EVERY_BYTE = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32)


def cast_bytes_first(model: ModelProto) -> ModelProto:
    """Return `model`, or a copy in which uint8 inputs are cast where they come in, and moved afterwards.

    1. The values of the input reach nothing but casts, through operators that only move values.
    2. It is cast to what all of these casts make of it, where that holds every byte, else to int32.
    3. Casts of what is wider now stay: they make the same of it.
    """
    inputs = [value.name for value in model.graph.input if value.type.tensor_type.elem_type == TensorProto.UINT8]
    found = {name: kinds for name in inputs if (kinds := _find_casts(model, name))}
    if not found:
        return model
    changed = ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    nodes: list[NodeProto] = []
    for name, kinds in found.items():
        wide = f"{name}_cast"
        while wide in taken:
            wide += "_"
        only = next(iter(kinds)) if len(kinds) == 1 else TensorProto.INT32
        kind = only if only in _HOLD_EVERY_BYTE else TensorProto.INT32
        nodes.append(helper.make_node("Cast", [name], [wide], name=wide, to=kind))
        for node in graph.node:
            for position, read in enumerate(node.input):
                if read == name:
                    node.input[position] = wide
    moved = _move_casts(model, found)
    kept = [value for value in graph.value_info if value.name not in moved]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    nodes.extend(copy_of(node) for node in graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
    return changed


def _find_casts(model: ModelProto, name: str) -> set[int]:
    """What the casts behind an input make of it; empty where there is something else, or nothing to be moved."""
    graph = model.graph
    outputs = {value.name for value in graph.output}
    tensors, kinds, moves = [name], set(), 0
    for tensor in tensors:  # which grows
        if tensor in outputs:
            return set()
        for node in graph.node:
            if tensor not in node.input:
                if any(attribute.HasField("g") for attribute in node.attribute):
                    return set()  # graphs inside may read it
                continue
            if node.op_type == "Cast" and not node.domain:
                kinds.add(attribute_of(node, "to").i)
            elif node.op_type in _MOVES and not node.domain and _is_data_only(node, tensor):
                moves += 1
                tensors.extend(output for output in node.output if output not in tensors)
            else:
                return set()
    return kinds if moves else set()


def _is_data_only(node: NodeProto, tensor: str) -> bool:
    """Whether a node that moves values takes this tensor as its data, and no other data beside it."""
    if node.op_type == "Concat":
        return len(set(node.input)) == 1
    return node.input[0] == tensor and tensor not in list(node.input)[1:]


def _move_casts(model: ModelProto, names: dict[str, set[int]]) -> set[str]:
    """Tensors of which the type changes."""
    moved = set(names)
    for node in model.graph.node:
        if node.op_type in _MOVES and node.input and node.input[0] in moved:
            moved.update(node.output)
    return moved - set(names)
