"""What stands in for an engine where no GPU can run it: its typed model, computed as at log time."""

from __future__ import annotations

from pathlib import Path

from mlflow_trt.convert.precision.emulate import write_emulation
from mlflow_trt.core.types import Precision, TensorSpec
from mlflow_trt.runtime.onnxruntime_session import OnnxRuntimeSession
from mlflow_trt.store.folder import ModelFolder


class EmulatedSession(OnnxRuntimeSession):
    """A typed model on ONNX Runtime, in float32 with every value rounded as in the typed model; slow.

    The emulation is written to `workdir`, which stays until the session is closed.
    """

    def __init__(
        self,
        typed: Path,
        workdir: Path,
        precision: Precision,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
    ) -> None:
        path = workdir / "emulation.onnx"
        write_emulation(typed, path)
        super().__init__(path, inputs, outputs, optimize=False)
        self._precision = precision

    @property
    def description(self) -> str:
        return f"the {self._precision} typed model, emulated on ONNX Runtime {self._version} on the CPU"


def open_typed_model(folder: ModelFolder, workdir: Path) -> EmulatedSession | None:
    """The typed model of a folder, emulated; None where it is the source model itself.

    Raises what loading the model raises, for example where ONNX Runtime cannot run it.
    """
    record = folder.record
    if record.typed == record.source:
        return None
    typed = folder.checked_model(record.typed)
    return EmulatedSession(typed, workdir, record.recipe.precision, record.inputs, record.outputs)
