"""Which nodes must stay in float32 when a graph is retyped to 16 bits, from what was seen and what operators do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto

from mlflow_trt.convert.onnx.graph import FlatModel, allows, schema_of
from mlflow_trt.convert.onnx.model import subgraphs_of
from mlflow_trt.convert.onnx.weights import SETTING
from mlflow_trt.convert.precision.ranges import Evidence
from mlflow_trt.convert.samples import Samples
from mlflow_trt.core.arrays import Array
from mlflow_trt.core.types import Precision

_HEADROOM = 4
"""How many times as large as on the samples a value may become elsewhere."""
_HEADROOM_OF_NOISE = 16

_ROUNDING_MARGIN = 8
"""How many times the usual rounding error the norm of a constant may change by."""

_ANGLE_ERROR = 0.01
"""In radians: what rounding the argument of a sine may cost."""

_SQUARING = frozenset(
    {
        "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LpNormalization", "LpPool",
        "MeanVarianceNormalization", "ReduceL2", "ReduceSumSquare", "RMSNormalization",
    }
)  # fmt: skip
"""Operators that sum squares on the way: their inputs must be well below the root of the largest number."""

_PERIODIC = frozenset({"Sin", "Cos", "Tan"})

_MISREAD = frozenset({"Mean"})
"""Operators of which TensorRT's parser makes a product with a float32 constant that it then reads as 16 bits.

