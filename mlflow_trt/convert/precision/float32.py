"""fp32 and tf32: the graph stays as it is; the two differ by a flag of the builder."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import ModelProto

from mlflow_trt.spec import Precision, PrecisionReport


@dataclass(frozen=True)
class Float32Pass:
    """Leaves the graph alone: whatever types it has, the strongly typed network has too."""

    precision: Precision

    def __call__(self, model: ModelProto) -> tuple[ModelProto, PrecisionReport]:
        return model, PrecisionReport(precision=self.precision, nodes=len(model.graph.node))
