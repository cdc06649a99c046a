"""Sessions on the CPU that fail when they are told to, as one on a GPU may."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import networks
import numpy as np
from helpers import read

from mlflow_trt.core.types import BatchAxis
from mlflow_trt.errors import ExecutionError
from mlflow_trt.flavor.pyfunc import PyfuncModel
from mlflow_trt.runtime.onnxruntime_session import OnnxRuntimeSession


class FailingSession(OnnxRuntimeSession):
    """ONNX Runtime in pieces of 8 rows.

    Attributes:
        failure: raised instead of the runs to come, after `runs_before_failure` more.
        lost: what `broken` answers.
    """

    def __init__(self, source) -> None:
        axis = BatchAxis(inputs=("x",), splits=True, declared=True)
        super().__init__(source.path, source.inputs, source.outputs, batch_axis=axis, largest_batch=8)
        self.failure: Exception | None = None
        self.runs_before_failure = 0
        self.before_run = lambda: None
        self.lost: str | None = None
        slots: Any = self._runner.slots  # type: ignore[attr-defined]  # a scheduler's
        make = slots._make

        def make_one():
            slot = make()
            finish = slot.finish
            slot.finish = lambda: self._finish(finish)
            return slot

        slots._make = make_one

    def broken(self):
        return self.lost

    def _finish(self, finish):
        self.before_run()
        if self.failure is not None:
            self.runs_before_failure -= 1
            if self.runs_before_failure < 0:
                raise self.failure
        return finish()


class LostByInput(PyfuncModel):
    """A model that loses its GPU when it is given numbers of 1,000 and more."""

    def _run(self, feeds):
        if np.max(feeds["x"]) >= 1000:
            assert isinstance(self._session, FailingSession)
            self._session.failure = ExecutionError("CUDA failed: unspecified launch failure")
            self._session.lost = "unspecified launch failure"
        return super()._run(feeds)


def _load_pyfunc(_path):
    """What MLflow calls for a model whose loader module is this one."""
    folder = Path(tempfile.mkdtemp())
    return LostByInput(FailingSession(read(networks.product(), folder)))
