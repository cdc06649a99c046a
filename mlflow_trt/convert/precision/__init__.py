"""Precision passes: ONNX in, ONNX out, and a report of what was changed and why.

TensorRT 11 and TensorRT-RTX have only strongly typed networks, so the precision of an engine is a property of its
graph. Each family of precisions has a module with a pass; `pass_for` chooses one. fp32 and tf32 need none: the graph
stays as it is, and the two differ by a flag of the builder.
"""

from __future__ import annotations

from collections.abc import Mapping

from mlflow_trt.convert.precision.half import HalfPass
from mlflow_trt.convert.precision.quantized import FP8_FORMAT, INT8_FORMAT, QuantizingPass
from mlflow_trt.convert.precision.sensitivity import BFLOAT16, FLOAT16
from mlflow_trt.convert.precision.typed_graph import PrecisionPass
from mlflow_trt.core.types import CalibrationMethod, Precision


def pass_for(
    precision: Precision, method: CalibrationMethod, weight_only: Mapping[str, str] | None = None
) -> PrecisionPass | None:
    """The pass of a precision, or None for those that leave the graph alone.

    `weight_only` has operators of which no more than the weights can be quantized, with the reason for each.
    """
    halves = {Precision.FP16: FLOAT16, Precision.BF16: BFLOAT16}
    quantized = {Precision.INT8: INT8_FORMAT, Precision.FP8: FP8_FORMAT}
    if precision in halves:
        return HalfPass(halves[precision])
    if precision in quantized:
        return QuantizingPass(quantized[precision], method, weight_only or {})
    return None