Measured with 1.6.1 and 1.7.1 of TensorRT-RTX: the mean of any number of tensors becomes their sum times 0, or so.
"""


@dataclass(frozen=True, kw_only=True)
class HalfFormat:
    """A 16-bit floating point format. `opsets` are those whose operators have it, the best first."""

    precision: Precision
    name: str
    onnx_type: int
    dtype: npt.DTypeLike
    opsets: tuple[int, ...]

    @property
    def type_name(self) -> str:
        """As schemas write it."""
        return f"tensor({self.name})"

    @property
    def largest(self) -> float:
        return float(ml_dtypes.finfo(self.dtype).max)  # type: ignore[no-untyped-call]  # ships no types

    @property
    def epsilon(self) -> float:
        """The largest relative error of rounding."""
        return float(ml_dtypes.finfo(self.dtype).eps) / 2  # type: ignore[no-untyped-call]  # ships no types

    def distinguishes(self, array: Array) -> bool:
        """Whether values that differ still do when they are rounded."""
        with np.errstate(over="ignore"):
            return len(np.unique(array)) == len(np.unique(array.astype(self.dtype).astype(np.float32)))


FLOAT16 = HalfFormat(
    precision=Precision.FP16, name="float16", onnx_type=TensorProto.FLOAT16, dtype=np.float16, opsets=(0,)
)
# Schemas allow bfloat16 from opset 13 on, for convolutions and pooling from 22 on.
BFLOAT16 = HalfFormat(
    precision=Precision.BF16,
    name="bfloat16",
    onnx_type=TensorProto.BFLOAT16,
    dtype=ml_dtypes.bfloat16,
    opsets=(22, 13),
)


def headroom_of(samples: Samples) -> int:
    """How many times what was seen on these samples must fit."""
    return _HEADROOM if samples.is_evidence else _HEADROOM_OF_NOISE


class Sensitivity:
    """Finds the reason, if any, for which a node stays in float32. The first that applies counts.

    1. Its operator has no such type, or is unknown to onnx, or has graphs inside, or TensorRT's parser misreads it; or
       it reads or writes something that is no tensor.
    2. It reads or writes values that would overflow, with some room for what the samples did not show.
    3. It reads a constant that would overflow or vanish (an epsilon that becomes 0 divides by 0), or weights that are
       so small that rounding changes them by much more than usual.
    4. It sums squares, which would overflow.
    5. It computes with positions or sizes, and rounding would make different ones equal.
    6. It takes the sine of an angle whose rounding would be seen.
    """

    def __init__(self, model: FlatModel, evidence: Evidence, target: HalfFormat) -> None:
        self._model = model
        self._evidence = evidence
        self._format = target
        self._constants = model.constants
        self._headroom = headroom_of(evidence.samples)
        self._limit = target.largest / self._headroom
        self._blurred = {name for name, array in evidence.positions.items() if not target.distinguishes(array)}

    def reason(self, node: NodeProto) -> str | None:
        """Why this node, which reads or writes float32, stays as it is; None where nothing speaks for it."""
        return next(self._reasons(node), None)

    def _reasons(self, node: NodeProto) -> Iterator[str]:
        yield from self._type_reasons(node)
        for tensor in (*node.input, *node.output):
            if self._model.is_float32(tensor):
                yield from self._tensor_reasons(tensor)
        yield from self._operator_reasons(node)

    def _type_reasons(self, node: NodeProto) -> Iterator[str]:
        if any(True for _ in subgraphs_of([node])):
            yield "it has graphs inside"
        if node.op_type in _MISREAD:
            yield f"TensorRT's parser misreads a constant of {node.op_type} in {self._format.name}"
        unknown = [name for name in (*node.input, *node.output) if name and name not in self._model.types]
        schema = schema_of(node, self._model.opset)
        if schema is None:
            yield "onnx does not know its operator"
        elif unknown:
            yield f"{unknown[0]} is no tensor, or its type is not known"
        elif not any(
            allows(schema, position, output=output, type_name=self._format.type_name)
            for output, tensors in ((False, node.input), (True, node.output))
            for position, tensor in enumerate(tensors)
            if self._model.is_float32(tensor)
        ):
            yield f"its operator has no {self._format.name}"

    def _tensor_reasons(self, tensor: str) -> Iterator[str]:
        name, ends = self._format.name, self._format.largest
        if tensor in self._constants:
            yield from self._constant_reasons(tensor)
        elif self._seen(tensor) > self._limit:
            room = f"{self._headroom} times what was seen must fit"
            yield f"{tensor} reached {self._seen(tensor):.4g}, and {name} ends at {ends:.4g}; {room}"
        elif count := self._evidence.not_finite.get(tensor):
            yield f"{tensor} had {count} values on the samples that are not finite, so its range is not known"
        if tensor in self._blurred:
            yield f"{tensor} is computed from positions or sizes, of which {name} makes different ones equal"

    def _operator_reasons(self, node: NodeProto) -> Iterator[str]:
        name = self._format.name
        data = [tensor for tensor in node.input if self._model.is_float32(tensor) and tensor not in self._constants]
        largest = max(map(self._seen, data), default=0.0)
        if node.op_type in _SQUARING and largest**2 > self._limit:
            yield f"it squares values of up to {largest:.4g}, and {name} ends at {self._format.largest:.4g}"
        error = largest * self._format.epsilon
        if node.op_type in _PERIODIC and error > _ANGLE_ERROR:
            yield f"it takes angles of up to {largest:.4g}, which {name} rounds by {error:.2g}"

    def _seen(self, tensor: str) -> float:
        return self._evidence.largest.get(tensor, 0.0)

    def _constant_reasons(self, tensor: str) -> Iterator[str]:
        array = self._constants[tensor]
        largest = self._seen(tensor)
        if largest > self._format.largest:
            beyond = array[np.isfinite(array) & (np.abs(array) == largest)][0]
            yield f"the constant {tensor} has {beyond:.4g}, and {self._format.name} ends at {self._format.largest:.4g}"
        with np.errstate(over="ignore"):
            rounded = array.astype(self._format.dtype).astype(np.float32)
        vanishing = array[(array != 0) & (rounded == 0)]
        if vanishing.size and array.size <= SETTING:
            yield f"the constant {tensor} has {vanishing[0]:.4g}, which becomes 0 in {self._format.name}"
        if array.size <= SETTING:
            return
        finite = np.isfinite(array) & np.isfinite(rounded)
        norm = float(np.linalg.norm(array[finite]))
        error = float(np.linalg.norm(rounded[finite] - array[finite])) / norm if norm else 0.0
        if error > _ROUNDING_MARGIN * self._format.epsilon:
            yield f"the constant {tensor}, {largest:.4g} at most, changes by {error:.1%} in {self._format.name}"
