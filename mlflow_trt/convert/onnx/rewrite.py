"""Say what a model says in other words, where TensorRT's parser misreads or refuses it as it stands.

The precision does not matter here: this is done for all of them, and the numbers stay the same, but for those of
float64, which become float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from onnx import AttributeProto, ModelProto, TensorProto, numpy_helper

from mlflow_trt.convert.onnx.insert import insert_constant, insert_node, label, replace
from mlflow_trt.convert.onnx.model import bodies_of, graphs_below, is_operator_name
from mlflow_trt.convert.onnx.narrow import has_float64, narrow_float64
from mlflow_trt.convert.onnx.packed_weights import PACKED, rewrite_packed
from mlflow_trt.convert.onnx.quantized_nodes import rewrite_quantized
from mlflow_trt.convert.onnx.weights import detach_weights

if TYPE_CHECKING:
    import onnx_ir as ir  # imported where it is used: it takes a second

_INITIALIZERS_ALONE = 4
"""Since this version of the IR, an initializer need not be an input, too; onnx's converter counts on it before."""
_GROUPS_BY_CHANNEL = 21
"""Since this opset, GroupNormalization has a scale for each channel; before, for each group."""
_LOOKED_AT = frozenset({"QuantizeLinear", "DequantizeLinear", "Loop", "GroupNormalization", PACKED})
_NARROWED = (
    "the model computes with float64, which TensorRT has not: the engine does it with float32; runtime='onnxruntime' "
    "computes it as it is"
)


@dataclass(frozen=True, kw_only=True)
class RewrittenModel:
    """A model in words that TensorRT understands. Its weights are in it, or in files of `folder`.

    `remarks` tells what was rewritten; where there is none, it is the model that was given. With `is_narrowed`, it has
    float32 where that one has float64, in its inputs and outputs, too.
    """

    proto: ModelProto
    folder: Path
    remarks: tuple[str, ...] = ()
    is_narrowed: bool = False


def rewrite(model: ModelProto, folder: Path, workdir: Path) -> RewrittenModel:
    """Rewrite what needs it in a copy of `model`, whose external weights are in `folder`; a copy's are in `workdir`.

    1. Sparse initializers become dense.
    2. Functions are inlined where they hold what the following rules look at, since TensorRT gives their tensors the
       same names at every call; and where one has the name of an operator, which TensorRT would take it for.
    3. float64 becomes float32.
    4. uint8 and int32 around Q/DQ: see `quantized_nodes`.
    5. A Loop without a condition gets one that is always true.
    6. GroupNormalization of opset 18 to 20 becomes an InstanceNormalization of its groups.
    7. MatMulNBits of ONNX Runtime becomes a MatMul: see `packed_weights`.

    Raises UnsupportedModelError for uint8 that can be said in no other way, and for float64 beyond float32.
    """
    sparse = has_sparse_tensors(model)
    misnamed = any(is_operator_name(function.name) for function in model.functions)
    is_looked_at = any(node.op_type in _LOOKED_AT for body in bodies_of(model) for node in body.node)
    narrows = has_float64(model)
    if not (sparse or misnamed or is_looked_at or narrows):
        return RewrittenModel(proto=model, folder=folder)
    remarks = ["sparse initializers are stored as dense ones"] if sparse else []
    copy = open_ir(make_dense(model) if sparse else model, folder)
    in_functions = any(node.op_type in _LOOKED_AT for function in model.functions for node in function.node)
    if misnamed or in_functions or (narrows and model.functions):
        inline_functions(copy)
        remarks.append("functions of the model are written out where they are called")
    lift_constants(copy)
    if narrows:
        narrow_float64(copy)
        remarks.append(_NARROWED)
    infer_shapes(copy)
    remarks += [
        *rewrite_packed(copy),
        *rewrite_quantized(copy),
        *_close_loops(copy),
        *_rewrite_group_normalizations(copy),
    ]
    if not remarks:
        return RewrittenModel(proto=model, folder=folder)
    remove_unused_nodes(copy)
    fix_names(copy)
    return RewrittenModel(
        proto=detach_weights(copy, workdir, "rewritten.weights"),
        folder=workdir,
        remarks=tuple(remarks),
        is_narrowed=narrows,
    )


