"""Session on ONNX Runtime: the reference on the CPU, the explicit alternative to a GPU, and what to compare with."""

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
    """Runs an ONNX file on the CPU.

    With `prefer_cuda` it runs on the GPU where ONNX Runtime's CUDA provider is installed and works; `device` says.
    """

    runtime: ClassVar[str] = "onnxruntime"

    def __init__(
        self,
        model: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        prefer_cuda: bool = False,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.outputs = outputs
        for spec in (*inputs, *outputs):
            if spec.dtype == "bfloat16":
                raise RuntimeUnavailableError(
                    f"ONNX Runtime cannot exchange bfloat16 arrays with Python, which {spec.name!r} needs; "
                    "use runtime='tensorrt', or export the model with float32 inputs and outputs"
                )
        self._model: CpuModel | None = CpuModel(model, prefer_cuda=prefer_cuda)
        self._version = self._model.version
        self.device = self._model.device

    @property
    def description(self) -> str:
        return f"ONNX Runtime {self._version} on {'CUDA' if self.device == 'CUDA' else 'the CPU'}"

    def _run(self, feeds: Feeds) -> dict[str, npt.NDArray[np.generic]]:
        model = self._model
        if model is None:  # closed by another thread since run() looked
            raise SessionClosedError
        return model.run([spec.name for spec in self.outputs], feeds)

    def _release(self) -> None:
        self._model = None
