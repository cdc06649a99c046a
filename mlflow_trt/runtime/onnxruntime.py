"""Session on ONNX Runtime: the reference on the CPU, the explicit alternative to a GPU, and what to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from mlflow_trt.errors import (
    ExecutionError,
    InputError,
    MissingDependencyError,
    RuntimeUnavailableError,
    SessionClosedError,
)
from mlflow_trt.runtime.inputs import Feeds
from mlflow_trt.runtime.session import Session
from mlflow_trt.spec import TensorSpec
from mlflow_trt.trt import is_installed


def import_onnxruntime() -> Any:
    """The module, which has no type stubs. Raises MissingDependencyError where no package provides it."""
    if not is_installed("onnxruntime"):
        raise MissingDependencyError(
            "ONNX Runtime is not installed: `pip install onnxruntime`, or `pip install onnxruntime-gpu`. "
            "Install one of them, not both: they provide the same module.",
            packages=("onnxruntime", "onnxruntime-gpu"),
        )
    import onnxruntime

    return onnxruntime


class OnnxRuntimeSession(Session):
    """Runs an ONNX file on the CPU, whatever other providers the installed ONNX Runtime has.

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
        onnxruntime = import_onnxruntime()
        self._version: str = onnxruntime.__version__
        for spec in (*inputs, *outputs):
            if spec.dtype == "bfloat16":
                raise RuntimeUnavailableError(
                    f"ONNX Runtime cannot exchange bfloat16 arrays with Python, which {spec.name!r} needs; "
                    "use runtime='tensorrt', or export the model with float32 inputs and outputs"
                )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        wanted = ["CUDAExecutionProvider"] if prefer_cuda else []
        available = [name for name in wanted if name in onnxruntime.get_available_providers()]
        try:
            self._session = onnxruntime.InferenceSession(
                str(model), options, providers=[*available, "CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions share no base class
            raise ExecutionError(f"ONNX Runtime {self._version} cannot load {model.name}: {error}") from error
        # Asked, since a provider that does not work is left out without an error.
        self.device = "CUDA" if "CUDAExecutionProvider" in self._session.get_providers() else "CPU"

    @property
    def description(self) -> str:
        return f"ONNX Runtime {self._version} on {'CUDA' if self.device == 'CUDA' else 'the CPU'}"

    def _run(self, feeds: Feeds) -> dict[str, npt.NDArray[np.generic]]:
        session = self._session
        if session is None:  # closed by another thread since run() looked
            raise SessionClosedError
        names = [spec.name for spec in self.outputs]
        try:
            results = session.run(names, feeds)
        except Exception as error:  # as above
            if type(error).__name__ == "InvalidArgument":
                raise InputError(f"ONNX Runtime {self._version} refuses the input: {error}") from error
            raise ExecutionError(f"ONNX Runtime {self._version} failed: {error}") from error
        return dict(zip(names, results, strict=True))

    def _release(self) -> None:
        self._session = None
