"""A slot on a GPU: a stream, buffers on both sides of the bus, and execution contexts bound to them."""

from __future__ import annotations

import contextlib
from typing import cast

import numpy as np

from mlflow_trt.core.arrays import Outputs
from mlflow_trt.core.log import get_logger
from mlflow_trt.runtime.batching.host_copy import copy_rows
from mlflow_trt.runtime.batching.sizes import Rows, Shapes
from mlflow_trt.runtime.engine.buffers import Buffers
from mlflow_trt.runtime.engine.contexts import Bindings
from mlflow_trt.runtime.engine.engine import Context, Engine

UPLOAD_BYTES = 1 << 20
_log = get_logger(__name__)


class EngineSlot:
    """Runs one batch at a time. The methods of `Slot` make the device current by themselves; the others want it so.

    Attributes:
        shapes, profile: of the inputs that were loaded last.
        context: what ran last, or None before that.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._device = engine.device
        self.profile = 0
        self.shapes: Shapes = {}
        self.context: Context | None = None
        self._is_new = False
        with self._device.current():
            self.stream = self._device.stream()
            self.buffers = Buffers(engine)
            self.bindings = Bindings(engine, self.buffers, self.stream)

    # ---- what every slot can do

    def launch(self, rows: Rows, profile: int) -> None:
        with self._device.current():
            self.load(rows, profile)
            self.start()

    def finish(self) -> Outputs:
        context = self._context
        with self._device.current():
            self.wait()
            shapes = self.bindings.output_shapes(context)
            for name in context.late:
                self.buffers.host[name].reserve(self.buffers.nbytes(name, shapes[name]))
                self.download(name, shapes[name])
            if context.late:
                self.stream.synchronize()
        return {name: self.buffers.array(name, shape) for name, shape in shapes.items()}

    def abandon(self) -> None:
        # What was already sent off must not read or write the buffers during the next run. Where even waiting fails,
        # the error that led here is the one to tell.
        with contextlib.suppress(Exception), self._device.current():
            self.stream.synchronize()

    def trim(self) -> None:
        with self._device.current():
            self.buffers.free()

    def close(self) -> None:
        with self._device.current():
            try:
                self.stream.synchronize()
            finally:
                self.context = None
                self.bindings.clear()
                self.buffers.free()
                self.stream.close()

    # ---- steps

    def load(self, rows: Rows, profile: int) -> None:
        """Copy inputs into pinned memory, and from there to the GPU as they come."""
        self.profile = profile
        self.shapes = rows.shapes
        for name in self.engine.inputs:
            self._load(name, rows)

    def start(self) -> None:
        """Enqueue a run of what was loaded, and the way back of its outputs."""
        self.execute()
        for name, shape in self._context.outputs.items():
            self.download(name, shape)

    def execute(self) -> None:
        """Enqueue a run of what was loaded."""
        self.context, self._is_new = self.bindings.bind(self.profile, self.shapes)
        self.bindings.execute(self.context, self.profile, self.shapes)

    def wait(self) -> None:
        """Wait for the run; keep the kernels that it compiled."""
        self.stream.synchronize()
        if self._is_new:
            self._is_new = False
            self.engine.keep_kernels()
        for line in self.engine.tensorrt.log.errors():
            _log.warning("TensorRT ran, but reported: %s", line)

    def upload(self, name: str) -> None:
        """Send an input from its pinned memory, unless TensorRT reads it there."""
        if name in self.buffers.memory:
            nbytes = self.buffers.nbytes(name, self.shapes[name])
            self.stream.upload(self.buffers.host[name], self.buffers.memory[name], 0, nbytes)

    def download(self, name: str, shape: tuple[int, ...]) -> None:
        """Fetch an output, unless TensorRT writes it on the host."""
        if name in self.buffers.memory:
            self.stream.download(self.buffers.memory[name], self.buffers.host[name], self.buffers.nbytes(name, shape))

    @property
    def _context(self) -> Context:
        return cast("Context", self.context)  # launch comes before whoever asks

    def _load(self, name: str, rows: Rows) -> None:
        shape = self.shapes[name]
        self.buffers.reserve(name, shape)
        target = self.buffers.array(name, shape)
        if not rows.is_batched(name):
            np.copyto(target, rows.parts[0][name])
            self.upload(name)
            return
        row = self.buffers.nbytes(name, shape[1:])
        sent = 0
        for count in copy_rows(rows.copies(name), target):
            if name in self.buffers.memory and ((count - sent) * row >= UPLOAD_BYTES or count == shape[0]):
                self.stream.upload(self.buffers.host[name], self.buffers.memory[name], sent * row, count * row)
                sent = count
