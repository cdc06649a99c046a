"""Session on ONNX Runtime: the reference on the CPU, the explicit alternative to a GPU, and what to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mlflow_trt.backends.onnxruntime import CpuModel
from mlflow_trt.core.arrays import Feeds, Outputs
from mlflow_trt.core.nvtx import marked
from mlflow_trt.core.types import BatchAxis, TensorSpec
from mlflow_trt.errors import RuntimeUnavailableError
from mlflow_trt.runtime.batching.host_copy import copy_rows
from mlflow_trt.runtime.batching.scheduler import Scheduler
from mlflow_trt.runtime.batching.sizes import BatchRows
from mlflow_trt.runtime.session import Session


class OnnxRuntimeSession(Session):
    """Runs an ONNX file on the CPU: a source model, or a typed one, which has float32 in place of float64.

    With `prefer_cuda` it runs on the GPU where ONNX Runtime's CUDA provider is installed and works; `device` says.
    With `optimize=False` every node computes what it says, one after the other.
    With `batch_axis` and `largest_batch` larger batches are cut, and calls at the same time run together, like on a
    GPU. `providers` and `session_options` are the load settings `onnx_execution_providers` and `onnx_session_options`.

    Attributes:
        inference_session: ONNX Runtime's own session, for its own tools.
    """

    runtime: ClassVar[str] = "onnxruntime"

    def __init__(
        self,
        model: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        prefer_cuda: bool = False,
        optimize: bool = True,
        batch_axis: BatchAxis | None = None,
        largest_batch: int | None = None,
        max_batch_delay_ms: float = 0.0,
        providers: Sequence[Any] | None = None,
        session_options: Mapping[str, Any] | None = None,
    ) -> None:
        for spec in (*inputs, *outputs):
            if spec.dtype == "bfloat16":
                raise RuntimeUnavailableError(
                    f"ONNX Runtime cannot exchange bfloat16 arrays with Python, which {spec.name!r} needs; "
                    "use runtime='tensorrt', or export the model with float32 inputs and outputs"
                )
        loaded = CpuModel(
            model,
            optimize=optimize,
            prefer_cuda=prefer_cuda,
            providers=providers,
            session_options=session_options,
        )
        self._version = loaded.version
        self.device = loaded.device
        self.inference_session = loaded.inference_session
        names = [spec.name for spec in outputs]
        super().__init__(
            Scheduler(
                lambda: OnnxRuntimeSlot(loaded, names),
                profiles=(),
                axis=batch_axis,
                largest=largest_batch,
                max_batch_delay=max_batch_delay_ms / 1e3,
            ),
            inputs,
            outputs,
            taken=[loaded.described(spec) for spec in inputs],
        )

    @property
    def description(self) -> str:
        return f"ONNX Runtime {self._version} on {'the CPU' if self.device == 'CPU' else self.device}"


class OnnxRuntimeSlot:
    """Arrays, and the model that is run on them."""

    def __init__(self, model: CpuModel, outputs: Sequence[str]) -> None:
        self._model = model
        self._outputs = outputs
        self._feeds: Feeds = {}

    def launch(self, rows: BatchRows, _profile: int) -> None:
        shapes = rows.shapes
        if all(array.shape == shapes[name] for name, array in rows.parts[0].items()):
            self._feeds = rows.parts[0]  # one batch as it is
            return
        self._feeds = {}
        for name, shape in shapes.items():
            first = rows.parts[0][name]
            if not rows.is_batched(name):
                self._feeds[name] = first
                continue
            array = np.empty(shape, first.dtype)
            for _ in copy_rows(rows.copies(name), array):
                pass
            self._feeds[name] = array

    @marked("finish")
    def finish(self) -> Outputs:
        return self._model.run(self._outputs, self._feeds)

    def abandon(self) -> None:
        self._feeds = {}

    def trim(self) -> None:
        self._feeds = {}

    def close(self) -> None:
        self._feeds = {}
