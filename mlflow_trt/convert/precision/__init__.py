"""Precision passes: ONNX in, ONNX out, and a report of what was changed and why.

TensorRT 11 and TensorRT-RTX have only strongly typed networks, so the precision of an engine is a property of its
graph. Each family of precisions has a module with a pass; `PASSES` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from onnx import ModelProto

from mlflow_trt.convert.precision.float32 import Float32Pass
from mlflow_trt.spec import Precision, PrecisionReport


class PrecisionPass(Protocol):
    """Makes the typed model of one precision.

    Requires a model that onnx.checker accepts. Ensures that the result is one too, that the inputs and outputs keep
    their names, types and shapes, and that the model it was given is unchanged: it returns that very object where
    there is nothing to change.
    """

    def __call__(self, model: ModelProto) -> tuple[ModelProto, PrecisionReport]: ...


PASSES: Mapping[Precision, PrecisionPass] = {
    Precision.FP32: Float32Pass(Precision.FP32),
    Precision.TF32: Float32Pass(Precision.TF32),
}
