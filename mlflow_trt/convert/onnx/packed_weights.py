"""Say in operators of ONNX what ONNX Runtime's MatMulNBits says of weights that are packed into bytes.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits.
TensorRT-RTX's parser wants a plugin for it, which there is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mlflow_trt.convert.onnx.insert import constant_of, insert_constant, insert_node, label, replace

if TYPE_CHECKING:
    import onnx_ir as ir  # imported where it is used: it takes a second

PACKED = "MatMulNBits"
_BLOCKS_SINCE = 21
"""Since this opset, DequantizeLinear has int4, and a scale for each block."""
_DEFAULT_BITS = 4


@dataclass(frozen=True)
class _Weights:
    """Whole numbers, [outputs, blocks, values of a block], and a scale for each block: [outputs, blocks, 1]."""

    numbers: npt.NDArray[Any]
    scales: npt.NDArray[Any]
    length: int

    @property
    def fits_int4(self) -> bool:
        return int(self.numbers.min()) >= -8 and int(self.numbers.max()) <= 7

    @property
    def fills_blocks(self) -> bool:
        return int(self.numbers[0].size) == self.length

    def arranged(self, array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """As the second operand of a product: [inputs, outputs]."""
        return np.ascontiguousarray(array.reshape(len(array), -1).T)


def rewrite_packed(model: ir.Model) -> Iterator[str]:
    """Write each MatMulNBits, in place, as a product with weights that are dequantized, and tell of it.

    They stay in int4 where all of them fit once the zero points are taken off, and the opset has such blocks; else they
    become the numbers that they stand for. Nodes whose weights are computed or permuted stay as they are.
    """
    import onnx_ir as ir

    opset = model.opset_imports.get("", 1)
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if node.op_type != PACKED or node.domain != "com.microsoft":
            continue
        weights = _unpack(node)
        if weights is None:
            continue
        told = label(node)
        in_blocks = opset >= _BLOCKS_SINCE and weights.fits_int4 and weights.fills_blocks
        factor = _dequantized(node, weights) if in_blocks else _stored(node, weights)
        product = insert_node(node, "MatMul", [node.inputs[0], factor])
        bias = _input(node, 5)
        replace(node, product if bias is None else insert_node(node, "Add", [product, bias]))
        form = "int4 in blocks" if in_blocks else f"{weights.scales.dtype}"
        yield f"{told} is of ONNX Runtime: it is written as a MatMul, whose weights are {form}, of the same numbers"


def _dequantized(node: ir.Node, weights: _Weights) -> ir.Value:
    stored = insert_constant(node, weights.arranged(weights.numbers.astype(ml_dtypes.int4)))
    scales = insert_constant(node, weights.arranged(weights.scales))
    return insert_node(node, "DequantizeLinear", [stored, scales], axis=0, block_size=weights.numbers.shape[2])


def _stored(node: ir.Node, weights: _Weights) -> ir.Value:
    numbers = weights.arranged(weights.numbers.astype(np.float32) * weights.scales.astype(np.float32))
    return insert_constant(node, numbers[: weights.length].astype(weights.scales.dtype))


def _unpack(node: ir.Node) -> _Weights | None:
    """None where they are computed, or permuted (`g_idx`), or not as ONNX Runtime packs them."""
    packed, scales = constant_of(_input(node, 1)), constant_of(_input(node, 2))
    zeros, order = _input(node, 3), _input(node, 4)
    sizes = [_whole(node, name, 0) for name in ("N", "K", "block_size")]
    bits = _whole(node, "bits", _DEFAULT_BITS)
    if packed is None or scales is None or order is not None or not all(sizes) or 8 % bits:
        return None
    outputs, length, size = sizes
    blocks = -(-length // size)
    if packed.size * 8 != outputs * blocks * size * bits or scales.size != outputs * blocks:
        return None
    middle = np.array(1 << (bits - 1), np.int16)
    if zeros is not None:
        stored = constant_of(zeros)
        if stored is None or stored.dtype != np.uint8 or stored.size % outputs:
            return None
        middle = _unpacked(stored.reshape(outputs, -1), bits)[:, :blocks, None].astype(np.int16)
    numbers = _unpacked(packed.reshape(outputs, blocks, -1), bits).astype(np.int16)
    return _Weights(numbers - middle, scales.reshape(outputs, blocks, 1), length)


def _whole(node: ir.Node, name: str, usual: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else usual


def _unpacked(array: npt.NDArray[np.generic], bits: int) -> npt.NDArray[np.uint8]:
    """The numbers of so many bits in bytes along the last axis, the lowest bits first."""
    parts = [(array.astype(np.uint8) >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(*array.shape[:-1], -1)


def _input(node: ir.Node, position: int) -> ir.Value | None:
    return node.inputs[position] if position < len(node.inputs) else None
