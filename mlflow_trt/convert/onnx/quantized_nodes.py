"""Say in int8 and float32 what a model says in other ways around its QuantizeLinear and DequantizeLinear nodes.

TensorRT's parser reads uint8 as int8, so that everything above 127 is cut off; it has no zero points but 0, no 16 bits
in Q/DQ, and no DequantizeLinear of int32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mlflow_trt.convert.onnx.insert import constant_of, insert_constant, insert_node, label, remove, replace
from mlflow_trt.convert.onnx.scales import spread
from mlflow_trt.errors import UnsupportedModelError

if TYPE_CHECKING:
    import onnx_ir as ir  # imported where it is used: it takes a second

_DOMAINS = ("", "ai.onnx", "com.microsoft")
"""TensorRT's parser reads operators of com.microsoft as those of ONNX."""
_ROUND_SINCE = 11
_AXIS_SINCE, _HALF_SINCE, _NARROW_SINCE = 13, 19, 21
"""Opsets since which ONNX's Q/DQ have an axis, scales in float16, and 4 and 16 bits and blocks."""
_MIDDLE = 128
"""The zero point of uint8 that becomes 0 in int8, which is the only one that TensorRT has."""


def is_quantizing(node: ir.Node) -> bool:
    return node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.domain in _DOMAINS


def rewrite_quantized(model: ir.Model) -> Iterator[str]:
    """Take uint8, 16 bits, int32 and zero points out of Q/DQ, in place, and tell of what this was done.

    1. A constant that is quantized to uint8, or dequantized from it, becomes int8 where all its values fit once the
       zero point is taken off, and float elsewhere; one that is dequantized from int32 becomes float.
    2. A pair of uint8 with the zero point 128 becomes one of int8 with the zero point 0, and computes exactly the same.
    3. A pair of uint8 or int8 with another zero point, or of 16 bits, is written as the float arithmetic by which ONNX
       defines it, which gives the same numbers; what reads it computes in float.
    4. What is left of com.microsoft becomes ONNX's own, where that has it in the model's opset, so that passes and onnx
       know it.

    Raises UnsupportedModelError for a node of which none of this can be done.
    """
    import onnx_ir as ir

    nodes = [node for node in ir.traversal.RecursiveGraphIterator(model.graph) if is_quantizing(node)]
    opset = model.opset_imports.get("", 1)
    gone: set[ir.Node] = set()
    for node in nodes:
        if node.op_type != "QuantizeLinear" or not _is_foreign(node, _quantized_type(node)):
            continue
        folded = constant_of(node.inputs[0])
        if folded is not None and not node.outputs[0].is_graph_output():
            _store_quantized(node, folded)
            gone.add(node)
            continue
        told, removed = _rewrite_pair(node, opset)
        gone |= removed
        yield told
    for node in nodes:
        if node.op_type != "DequantizeLinear" or node in gone:
            continue
        kind = node.inputs[0].dtype if node.inputs[0] is not None else None
        if kind == ir.DataType.INT32:
            yield _rewrite_int32_reader(node)
        elif _is_foreign(node, kind):
            yield _rewrite_reader(node)
    renamed = [node for node in nodes if node not in gone and _is_in_onnx_too(node, opset)]
    for node in renamed:
        node.domain = ""
    if renamed:
        yield f"{label(renamed[0])} and its like are of com.microsoft: they are written as those of ONNX, the same"


def _is_in_onnx_too(node: ir.Node, opset: int) -> bool:
    """Whether it is of com.microsoft, and ONNX has the same in this opset."""
    import onnx_ir as ir

    scale = constant_of(node.inputs[1])
    if node.domain != "com.microsoft" or node.graph is None or scale is None:
        return False
    is_usual = _stored_type(node) in (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32)
    if not is_usual or "block_size" in node.attributes:
        return opset >= _NARROW_SINCE
    return opset >= (_HALF_SINCE if scale.dtype == np.float16 else _AXIS_SINCE)


def _is_foreign(node: ir.Node, kind: ir.DataType | None) -> bool:
    """Whether TensorRT misreads or refuses what it quantizes to, or dequantizes from."""
    import onnx_ir as ir

    if kind in (ir.DataType.UINT4, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16):
        return True
    if kind == ir.DataType.INT4 and node.op_type == "QuantizeLinear":
        return True
    zero = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
    return kind in (ir.DataType.INT4, ir.DataType.INT8) and zero is not None and bool(zero.any())


def _store_quantized(node: ir.Node, values: npt.NDArray[np.generic]) -> None:
    """Store what a QuantizeLinear makes of a constant."""
    form = _ScaleAndZeroPoint.of(node)
    scaled = np.rint(values.astype(np.float32) / form.spread(form.scale, values.shape))
    quantized = np.clip(scaled + form.spread(form.zero, values.shape), *form.limits)
    replace(node, insert_constant(node, quantized.astype(form.zero.dtype)))


