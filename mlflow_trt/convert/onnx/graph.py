"""What precision passes know of a graph: one flat list of named nodes, the type of every tensor, the schema of every
operator.

Source of the types that an operator takes: its schema, which the onnx package has for every version of every operator,
https://github.com/onnx/onnx/blob/main/docs/Operators.md.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from mlflow_trt.convert.onnx.fold import fold_constants
from mlflow_trt.convert.onnx.infer import infer_types
from mlflow_trt.convert.onnx.model import subgraphs_of
from mlflow_trt.convert.onnx.opset import opset_of, raise_opset
from mlflow_trt.convert.onnx.rewrite import (
    RewrittenModel,
    fix_names,
    infer_shapes,
    inline_functions,
    lift_constants,
    open_ir,
    remove_unused_nodes,
)
from mlflow_trt.convert.onnx.weights import SETTING, WeightFile, detach_weights, read_weights
from mlflow_trt.convert.onnx.widen import widen_float16


@dataclass(frozen=True, kw_only=True)
class FlatModel:
    """A model as passes take it, and what is known of its tensors.

    Its functions are inlined, every node has a name of its own, constants of the graph are initializers, what can be
    computed from constants alone is one, and initializers are no inputs. Graphs inside of nodes are left as they are.
    Its weights are in files of `folder`, so that a copy of `proto` is small.

    `types` maps tensors to ONNX's numbers of their element types, and `shapes` to their dimensions as far as known;
    what could not be inferred is missing. `folded` are the nodes that constants stand for now.
    """

    proto: ModelProto
    folder: Path
    types: Mapping[str, int]
    shapes: Mapping[str, tuple[int | None, ...]]
    folded: frozenset[str] = frozenset()

    @property
    def opset(self) -> int:
        return opset_of(self.proto)

    def is_float32(self, tensor: str) -> bool:
        return self.types.get(tensor) == TensorProto.FLOAT

    @functools.cached_property
    def constants(self) -> Mapping[str, npt.NDArray[np.generic]]:
        """The initializers that are floats, by name; what lies in files is mapped into memory."""
        return {
            tensor.name: read_weights(tensor, self.folder)
            for tensor in self.proto.graph.initializer
            if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)
        }


def flatten(
    model: RewrittenModel,
    workdir: Path,
    opset: int = 0,
    *,
    keep: Collection[str] = (),
    widen: bool = False,
    folds_dequantized: bool = False,
) -> FlatModel:
    """Make a FlatModel of a copy of `model`, with its weights in `workdir`, in this opset where it is an older one.

    Nodes and operators that `keep` names are not folded. With `widen`, what is float16 becomes float32, but for inputs
    and outputs. With `folds_dequantized`, weights that come quantized become the numbers that they stand for.

    Raises OpsetNotRaisedError.
    """
    copy = open_ir(model.proto, model.folder)
    inline_functions(copy)
    if widen:
        infer_shapes(copy)
        widen_float16(copy)
    lift_constants(copy)
    remove_unused_nodes(copy)
    fix_names(copy)
    flat = detach_weights(copy, workdir, f"flat_{opset}.weights")
    flat = raise_opset(flat, opset, workdir)
    name_nodes(flat.graph)
    folded = fold_constants(
        flat, workdir, WeightFile(workdir / f"folded_{opset}.weights"), keep=keep, with_dequantized=folds_dequantized
    )
    types, shapes = infer_types(flat, workdir)
    return FlatModel(proto=flat, folder=workdir, types=types, shapes=shapes, folded=folded)


def schema_of(node: NodeProto, opset: int) -> onnx.defs.OpSchema | None:
    """The schema of a node's operator, or None for one that onnx does not know."""
    if node.domain not in ("", "ai.onnx"):
        return None
    try:
        return onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


def allows(schema: onnx.defs.OpSchema, position: int, *, output: bool, type_name: str) -> bool:
    """Whether an operator's input or output may be of the type that ONNX writes as `tensor(float16)`, for example."""
    formal = schema.outputs if output else schema.inputs
    if not formal:
        return False
    parameter = formal[min(position, len(formal) - 1)]  # the last one may be variadic
    return type_name in parameter.types


def outer_names(node: NodeProto) -> set[str]:
    """The tensors that graphs inside of a node take from around it."""
    return {name for graph in subgraphs_of([node]) for name in _free_names(graph)}


def _free_names(graph: GraphProto) -> set[str]:
    bound = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    bound |= {name for node in graph.node for name in node.output}
    used = {name for node in graph.node for name in (*node.input, *outer_names(node))}
    used |= {value.name for value in graph.output}
    return used - bound - {""}


def name_nodes(graph: GraphProto) -> None:
    """Give every node a name of its own: onnx's converter adds some without one."""
    taken: set[str] = set()
    for node in graph.node:
        base = node.name or node.op_type
        candidates = itertools.chain([base] if node.name else [], (f"{base}_{number}" for number in itertools.count()))
        node.name = next(name for name in candidates if name not in taken)
        taken.add(node.name)


def label_of(node: NodeProto) -> str:
    """A node as messages call it: its name and its operator."""
    return f"{node.name or 'unnamed'} ({node.op_type})"


_COUNTS = frozenset({TensorProto.INT32, TensorProto.INT64})
_BYTES = frozenset({TensorProto.UINT8, TensorProto.INT8})
_CARRYING = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def positions_of(model: FlatModel) -> tuple[str, ...]:
    """The float32 tensors that were computed from integers alone: positions, lengths, masks, indices.

    Bytes are none of these: they are images, or quantized values.
    """
    constants = {tensor.name for tensor in model.proto.graph.initializer}
    tables = {name for name, array in model.constants.items() if array.size > SETTING}
    data = {name for name, kind in model.types.items() if kind in _BYTES}
    for node in model.proto.graph.node:
        if node.op_type in _CARRYING and node.input[0] in data and model.types.get(node.output[0]) in _COUNTS:
            data.update(node.output)
    counted = {name for name, kind in model.types.items() if kind in _COUNTS} - constants - data
    found: dict[str, None] = {}
    for node in model.proto.graph.node:
        variable = [name for name in node.input if name and name not in constants]
        from_counts = any(name in counted or name in found for name in variable)
        has_data = any(name in data or (model.is_float32(name) and name not in found) for name in variable)
        has_data |= any(name in tables for name in node.input)
        if from_counts and not has_data:
            found.update(dict.fromkeys(name for name in node.output if model.is_float32(name)))
    return tuple(found)


def producers_of(model: FlatModel) -> dict[str, NodeProto]:
    """For every computed tensor the node that computes it."""
    return {name: node for node in model.proto.graph.node for name in node.output if name}


def consumers_of(model: FlatModel) -> dict[str, list[NodeProto]]:
    """For every tensor the nodes that read it."""
    consumers: dict[str, list[NodeProto]] = {}
    for node in model.proto.graph.node:
        for name in filter(None, node.input):
            consumers.setdefault(name, []).append(node)
    return consumers
