"""Compute what follows from constants alone, so that passes see the weights that a node really reads."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnx.reference import ReferenceEvaluator

from mlflow_trt.convert.onnx.model import copy_of
from mlflow_trt.convert.onnx.scales import dequantize
from mlflow_trt.convert.onnx.weights import WeightFile, read_weights

_FOLDED = frozenset(
    """Abs Add Cast Concat ConstantOfShape Div Exp Expand Flatten Gather Identity MatMul Mul Neg Pow Reciprocal ReduceL2
    ReduceMean ReduceSum ReduceSumSquare Reshape Slice Split Sqrt Squeeze Sub Tile Transpose
    Unsqueeze""".split()  # noqa: SIM905  # easier to read than a list of quotes
)
"""Operators that exporters leave between a weight and the node that reads it: what they could not fold, the norms of
weights, low-rank additions."""
_SUMMING = frozenset({"MatMul", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare"})
"""Sums of float16 are made in float32, as ONNX Runtime does: on the way to a norm or a mean they may be too large."""
_TYPES: frozenset[int] = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL}
)
_QUANTIZED: frozenset[int] = frozenset(
    {
        TensorProto.INT4, TensorProto.INT8, TensorProto.INT16, TensorProto.UINT4, TensorProto.UINT8,
        TensorProto.UINT16, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2,
    }
)  # fmt: skip
_DEQUANTIZING = ("", "com.microsoft")
"""Domains that have DequantizeLinear: ONNX Runtime's quantizer takes its own for 4 bits, up to opset 20."""
_GROWTH = 4
"""Up to how many times as large as what it is computed from a result may be: broadcasting can make a lot."""


def fold_constants(
    model: ModelProto, folder: Path, weights: WeightFile, *, keep: Collection[str], with_dequantized: bool
) -> frozenset[str]:
    """Replace nodes by the constants that they compute, in place; return the names of these nodes.

    DequantizeLinear is one of these nodes only where `with_dequantized`: what it stands for is quantized weights.

    Graphs inside of nodes see the same tensors under the same names. Nodes of a name in `keep`, and what is an output
    of the model, stay.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    folded: dict[str, NodeProto] = {}
    for node in graph.node:
        names = [name for name in node.input if name]
        is_quantized = with_dequantized and node.op_type == "DequantizeLinear" and node.domain in _DEQUANTIZING
        types = _TYPES | _QUANTIZED if is_quantized else _TYPES
        is_wanted = (
            (is_quantized or (node.op_type in _FOLDED and not node.domain))
            and names
            and all(name in constants and constants[name].data_type in types for name in names)
            and not outputs.intersection(node.output)
            and not {node.name, node.op_type}.intersection(keep)
        )
        if is_wanted and (results := _compute(node, model, {name: constants[name] for name in names}, folder)):
            for name, result in zip(node.output, results, strict=True):
                constants[name] = weights.add(name, result, helper.np_dtype_to_tensor_dtype(result.dtype))
                graph.initializer.append(constants[name])
            folded[node.name] = node
    if folded:
        gone = {name for node in folded.values() for name in node.output}
        nodes = [copy_of(node) for node in graph.node if node.name not in folded]
        values = [value for value in graph.value_info if value.name not in gone]
        del graph.node[:]
        graph.node.extend(nodes)
        known = [ValueInfoProto.FromString(value.SerializeToString()) for value in values]
        del graph.value_info[:]
        graph.value_info.extend(known)
    return frozenset(folded)


def _compute(
    node: NodeProto, model: ModelProto, tensors: dict[str, TensorProto], folder: Path
) -> list[npt.NDArray[np.generic]] | None:
    feeds = {name: read_weights(tensor, folder) for name, tensor in tensors.items()}
    if node.op_type == "DequantizeLinear":
        return _dequantize(node, feeds)
    size, kind = sum(array.nbytes for array in feeds.values()), _result_type(node, tensors)
    if node.op_type in _SUMMING:
        halves = {name for name, array in feeds.items() if array.dtype == np.float16}
        feeds = {name: array.astype(np.float32) if name in halves else array for name, array in feeds.items()}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
    graph = helper.make_graph([node], "one", inputs, outputs)
    single = helper.make_model(graph, opset_imports=list(model.opset_import))
    try:
        with np.errstate(all="ignore"):
            results = [np.asarray(result).astype(kind) for result in ReferenceEvaluator(single).run(None, feeds)]
    except Exception:  # noqa: BLE001  # whatever keeps it from computing: the node stays, and computes at run time
        return None
    supported = all(helper.np_dtype_to_tensor_dtype(result.dtype) in _TYPES for result in results)
    return results if supported and sum(result.nbytes for result in results) <= _GROWTH * max(size, 1024) else None


def _result_type(node: NodeProto, tensors: dict[str, TensorProto]) -> npt.DTypeLike:
    """That of its first operand, but for the two operators that name another one."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "Cast":
        return helper.tensor_dtype_to_np_dtype(attributes["to"].i)
    if node.op_type == "ConstantOfShape":
        value = attributes.get("value")
        return helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT if value is None else value.t.data_type)
    return helper.tensor_dtype_to_np_dtype(tensors[node.input[0]].data_type)


def _dequantize(node: NodeProto, feeds: dict[str, npt.NDArray[np.generic]]) -> list[npt.NDArray[np.generic]] | None:
    """Onnx's reference has no DequantizeLinear of the opsets before 19, in which most models bring it."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    stored, scale = feeds[node.input[0]], feeds[node.input[1]]
    zero = feeds[node.input[2]] if any(node.input[2:]) else None
    kind = attributes.get("output_dtype") or helper.np_dtype_to_tensor_dtype(scale.dtype)
    if kind not in _TYPES:
        return None
    numbers = dequantize(stored, scale, zero, axis=attributes.get("axis", 1), block=attributes.get("block_size", 0))
    return [numbers.astype(helper.tensor_dtype_to_np_dtype(kind))]