def _rewrite_pair(node: ir.Node, opset: int) -> tuple[str, set[ir.Node]]:
    result = node.outputs[0]
    readers = [use.node for use in result.uses()]
    for reader in readers:
        if not (is_quantizing(reader) and reader.op_type == "DequantizeLinear"):
            _refuse(node, f"{label(reader)} reads what it quantizes, and TensorRT computes nothing in uint8")
    forms = [_ScaleAndZeroPoint.of(one) for one in (node, *readers)]
    if not result.is_graph_output() and all(form.is_centered for form in forms):
        for one, form in zip((node, *readers), forms, strict=True):
            _write_around_zero(one, form, np.int8)
        return (
            f"{label(node)} quantizes to uint8 around 128: it is written as int8 around 0, the same",
            set(),
        )
    if opset < _ROUND_SINCE:
        _refuse(node, f"opset {opset}, which this model uses, has no Round to write it as float arithmetic")
    value = _emulate_quantizing(node, forms[0])
    for reader, form in zip(readers, forms[1:], strict=True):
        replace(reader, _emulate_dequantizing(reader, form, value))
    if result.is_graph_output():
        replace(node, insert_node(node, "Cast", [value], to=_quantized_type(node).value))
    else:
        remove(node)
    told = (
        f"{label(node)} quantizes to {forms[0].zero.dtype} with {_lacking(forms[0])} that TensorRT does not have: it "
        "is written as float arithmetic, which gives the same numbers, and what reads it computes in float"
    )
    return told, {node, *readers}


def _lacking(form: _ScaleAndZeroPoint) -> str:
    bits = {"int4": 4, "uint4": 4, "int16": 16, "uint16": 16}.get(form.zero.dtype.name)
    return "a zero point" if bits is None else f"{bits} bits"


def _rewrite_reader(node: ir.Node) -> str:
    form, stored = _ScaleAndZeroPoint.of(node), constant_of(node.inputs[0])
    if stored is None:
        value = insert_node(node, "Cast", [node.inputs[0]], to=1)
        replace(node, _emulate_dequantizing(node, form, value))
        return f"{label(node)} dequantizes what is not constant: it is written as float arithmetic, the same"
    shifted = stored.astype(np.int32) - form.spread(form.zero, stored.shape).astype(np.int32)
    narrow = ml_dtypes.int4 if form.zero.dtype in (ml_dtypes.int4, ml_dtypes.uint4) else np.int8
    for dtype in dict.fromkeys((narrow, np.int8)):
        low, high = _ends_of(dtype)
        if shifted.min(initial=0) >= low and shifted.max(initial=0) <= high:
            node.replace_input_with(0, insert_constant(node, shifted.astype(dtype)))
            _write_around_zero(node, form, dtype)
            name = np.dtype(dtype).name
            return f"{label(node)} dequantizes constants with a zero point: they are stored as {name} with 0, the same"
    _store_numbers(node, form, shifted)
    return (
        f"{label(node)} dequantizes constants that do not fit in int8 with the zero point 0, the only one that "
        "TensorRT has: they are stored as the numbers that they stand for"
    )


def _rewrite_int32_reader(node: ir.Node) -> str:
    """ONNX Runtime's quantizer stores the biases of convolutions and matrix products like that."""
    form, stored = _ScaleAndZeroPoint.of(node), constant_of(node.inputs[0])
    if stored is None:
        value = insert_node(node, "Cast", [node.inputs[0]], to=1)
        replace(node, _emulate_dequantizing(node, form, value))
        return f"{label(node)} dequantizes int32 that is not constant: it is written as float arithmetic"
    _store_numbers(node, form, stored - form.spread(form.zero, stored.shape).astype(np.int64))
    return f"{label(node)} dequantizes a constant of int32: it is stored as the numbers that it stands for"


def _emulate_quantizing(node: ir.Node, form: _ScaleAndZeroPoint) -> ir.Value:
    """Round(x / scale) + zero, cut off at the ends of the type, in float32."""
    value = node.inputs[0]
    if form.scale.dtype != np.float32:
        value = insert_node(node, "Cast", [value], to=1)
    value = insert_node(node, "Div", [value, insert_constant(node, form.spread(form.scale))])
    value = insert_node(node, "Round", [value])
    value = insert_node(node, "Add", [value, insert_constant(node, form.spread(form.zero))])
    low, high = form.limits
    value = insert_node(node, "Max", [value, insert_constant(node, np.float32(low))])
    return insert_node(node, "Min", [value, insert_constant(node, np.float32(high))])


