"""What precision passes know of a graph: one flat list of named nodes, the type of every tensor, the schema of every
operator.

Source of the types that an operator takes: its schema, which the onnx package has for every version of every operator,
https://github.com/onnx/onnx/blob/main/docs/Operators.md.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner
import onnx.shape_inference
import onnx.version_converter
from google.protobuf.message import EncodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from mlflow_trt.convert.onnx.model import subgraphs_of

_LARGEST_FILE = 1_500_000_000
"""In bytes. Beyond 2 GB protobuf writes nothing, so weights go to a file of their own well before."""

SETTING = 8
"""Constants of up to so many values are settings of a node, such as an epsilon, rather than weights."""


@dataclass(frozen=True, kw_only=True)
class FlatModel:
    """A model as passes take it, and what is known of its tensors.

    Its functions are inlined, every node has a name of its own, constants of the graph are initializers, weights are in
    it, and initializers are no inputs. Graphs inside of nodes are left as they are.

    `types` maps tensors to ONNX's numbers of their element types, and `shapes` to their dimensions as far as known;
    what could not be inferred is missing.
    """

    proto: ModelProto
    types: Mapping[str, int]
    shapes: Mapping[str, tuple[int | None, ...]]

    @property
    def opset(self) -> int:
        return opset_of(self.proto)

    def is_float32(self, tensor: str) -> bool:
        return self.types.get(tensor) == TensorProto.FLOAT

    @functools.cached_property
    def constants(self) -> Mapping[str, npt.NDArray[np.generic]]:
        """The initializers that are float32, by name; read once, since every typed graph asks for them."""
        return {
            tensor.name: numpy_helper.to_array(tensor)
            for tensor in self.proto.graph.initializer
            if tensor.data_type == TensorProto.FLOAT
        }


def flatten(model: ModelProto, folder: Path, minimum_opset: int = 0) -> FlatModel:
    """Make a FlatModel of a copy of `model`, whose external weights are in `folder`.

    An opset below `minimum_opset` is raised to it where onnx can convert the model; where it cannot, it stays.
    """
    flat = ModelProto()
    flat.CopyFrom(model)
    if flat.functions:
        flat = onnx.inliner.inline_local_functions(flat)
    _drop_initializers_from_inputs(flat)
    if opset_of(flat) < minimum_opset:
        flat = _raise_opset(flat, minimum_opset)
    _name_nodes(flat.graph)
    _hoist_constants(flat.graph)
    types, shapes = _infer(flat)
    onnx.load_external_data_for_model(flat, str(folder))
    return FlatModel(proto=flat, types=types, shapes=shapes)


def save(model: ModelProto, path: Path) -> None:
    """Write a model that has its weights in it, as one file, or beside a file of its weights where it is too large."""
    weights = path.with_name(f"{path.name}.data")
    weights.unlink(missing_ok=True)  # of a model that was here before: onnx would write behind what is in it
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size <= _LARGEST_FILE:
        onnx.save_model(model, path)
        return
    copy = ModelProto()
    copy.CopyFrom(model)  # saving moves the weights out of the model it is given
    onnx.save_model(copy, path, save_as_external_data=True, location=weights.name)


def opset_of(model: ModelProto) -> int:
    """The version of ONNX's own operators that a model uses."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)


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


def _drop_initializers_from_inputs(model: ModelProto) -> None:
    """Before IR version 4, initializers had to be inputs too."""
    names = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in names]
    if len(inputs) != len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        model.ir_version = max(model.ir_version, 4)


def _raise_opset(model: ModelProto, opset: int) -> ModelProto:
    try:
        raised = onnx.version_converter.convert_version(model, opset)
        onnx.checker.check_model(raised)
    except (RuntimeError, ValueError, EncodeError, onnx.checker.ValidationError):
        return model
    # onnx takes the batch axis off a model with Scan of opset 8.
    return raised if _interface(raised) == _interface(model) else model


def _interface(model: ModelProto) -> list[tuple[str, onnx.TypeProto]]:
    return [(value.name, value.type) for value in (*model.graph.input, *model.graph.output)]


def _name_nodes(graph: GraphProto) -> None:
    taken: set[str] = set()
    for node in graph.node:
        base = node.name or node.op_type
        candidates = itertools.chain([base] if node.name else [], (f"{base}_{number}" for number in itertools.count()))
        node.name = next(name for name in candidates if name not in taken)
        taken.add(node.name)


def _hoist_constants(graph: GraphProto) -> None:
    nodes = []
    for node in graph.node:
        tensor = _constant_tensor(node) if node.op_type == "Constant" and not node.domain else None
        if tensor is None:
            nodes.append(node)
        else:
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
    if len(nodes) != len(graph.node):
        kept = [copy_of(node) for node in nodes]
        del graph.node[:]
        graph.node.extend(kept)


def label_of(node: NodeProto) -> str:
    """A node as messages call it: its name and its operator."""
    return f"{node.name or 'unnamed'} ({node.op_type})"


def copy_of(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def _constant_tensor(node: NodeProto) -> TensorProto | None:
    attribute = node.attribute[0]
    if attribute.name == "value":
        tensor = TensorProto()
        tensor.CopyFrom(attribute.t)
        return tensor
    numeric = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if attribute.name not in numeric:
        return None  # strings and sparse tensors
    return numpy_helper.from_array(np.array(onnx.helper.get_attribute_value(attribute), numeric[attribute.name]))


def _infer(model: ModelProto) -> tuple[dict[str, int], dict[str, tuple[int | None, ...]]]:
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, EncodeError, ValueError):
        inferred = model
    graph = inferred.graph
    types, shapes = {}, {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.type.HasField("tensor_type"):
            tensor = value.type.tensor_type
            types[value.name] = tensor.elem_type
            if tensor.HasField("shape"):
                shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    for constant in graph.initializer:
        types[constant.name] = constant.data_type
        shapes[constant.name] = tuple(constant.dims)
    return types, shapes


_INTEGERS = frozenset({TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8, TensorProto.INT8})


def positions_of(model: FlatModel) -> tuple[str, ...]:
    """The float32 tensors that were computed from integers alone: positions, lengths, masks, indices."""
    constants = {tensor.name for tensor in model.proto.graph.initializer}
    tables = {name for name, array in model.constants.items() if array.size > SETTING}
    counted = {name for name, kind in model.types.items() if kind in _INTEGERS and name not in constants}
    found: dict[str, None] = {}
    for node in model.proto.graph.node:
        variable = [name for name in node.input if name and name not in constants]
        from_counts = any(name in counted or name in found for name in variable)
        has_data = any(model.is_float32(name) and name not in found for name in variable)
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
