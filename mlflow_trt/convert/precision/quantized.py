"""int8 and fp8: quantize the operands of convolutions and matrix products, in the form that TensorRT fuses.

    activation → QuantizeLinear → DequantizeLinear ─┐
    quantized constant ────────── DequantizeLinear ─┴→ Conv, ConvTranspose, Gemm, MatMul → float32

Where only the weights can be quantized, the activation goes into the node as it is, which then computes in float32.

Scales are symmetric: one for an activation, from calibration, and one for each output channel of a weight. Results and
biases stay float32. Source: "Working with Quantized Types" in TensorRT's documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from mlflow_trt.convert.onnx.graph import FlatModel, outer_names
from mlflow_trt.convert.onnx.model import attribute_of, bodies_of, copy_of
from mlflow_trt.convert.onnx.weights import WeightFile
from mlflow_trt.convert.precision.ranges import Evidence
from mlflow_trt.convert.precision.report import report_of
from mlflow_trt.convert.precision.share import MOVING
from mlflow_trt.convert.precision.typed_graph import TypedGraph
from mlflow_trt.core.types import CalibrationMethod, Precision

QUANTIZABLE = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_FLOAT16_SCALES = 19
"""Since this opset, what is quantized may be float16."""
_NOTHING = f"no node is one of {', '.join(sorted(QUANTIZABLE))}, whose operands are what is quantized"
_SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)


@dataclass(frozen=True, kw_only=True)
class QuantizedFormat:
    """An 8-bit format: `largest` is the magnitude that the largest value of a tensor is scaled to."""

    precision: Precision
    name: str
    onnx_type: int
    dtype: npt.DTypeLike
    largest: float
    minimum_opset: int

    def quantize(self, scaled: npt.NDArray[np.float32]) -> npt.NDArray[np.generic]:
        clipped = np.clip(scaled, -self.largest, self.largest)
        return (np.rint(clipped) if self.onnx_type == TensorProto.INT8 else clipped).astype(self.dtype)


# Scales along an axis came with opset 13, 8-bit floats with opset 19.
INT8_FORMAT = QuantizedFormat(
    precision=Precision.INT8, name="int8", onnx_type=TensorProto.INT8, dtype=np.int8, largest=127, minimum_opset=13
)
FP8_FORMAT = QuantizedFormat(
    precision=Precision.FP8,
    name="float8e4m3fn",
    onnx_type=TensorProto.FLOAT8E4M3FN,
    dtype=ml_dtypes.float8_e4m3fn,
    largest=448,
    minimum_opset=19,
)


@dataclass(frozen=True)
class QuantizingPass:
    """Quantizes the nodes of QUANTIZABLE operators whose weight, which may come first in a product, is a constant.

    1. A node stays as it is where `kept` gives a reason, its weight is computed (as in attention), what it reads is
       neither float32 nor float16, or its weight is not finite or all 0.
    2. No more than its weight is quantized where its operator is in `weight_only`, which has reasons by operator; and
       in int8, where its activation cannot be calibrated, since it was not finite or always 0 on the samples. In fp8
       such a node stays in float32.
    3. An activation that several nodes read is quantized once.
    4. Weights get one scale for each output channel; those with more than two dimensions in a MatMul get one in all.
    """

    target: QuantizedFormat
    method: CalibrationMethod
    weight_only: Mapping[str, str] = field(default_factory=dict)

    def opsets(self, *, has_float16: bool) -> tuple[int, ...]:
        return (max(self.target.minimum_opset, _FLOAT16_SCALES) if has_float16 else self.target.minimum_opset,)

    def prepare(self, model: FlatModel, evidence: Evidence) -> Callable[[Mapping[str, str]], TypedGraph]:
        weights = _QuantizedWeights(model, self.target)
        candidates = [node for node in model.proto.graph.node if node.op_type in QUANTIZABLE and not node.domain]
        cutoffs = {**evidence.largest, **evidence.cutoffs}
        inherent: dict[str, str] = {}
        weights_alone: dict[str, str] = {}
        for node in candidates:
            reason = _reason(node, model, evidence)
            activation = node.input[1 - _weight_position(node, model)]
            partial = self.weight_only.get(node.op_type) or _uncalibrated(activation, model, evidence, self.target)
            if reason is None and partial is not None and self.target.precision is not Precision.INT8:
                reason = partial
            if reason is not None:
                inherent[node.name] = reason
            elif partial is not None:
                weights_alone[node.name] = partial

        def typed(kept: Mapping[str, str]) -> TypedGraph:
            reasons = inherent | {node.name: kept[node.name] for node in candidates if node.name in kept}
            changed = frozenset(node.name for node in candidates) - reasons.keys()
            partly = {name: reason for name, reason in weights_alone.items() if name in changed}
            proto = _Quantization(model, self.target, weights, cutoffs, changed, frozenset(partly)).run()
            report = report_of(
                model,
                proto,
                precision=self.target.precision,
                evidence=evidence,
                changed=changed - partly.keys(),
                type_name=self.target.name,
                kept=reasons,
                weight_only=partly,
                method=self.method,
                remarks=(_remark_on_weights(partly, self.target) if candidates else (_NOTHING,)),
            )
            return TypedGraph(proto=proto, emulation=proto, report=report, changed=changed)

        return typed


def is_quantized(model: ModelProto) -> bool:
    """Whether a model brings its own Q/DQ: something in it, be it in a function or in a graph inside, computes with it.

    A QuantizeLinear for an output alone, say, leaves everything else in float.
    """
    return any(_computes_quantized(body.node) for body in bodies_of(model))


def _computes_quantized(nodes: Iterable[NodeProto]) -> bool:
    listed = list(nodes)
    dequantized = {name for node in listed if node.op_type == "DequantizeLinear" for name in node.output}
    quantizes = any(node.op_type == "QuantizeLinear" for node in listed)
    return quantizes and any(
        node.op_type not in MOVING and any(node.input) and dequantized.issuperset(filter(None, node.input[:2]))
        for node in listed
    )


def _reason(node: NodeProto, model: FlatModel, evidence: Evidence) -> str | None:
    position = _weight_position(node, model)
    activation, weight = node.input[1 - position], node.input[position]
    kinds = {model.types.get(activation), model.types.get(weight)}
    if kinds not in ({TensorProto.FLOAT}, {TensorProto.FLOAT16}):
        return "it does not compute in float32 or float16"
    if weight not in model.constants:
        return f"its weight {weight} is computed, not constant"
    if activation in model.constants:
        return "both of its operands are constant"
    if evidence.not_finite.get(weight) or not evidence.largest.get(weight):
        seen = "values that are not finite" if evidence.not_finite.get(weight) else "no value but 0"
        return f"{weight} has no range: it has {seen}"
    return None


def _weight_position(node: NodeProto, model: FlatModel) -> int:
    """Which operand is the weight: the second, or the first of a product whose first one alone is constant."""
    first, second = node.input[0], node.input[1]
    is_product = node.op_type in ("MatMul", "Gemm")
    return 0 if is_product and first in model.constants and second not in model.constants else 1


def _uncalibrated(activation: str, model: FlatModel, evidence: Evidence, target: QuantizedFormat) -> str | None:
    count, largest = evidence.not_finite.get(activation, 0), evidence.largest.get(activation, 0.0)
    if count:
        return f"{activation} cannot be calibrated: {count} of the values seen are not finite"
    if not largest:
        return f"{activation} cannot be calibrated: the largest value seen is 0"
    if model.types.get(activation) == TensorProto.FLOAT16 and largest / target.largest < _SMALLEST_NORMAL:
        return f"{activation} cannot be calibrated: values of up to {largest:.4g} want a scale that float16 lacks"
    return None


def _remark_on_weights(weight_only: Mapping[str, str], target: QuantizedFormat) -> tuple[str, ...]:
    if not weight_only:
        return ()
    nodes = "1 node has" if len(weight_only) == 1 else f"{len(weight_only)} nodes have"
    reasons = "; ".join(dict.fromkeys(weight_only.values()))
    return (f"{nodes} no more than their weights in {target.name}, and compute in float32: {reasons[:500]}",)


class _Quantization:
    """One run over the graph."""

    def __init__(
        self,
        model: FlatModel,
        target: QuantizedFormat,
        weights: _QuantizedWeights,
        cutoffs: Mapping[str, float],
        changed: frozenset[str],
        weight_only: frozenset[str],
    ) -> None:
        self._model = model
        self._target = target
        self._weights = weights
        self._cutoffs = cutoffs
        self._changed = changed
        self._weight_only = weight_only
        self._taken = set(model.types) | {name for node in model.proto.graph.node for name in node.output}
        self._dequantized: dict[tuple[str, int | None], str] = {}
        self._initializers: list[TensorProto] = []

    def run(self) -> ModelProto:
        source = self._model.proto
        nodes = [made for node in source.graph.node for made in self._nodes(node)]
        quantized = ModelProto()
        quantized.CopyFrom(source)
        graph = quantized.graph
        del graph.node[:]
        graph.node.extend(nodes)
        used = {name for node in nodes for name in (*node.input, *outer_names(node))}
        used |= {value.name for value in graph.output}
        kept = [tensor for tensor in source.graph.initializer if tensor.name in used]
        del graph.initializer[:]
        graph.initializer.extend([*kept, *self._initializers])
        return quantized

    def _nodes(self, node: NodeProto) -> Iterator[NodeProto]:
        changed = copy_of(node)
        if node.name in self._changed:
            weight = _weight_position(node, self._model)
            operands = ((1 - weight, self._activation), (weight, self._weight))
            for position, make in operands[1:] if node.name in self._weight_only else operands:
                tensor = node.input[position]
                is_weight = position == weight
                axis = _channel_axis(node, position, self._model.constants[tensor].ndim) if is_weight else None
                key = (tensor, axis)
                if key not in self._dequantized:
                    self._dequantized[key] = self._name(f"{tensor}_dequantized")
                    yield from make(tensor, axis, self._dequantized[key])
                changed.input[position] = self._dequantized[key]
        yield changed

    def _activation(self, tensor: str, axis: int | None, result: str) -> Iterator[NodeProto]:
        del axis  # an activation has one scale
        scale = self._name(f"{tensor}_scale")
        scales = np.array(self._cutoffs[tensor] / self._target.largest, np.float32)
        self._initializers.append(self._weights.scales(scale, scales, self._model.types[tensor]))
        zero = self._zero(tensor, ())
        between = self._name(f"{tensor}_{self._target.name}")
        yield helper.make_node("QuantizeLinear", [tensor, scale, zero], [between], name=f"{between}_node")
        yield helper.make_node("DequantizeLinear", [between, scale, zero], [result], name=f"{result}_node")

    def _weight(self, tensor: str, axis: int | None, result: str) -> Iterator[NodeProto]:
        stored, scale = self._name(f"{tensor}_{self._target.name}"), self._name(f"{tensor}_scale")
        values, scales = self._weights.quantized(tensor, axis)
        for name, made in ((stored, values), (scale, scales)):
            named = TensorProto()
            named.CopyFrom(made)
            named.name = name
            self._initializers.append(named)
        inputs = [stored, scale, self._zero(tensor, tuple(scales.dims))]
        node = helper.make_node("DequantizeLinear", inputs, [result], name=f"{result}_node")
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        yield node

    def _zero(self, tensor: str, shape: tuple[int, ...]) -> str:
        name, zeros = self._name(f"{tensor}_zero"), np.zeros(shape, self._target.dtype)
        self._initializers.append(helper.make_tensor(name, self._target.onnx_type, shape, zeros.tobytes(), raw=True))
        return name

    def _name(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


class _QuantizedWeights:
    """The weights of a model in 8 bits, and their scales. Each is quantized once, however many graphs are made."""

    def __init__(self, model: FlatModel, target: QuantizedFormat) -> None:
        self._model = model
        self._target = target
        self._file = WeightFile(model.folder / f"{target.name}.weights")
        self._made: dict[tuple[str, int | None], tuple[TensorProto, TensorProto]] = {}

    def quantized(self, tensor: str, axis: int | None) -> tuple[TensorProto, TensorProto]:
        """Values and scales, with one scale for each index of `axis`, or one in all."""
        if (tensor, axis) not in self._made:
            self._made[tensor, axis] = self._quantize(tensor, axis)
        return self._made[tensor, axis]

    def scales(self, name: str, scales: npt.NDArray[np.float32], onnx_type: int) -> TensorProto:
        """Of the type of what is quantized: the output of DequantizeLinear has the type of its scale."""
        typed = scales.astype(helper.tensor_dtype_to_np_dtype(onnx_type))
        return helper.make_tensor(name, onnx_type, typed.shape, typed.tobytes(), raw=True)

    def _quantize(self, tensor: str, axis: int | None) -> tuple[TensorProto, TensorProto]:
        weight = self._model.constants[tensor].astype(np.float32)
        others = None if axis is None else tuple(index for index in range(weight.ndim) if index != axis)
        largest = np.abs(weight).max(axis=others)
        largest = np.where(largest == 0, np.float32(self._target.largest), largest)  # a channel of zeros
        wanted = (largest / self._target.largest).astype(np.float32)
        scales = self.scales(f"{tensor}_scale", wanted, self._model.types[tensor])
        shape = [1] * weight.ndim
        if axis is not None:
            shape[axis] = -1
        exact = numpy_helper.to_array(scales).astype(np.float32)
        exact = np.where(exact == 0, np.float32(1), exact)  # of a channel that float16 has no scale for
        values = self._target.quantize(weight / exact.reshape(shape if axis is not None else ()))
        return self._file.add(f"{tensor}_{self._target.name}", values, self._target.onnx_type), scales


def _channel_axis(node: NodeProto, position: int, dimensions: int) -> int | None:
    """The axis of a node's weight, which is its operand at `position`, along which its output channels lie."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        is_transposed = attribute_of(node, "transB" if position else "transA").i
        return position ^ bool(is_transposed)
    return position if dimensions == 2 else None