def _emulate_dequantizing(node: ir.Node, form: _ScaleAndZeroPoint, value: ir.Value) -> ir.Value:
    """(value - zero) * scale, of integers that are held in float32."""
    import onnx_ir as ir

    if form.zero.any():
        value = insert_node(node, "Sub", [value, insert_constant(node, form.spread(form.zero))])
    value = insert_node(node, "Mul", [value, insert_constant(node, form.spread(form.scale))])
    kind = _dequantized_type(node)
    return value if kind == ir.DataType.FLOAT else insert_node(node, "Cast", [value], to=kind.value)


def _store_numbers(node: ir.Node, form: _ScaleAndZeroPoint, integers: npt.NDArray[np.generic]) -> None:
    numbers = integers.astype(np.float64) * form.spread(form.scale, integers.shape).astype(np.float64)
    replace(node, insert_constant(node, numbers.astype(_dequantized_type(node).numpy())))


def _write_around_zero(node: ir.Node, form: _ScaleAndZeroPoint, dtype: npt.DTypeLike) -> None:
    import onnx_ir as ir

    if node.op_type == "QuantizeLinear":
        node.attributes.pop("output_dtype", None)
        node.outputs[0].type = ir.TensorType(ir.DataType.INT8)
    node.resize_inputs(3)
    node.replace_input_with(2, insert_constant(node, np.zeros(form.scale.shape, dtype)))


def _stored_type(node: ir.Node) -> ir.DataType:
    """The type on the quantized side of a node."""
    import onnx_ir as ir

    if node.op_type == "QuantizeLinear":
        return _quantized_type(node)
    kind = node.inputs[0].dtype if node.inputs[0] is not None else None
    return kind or ir.DataType.UINT8


def _quantized_type(node: ir.Node) -> ir.DataType:
    import onnx_ir as ir

    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is not None and zero.dtype is not None:
        return zero.dtype
    named = node.attributes.get("output_dtype")
    return ir.DataType(named.as_int()) if named is not None and named.as_int() else ir.DataType.UINT8


def _dequantized_type(node: ir.Node) -> ir.DataType:
    import onnx_ir as ir

    named = node.attributes.get("output_dtype")
    if named is not None and named.as_int():
        return ir.DataType(named.as_int())
    scale = node.inputs[1]
    return scale.dtype if scale is not None and scale.dtype is not None else ir.DataType.FLOAT


def _ends_of(dtype: npt.DTypeLike) -> tuple[int, int]:
    ends = ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call]  # ships no types; numpy's does not know 4 bits
    return int(ends.min), int(ends.max)


@dataclass(frozen=True, kw_only=True)
class _ScaleAndZeroPoint:
    """Scale and zero point of a node: scalars, one value for each index of `axis`, or one for each block along it."""

    node: ir.Node
    scale: npt.NDArray[np.generic]
    zero: npt.NDArray[np.generic]
    axis: int
    block: int

    @classmethod
    def of(cls, node: ir.Node) -> _ScaleAndZeroPoint:
        """Raises UnsupportedModelError where one of them is computed."""
        given = node.inputs[2] if len(node.inputs) > 2 else None
        scale = constant_of(node.inputs[1])
        zero = np.zeros((), _stored_type(node).numpy()) if given is None else constant_of(given)
        if scale is None or zero is None:
            _refuse(node, "its scale or its zero point is computed, and not a constant")
        axis, block = node.attributes.get("axis"), node.attributes.get("block_size")
        return cls(
            node=node,
            scale=scale,
            zero=zero,
            axis=axis.as_int() if axis is not None else 1,
            block=block.as_int() if block is not None else 0,
        )

    @property
    def limits(self) -> tuple[int, int]:
        return _ends_of(self.zero.dtype)

    @property
    def is_centered(self) -> bool:
        """Whether it is the same as int8 with the zero point 0."""
        middle = {"int8": 0, "uint8": _MIDDLE}.get(self.zero.dtype.name)
        return middle is not None and bool((self.zero == middle).all())

    def spread(self, values: npt.NDArray[np.generic], shape: tuple[int, ...] | None = None) -> npt.NDArray[np.float32]:
        """In float32, and in a shape that broadcasts with the node's input, whose shape may be given.

        Raises UnsupportedModelError where that shape is needed and not known.
        """
        if values.size == 1:
            return spread(values, (), 0, 0)
        known = self.node.inputs[0].shape if self.node.inputs[0] is not None else None
        if shape is None and (self.block or known is None):
            _refuse(self.node, "it has a scale for each channel or block, and the shape of its input is not known")
        return spread(values, shape if shape is not None else (1,) * len(known or ()), self.axis, self.block)


def _refuse(node: ir.Node, why: str) -> NoReturn:
    raise UnsupportedModelError(
        f"TensorRT has no uint8 and no zero point but 0 for {label(node)}, of which it would cut off everything above "
        f"127, and it cannot be written in another way: {why}. Quantize the model to int8 with zero points of 0",
        nodes=[label(node)],
    )
