"""A slot on a GPU: a stream, buffers on both sides of the bus, and execution contexts bound to them."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from typing import cast

import numpy as np

from mlflow_trt.core.arrays import Outputs
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.nvtx import marked
from mlflow_trt.runtime.batching.host_copy import copy_rows
from mlflow_trt.runtime.batching.sizes import BatchRows, Shapes
from mlflow_trt.runtime.engine.buffers import Buffers
from mlflow_trt.runtime.engine.contexts import Bindings
from mlflow_trt.runtime.engine.engine import ENGINE_ALONE, Around, Context, Engine, do_nothing

UPLOAD_BYTES = 1 << 20
GRAPH_INPUT_BYTES = 2 << 20
"""Up to which a run's inputs are uploaded by its CUDA graph. Larger ones are sent off while they are still copied into
pinned memory, and while another run is not done."""
GRAPH_OUTPUT_BYTES = 2 << 20
"""Up to which a run's outputs are downloaded by its CUDA graph. Larger ones come back while the next run has begun."""
_MOST_RUNS_FOR_A_GRAPH = 6
"""The first one compiles, the second one captures, unless another thread allocates just then."""
_log = get_logger(__name__)


class EngineSlot:
    """Runs one batch at a time. The methods of `Slot` make the device current by themselves; the others want it so.

    Args:
        engine: what runs.
        shapes: how many different ones are expected, each of which keeps a context.

    Attributes:
        shapes, profile: of the inputs that were loaded last.
        context: what ran last, or None before that.
    """

    def __init__(self, engine: Engine, shapes: int = 0) -> None:
        self.engine = engine
        self._device = engine.device
        self.profile = 0
        self.shapes: Shapes = {}
        self.context: Context | None = None
        self._is_new = False
        with self._device.current():
            self.stream = self._device.stream()
            self.buffers = Buffers(engine)
            self.bindings = Bindings(engine, self.buffers, self.stream, shapes)
        self._arounds = {
            (up, down): Around(
                f"{'upload, ' if up else ''}engine{', download' if down else ''}",
                self._upload_all if up else do_nothing,
                self._download_all if down else do_nothing,
            )
            for up in (False, True)
            for down in (False, True)
        }

    # ---- what every slot can do

    @marked("copy in, enqueue")
    def launch(self, rows: BatchRows, profile: int) -> None:
        with self._device.current():
            self.profile = profile
            self.shapes = rows.shapes
            upload = self._graph_uploads()
            for name in self.engine.inputs:
                self._load(name, rows, upload=not upload)
            self._start(upload=upload)

    @marked("finish")
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

    # ---- what a slot can do whose runs are launched without Python

    def capture_call(self, rows: BatchRows, profile: int) -> Shapes:
        """Run rows until it is a graph, with the way back, and small inputs' way there; returns the shapes of the
        outputs, or none where there is no graph to be had.
        """
        for _ in range(_MOST_RUNS_FOR_A_GRAPH):
            with self._device.current():
                self.profile, self.shapes = profile, rows.shapes
                upload = self._graph_uploads()
                around = self._arounds[upload, True]
                for name in self.engine.inputs:
                    self._load(name, rows, upload=not upload)
                context, key = self.bindings.bind(profile, self.shapes)
                if key in self.bindings.graphs(around.name):
                    self.stream.synchronize()
                    return context.outputs
                if not self.engine.uses_cuda_graphs or not context.captures:
                    self.stream.synchronize()
                    break
                self._run(context, key, around)
            self.finish()
        return {}

    def call_graphs(self) -> dict[Hashable, int]:
        """The handles of such graphs, by profile and the shapes of the inputs. They are good until the slot is used."""
        graphs = [self.bindings.graphs(self._arounds[upload, True].name) for upload in (True, False)]
        return {key: graph.handle for each in graphs for key, graph in each.items()}

    def addresses(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """The stream, the pinned memory of all inputs and outputs, and that of the inputs on the GPU."""
        return (
            self.stream.handle,
            tuple(buffer.address for buffer in self.buffers.host.values()),
            tuple(self.buffers.memory[name].address for name in self.engine.inputs),
        )

    # ---- steps

    def load(self, rows: BatchRows, profile: int) -> None:
        """Copy inputs into pinned memory, and from there to the GPU as they come."""
        self.profile = profile
        self.shapes = rows.shapes
        for name in self.engine.inputs:
            self._load(name, rows, upload=True)

    def start_again(self) -> None:
        """Enqueue the way of what was loaded, from pinned memory and back, as a call does it."""
        upload = self._graph_uploads()
        if not upload:
            self._upload_all()
        self._start(upload=upload)

    def execute(self) -> None:
        """Enqueue a run of what was loaded."""
        self._run(*self.bindings.bind(self.profile, self.shapes), ENGINE_ALONE)

    def _start(self, *, upload: bool) -> None:
        context, shapes = self.bindings.bind(self.profile, self.shapes)
        download = context.output_bytes <= GRAPH_OUTPUT_BYTES
        self._run(context, shapes, self._arounds[upload, download])
        if not download:
            self._download_all()

    @marked("enqueue")
    def _run(self, context: Context, shapes: Hashable, around: Around) -> None:
        self.context = context
        self._is_new = self.engine.compile(context, self.stream, shapes, around)
        self.bindings.execute(context, self.profile, self.shapes, around)

    def _graph_uploads(self) -> bool:
        nbytes = self.buffers.nbytes
        return sum([nbytes(name, shape) for name, shape in self.shapes.items()]) <= GRAPH_INPUT_BYTES

    def _upload_all(self) -> None:
        for name in self.engine.inputs:
            self.upload(name)

    def _download_all(self) -> None:
        for name, shape in self._context.outputs.items():
            self.download(name, shape)

    @marked("wait for the GPU")
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

    @marked("copy into pinned memory")
    def _load(self, name: str, rows: BatchRows, *, upload: bool) -> None:
        shape = self.shapes[name]
        self.buffers.reserve(name, shape)
        target = self.buffers.array(name, shape)
        if not rows.is_batched(name):
            np.copyto(target, rows.parts[0][name])
            if upload:
                self.upload(name)
            return
        upload = upload and name in self.buffers.memory
        row = self.buffers.nbytes(name, shape[1:])
        sent = 0
        for count in copy_rows(rows.copies(name), target):
            if upload and ((count - sent) * row >= UPLOAD_BYTES or count == shape[0]):
                self.stream.upload(self.buffers.host[name], self.buffers.memory[name], sent * row, count * row)
                sent = count
