"""Session on ONNX Runtime's CPU provider: the reference, and the explicit alternative where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mlflow_trt.errors import RuntimeUnavailableError, SessionClosedError
from mlflow_trt.inputs import Feeds
from mlflow_trt.onnx_runtime import CpuModel
from mlflow_trt.runtime.session import Session
from mlflow_trt.spec import TensorSpec


class OnnxRuntimeSession(Session):
    """Runs an ONNX file on the CPU."""

    runtime: ClassVar[str] = "onnxruntime"

    def __init__(self, model: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        super().__init__()
        self.inputs = inputs
        self.outputs = outputs
        for spec in (*inputs, *outputs):
            if spec.dtype == "bfloat16":
                raise RuntimeUnavailableError(
                    f"ONNX Runtime cannot exchange bfloat16 arrays with Python, which {spec.name!r} needs; "
                    "use runtime='tensorrt', or export the model with float32 inputs and outputs"
                )
        self._model: CpuModel | None = CpuModel(model)
        self._version = self._model.version

    @property
    def description(self) -> str:
        return f"ONNX Runtime {self._version} on the CPU"

    def _run(self, feeds: Feeds) -> dict[str, npt.NDArray[np.generic]]:
        model = self._model
        if model is None:  # closed by another thread since run() looked
            raise SessionClosedError
        return model.run([spec.name for spec in self.outputs], feeds)

    def _release(self) -> None:
        self._model = None