def open_ir(model: ModelProto, folder: Path) -> ir.Model:
    """A copy that onnx-ir's passes change in place; the weights stay where they are until they are read.

    Nodes without a name get one by their operator.
    """
    import onnx_ir as ir
    import onnx_ir.passes.common  # used as ir.passes.common

    opened = ir.from_proto(model)
    taken = {node.name for node in model.graph.node if node.name}
    counts: dict[str, int] = {}
    for node, original in zip(opened.graph, model.graph.node, strict=True):
        if original.name:
            continue
        number = counts.get(node.op_type, 0)
        while f"{node.op_type}_{number}" in taken:
            number += 1
        counts[node.op_type] = number + 1
        node.name = f"{node.op_type}_{number}"
    ir.external_data.set_base_dir(opened.graph, folder)
    for function in opened.functions.values():
        for node in function.all_nodes():
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    attribute.value.base_dir = folder
    return opened


def inline_functions(model: ir.Model) -> None:
    import onnx_ir.passes.common as passes

    passes.InlinePass()(model)


def lift_constants(model: ir.Model) -> None:
    """Make initializers of constants, and no inputs of initializers."""
    import onnx_ir.passes.common as passes

    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.RemoveInitializersFromInputsPass()(model)
    model.ir_version = max(model.ir_version, _INITIALIZERS_ALONE)


def remove_unused_nodes(model: ir.Model) -> None:
    import onnx_ir.passes.common as passes

    passes.RemoveUnusedNodesPass()(model)


def infer_shapes(model: ir.Model) -> None:
    import onnx_ir.passes.common as passes

    passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)


def fix_names(model: ir.Model) -> None:
    import onnx_ir.passes.common as passes

    passes.NameFixPass()(model)


def has_sparse_tensors(model: ModelProto) -> bool:
    graphs = (model.graph, *graphs_below(model.graph.node))
    return any(graph.sparse_initializer for graph in graphs) or any(
        attribute.type == AttributeProto.SPARSE_TENSOR
        for body in bodies_of(model)
        for node in body.node
        for attribute in node.attribute
    )


def make_dense(model: ModelProto) -> ModelProto:
    """A copy without sparse tensors, which neither onnx-ir nor TensorRT reads."""
    dense = ModelProto()
    dense.CopyFrom(model)
    for graph in (dense.graph, *graphs_below(dense.graph.node)):
        for sparse in graph.sparse_initializer:
            graph.initializer.append(_dense_tensor(sparse.values, sparse.indices, sparse.dims, sparse.values.name))
        del graph.sparse_initializer[:]
    for body in bodies_of(dense):
        for node in body.node:
            for attribute in node.attribute:
                if attribute.type == AttributeProto.SPARSE_TENSOR:
                    sparse = attribute.sparse_tensor
                    tensor = _dense_tensor(sparse.values, sparse.indices, sparse.dims, "")
                    attribute.Clear()
                    attribute.name, attribute.type = "value", AttributeProto.TENSOR
                    attribute.t.CopyFrom(tensor)
    return dense


def _dense_tensor(values: TensorProto, indices: TensorProto, dims: Iterable[int], name: str) -> TensorProto:
    shape = tuple(dims)
    numbers, places = numpy_helper.to_array(values), numpy_helper.to_array(indices)
    dense = np.zeros(shape, numbers.dtype)
    flat = places if places.ndim == 1 else np.ravel_multi_index(tuple(places.T), shape)
    dense.reshape(-1)[flat] = numbers
    tensor = numpy_helper.from_array(dense, name)
    tensor.data_type = values.data_type
    return tensor


def _close_loops(model: ir.Model) -> Iterator[str]:
    import onnx_ir as ir

    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == "Loop" and not node.domain and (len(node.inputs) < 2 or node.inputs[1] is None):
            node.resize_inputs(max(2, len(node.inputs)))
            node.replace_input_with(1, insert_constant(node, np.array(True)))
            yield f"{label(node)} has no condition: it gets one that is always true"


def _rewrite_group_normalizations(model: ir.Model) -> Iterator[str]:
    """X → Reshape(x, [0, groups, -1]) → InstanceNormalization, whose scale is one for each group → Reshape back."""
    import onnx_ir as ir

    if model.opset_imports.get("", 1) >= _GROUPS_BY_CHANNEL:
        return
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if node.op_type != "GroupNormalization" or node.domain:
            continue
        groups = node.attributes["num_groups"].as_int()
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        shape = insert_node(node, "Shape", [node.inputs[0]])
        grouped = insert_node(node, "Reshape", [node.inputs[0], insert_constant(node, np.array([0, groups, -1]))])
        normal = insert_node(node, "InstanceNormalization", [grouped, *node.inputs[1:]], epsilon=epsilon)
        told = label(node)
        replace(node, insert_node(node, "Reshape", [normal, shape]))
        yield f"{told} is of an opset before 21: it is written as an InstanceNormalization of its groups, the same"
