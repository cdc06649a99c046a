"""int8 and fp8: quantize the operands of convolutions and matrix products, in the form that TensorRT fuses.

    activation → QuantizeLinear → DequantizeLinear ─┐
    quantized constant ────────── DequantizeLinear ─┴→ Conv, ConvTranspose, Gemm, MatMul → float32

Where only the weights can be quantized, the activation goes into the node as it is, which then computes in float32.

Scales are symmetric: one for an activation, from calibration, and one for each output channel of a weight. Results and
biases stay float32. Source: "Working with Quantized Types" in TensorRT's documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from mlflow_trt.convert.onnx.graph import FlatModel, copy_of, outer_names
from mlflow_trt.convert.onnx.model import attribute_of
from mlflow_trt.convert.precision.ranges import Evidence
from mlflow_trt.convert.precision.report import report_of
from mlflow_trt.convert.precision.typed_graph import TypedGraph
from mlflow_trt.core.types import CalibrationMethod, Precision

QUANTIZABLE = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


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
    """Quantizes the nodes of QUANTIZABLE operators whose weight is a constant.

    1. A node stays in float32 where `kept` gives a reason, its weight is computed (as in attention), what it reads is
       not float32, or its weight is not finite or all 0.
    2. No more than its weight is quantized where its operator is in `weight_only`, which has reasons by operator; and
       in int8, where its activation cannot be calibrated, since it was not finite or always 0 on the samples. In fp8
       such a node stays in float32.
    3. An activation that several nodes read is quantized once.
    4. Weights get one scale for each output channel; those with more than two dimensions in a MatMul get one in all.
    """

    target: QuantizedFormat
    method: CalibrationMethod
    weight_only: Mapping[str, str] = field(default_factory=dict)

    @property
    def minimum_opset(self) -> int:
        return self.target.minimum_opset

    def on(self, model: FlatModel, evidence: Evidence) -> Callable[[Mapping[str, str]], TypedGraph]:
        constants = model.constants
        candidates = [node for node in model.proto.graph.node if node.op_type in QUANTIZABLE and not node.domain]
        cutoffs = {**evidence.largest, **evidence.cutoffs}
        inherent: dict[str, str] = {}
        weights_alone: dict[str, str] = {}
        for node in candidates:
            reason = _reason(node, model, constants, evidence.largest)
            partial = self.weight_only.get(node.op_type) or _uncalibrated(node.input[0], evidence.largest)
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
            proto = _Quantization(model, self.target, constants, cutoffs, changed, frozenset(partly)).run()
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
                remarks=_about_weights(partly, self.target),
            )
            return TypedGraph(proto=proto, emulation=proto, report=report, changed=changed)

        return typed


def is_quantized(model: ModelProto) -> bool:
    """Whether a model brings its own Q/DQ."""
    return any(node.op_type == "QuantizeLinear" for node in model.graph.node)


def _reason(
    node: NodeProto, model: FlatModel, constants: Mapping[str, npt.NDArray[np.generic]], largest: Mapping[str, float]
) -> str | None:
    activation, weight = node.input[0], node.input[1]
    if not model.is_float32(activation) or not model.is_float32(weight):
        return "it does not compute in float32"
    if activation in constants or weight not in constants:
        return f"its weight {weight} is computed, not constant"
    if not _has_range(weight, largest):
        return f"{weight} has no range: its largest value is {largest.get(weight, 0.0):g}"
    return None


def _uncalibrated(activation: str, largest: Mapping[str, float]) -> str | None:
    if _has_range(activation, largest):
        return None
    return f"{activation} cannot be calibrated: the largest value seen is {largest.get(activation, 0.0):g}"


def _has_range(tensor: str, largest: Mapping[str, float]) -> bool:
    return 0 < largest.get(tensor, 0.0) < float("inf")


def _about_weights(weight_only: Mapping[str, str], target: QuantizedFormat) -> tuple[str, ...]:
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
        constants: Mapping[str, npt.NDArray[np.generic]],
        cutoffs: Mapping[str, float],
        changed: frozenset[str],
        weight_only: frozenset[str],
    ) -> None:
        self._model = model
        self._target = target
        self._constants = constants
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
            operands = ((0, self._activation), (1, self._weight))
            for position, make in operands[1:] if node.name in self._weight_only else operands:
                tensor = node.input[position]
                axis = _channel_axis(node, self._constants[tensor].ndim) if position else None
                key = (tensor, axis)
                if key not in self._dequantized:
                    self._dequantized[key] = self._name(f"{tensor}_dequantized")
                    yield from make(tensor, axis, self._dequantized[key])
                changed.input[position] = self._dequantized[key]
        yield changed

    def _activation(self, tensor: str, axis: int | None, result: str) -> Iterator[NodeProto]:
        del axis  # an activation has one scale
        scale = self._scale(tensor, np.array(self._cutoffs[tensor] / self._target.largest, np.float32))
        zero = self._zero(tensor, ())
        between = self._name(f"{tensor}_{self._target.name}")
        yield helper.make_node("QuantizeLinear", [tensor, scale, zero], [between], name=f"{between}_node")
        yield helper.make_node("DequantizeLinear", [between, scale, zero], [result], name=f"{result}_node")

    def _weight(self, tensor: str, axis: int | None, result: str) -> Iterator[NodeProto]:
        weight = self._constants[tensor].astype(np.float32)
        others = None if axis is None else tuple(index for index in range(weight.ndim) if index != axis)
        largest = np.abs(weight).max(axis=others)
        largest = np.where(largest == 0, np.float32(self._target.largest), largest)  # a channel of zeros
        scales = (largest / self._target.largest).astype(np.float32)
        shape = [1] * weight.ndim
        if axis is not None:
            shape[axis] = -1
        values = self._target.quantize(weight / scales.reshape(shape if axis is not None else ()))
        stored = self._store(self._name(f"{tensor}_{self._target.name}"), values)
        inputs = [stored, self._scale(tensor, scales), self._zero(tensor, scales.shape)]
        node = helper.make_node("DequantizeLinear", inputs, [result], name=f"{result}_node")
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        yield node

    def _scale(self, tensor: str, scales: npt.NDArray[np.float32]) -> str:
        name = self._name(f"{tensor}_scale")
        self._initializers.append(numpy_helper.from_array(scales, name))
        return name

    def _zero(self, tensor: str, shape: tuple[int, ...]) -> str:
        return self._store(self._name(f"{tensor}_zero"), np.zeros(shape, self._target.dtype))

    def _store(self, name: str, values: npt.NDArray[np.generic]) -> str:
        self._initializers.append(
            helper.make_tensor(name, self._target.onnx_type, values.shape, values.tobytes(), raw=True)
        )
        return name

    def _name(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def _channel_axis(node: NodeProto, dimensions: int) -> int | None:
    """The axis of a node's weight along which its output channels lie."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if attribute_of(node, "transB").i else 1
    return 1 if dimensions == 2 else None
