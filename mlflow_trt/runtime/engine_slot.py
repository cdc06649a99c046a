"""A slot on a GPU: a stream, buffers on both sides of the bus, and an execution context for each of the last shapes."""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Hashable, Mapping
from typing import NamedTuple, cast

import numpy as np

from mlflow_trt import trt_api
from mlflow_trt._logging import get_logger
from mlflow_trt.dtypes import numpy_dtype
from mlflow_trt.errors import ExecutionError, InputShapeError
from mlflow_trt.inputs import Feeds
from mlflow_trt.runtime.batching import Outputs, Rows, Shapes
from mlflow_trt.runtime.copying import copy_rows
from mlflow_trt.runtime.device import Device, DeviceBuffer, PinnedBuffer
from mlflow_trt.runtime.engine import Context, Engine
from mlflow_trt.runtime.slots import Tray

MOST_CONTEXTS = 16
"""Each keeps its shapes, its bindings and its CUDA graph, so that a shape that comes again costs nothing but a launch.
They share their kernels and scratch memory: one takes up to 4 MB and 30 ms to make."""

UPLOAD_BYTES = 1 << 20
_log = get_logger(__name__)


class Phases(NamedTuple):
    """Milliseconds on the GPU: copying the inputs there, running the engine, copying the outputs back."""

    copy_in: float
    engine: float
    copy_out: float


def depends_on_data(shape: tuple[int, ...]) -> bool:
    """Whether TensorRT can tell an output's shape only by computing it."""
    return -1 in shape


class PinnedTray(Tray):
    """A tray that the GPU copies from at full speed."""

    def __init__(self, device: Device, feeds: Feeds, rows: int) -> None:
        self._device = device
        self.buffers: dict[str, PinnedBuffer] = {}
        arrays = {}
        with device.current():
            for name, array in feeds.items():
                shape = (rows, *array.shape[1:])
                self.buffers[name] = buffer = device.pinned_buffer()
                buffer.reserve(rows * array[:1].nbytes)
                arrays[name] = buffer.array(shape, array.dtype)
        super().__init__(arrays, rows)

    def close(self) -> None:
        super().close()
        with self._device.current():
            for buffer in self.buffers.values():
                buffer.free()


class EngineSlot:
    """Runs one batch at a time. Each method makes the device current by itself."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._device = device = engine.device
        with device.current():
            self._stream = device.stream()
            self._done = device.event()
            names = (*engine.inputs, *engine.outputs)
            self._host: dict[str, PinnedBuffer] = {name: device.pinned_buffer() for name in names}
            self._memory: dict[str, DeviceBuffer] = {
                name: device.device_buffer() for name in names if name not in engine.on_host
            }
            self._contexts: collections.OrderedDict[Hashable, Context] = collections.OrderedDict()
            self._profile = 0
            self._shapes: Shapes = {}
            self._bound: Context | None = None
            self._is_new = False
            self._allocator = engine.tensorrt.output_allocator(self._reallocate, self._notify_shape)
            self._allocated: Shapes = {}
            self._allocation_error: Exception | None = None

    # ---- one run

    def load(self, rows: Rows, profile: int) -> None:
        self._profile = profile
        self._shapes = rows.shapes
        with self._device.current():
            for name in self._engine.inputs:
                self._load(name, rows)

    def load_tray(self, tray: Tray, rows: int, size: int, feeds: Feeds, profile: int) -> None:
        self._profile = profile
        self._shapes = {
            name: (size, *array.shape[1:]) if name in tray.arrays else array.shape for name, array in feeds.items()
        }
        tray.pad(rows, size)
        with self._device.current():
            for name in self._engine.inputs:
                if name in tray.arrays and name in self._memory:
                    self._upload(name, cast("PinnedTray", tray).buffers[name])
                else:
                    part = tray.arrays[name][:size] if name in tray.arrays else feeds[name]
                    self._load(name, Rows([{name: part}], None, 0))

    def launch(self) -> None:
        with self._device.current():
            self._bound = bound = self._bind()
            self._execute(bound)
            for name, shape in bound.outputs.items():
                if shape is not None:
                    self._download(name, shape)

    def finish(self) -> Outputs:
        bound = self._bound
        assert bound is not None  # noqa: S101  # launch came before
        with self._device.current():
            self._stream.synchronize()
            shapes = {name: self._allocated[name] if shape is None else shape for name, shape in bound.outputs.items()}
            late = [name for name, shape in bound.outputs.items() if shape is None]
            for name in late:
                self._host[name].reserve(self._nbytes(name, shapes[name]))
                self._download(name, shapes[name])
            if late:
                self._stream.synchronize()
            if self._is_new:
                self._engine.keep_kernels()
        for line in self._engine.tensorrt.log.errors():
            _log.warning("TensorRT ran, but reported: %s", line)
        return {
            name: self._host[name].array(shape, numpy_dtype(self._engine.dtypes[name]))
            for name, shape in shapes.items()
        }

    def abandon(self) -> None:
        # What was already sent off must not read or write the buffers during the next run. Where even waiting fails,
        # the error that led here is the one to tell.
        with contextlib.suppress(Exception), self._device.current():
            self._stream.synchronize()

    def close(self) -> None:
        with self._device.current():
            try:
                self._stream.synchronize()
            finally:
                self._bound = None
                self._contexts.clear()
                self._allocator = None
                for pinned in self._host.values():
                    pinned.free()
                for memory in self._memory.values():
                    memory.free()
                self._stream.close()

    # ---- measurements, of the batch that was loaded last

    def replay(self) -> None:
        """Send the inputs once more, run, and fetch the outputs: a call without its copies in host memory."""
        bound = self._bound
        assert bound is not None  # noqa: S101  # launch came before
        with self._device.current():
            for name in self._shapes:
                self._upload(name)
            self._execute(bound)
            for name, shape in bound.outputs.items():
                self._download(name, self._allocated[name] if shape is None else shape)
            self._stream.synchronize()

    def time_phases(self, runs: int) -> list[Phases]:
        """After a run that does not count. `load` came before."""
        self.launch()
        self.finish()
        bound = self._bound
        assert bound is not None  # noqa: S101  # set by launch
        times = []
        with self._device.current():
            events = [self._device.event() for _ in range(4)]
            for _ in range(runs):
                events[0].record(self._stream)
                for name in self._shapes:
                    self._upload(name)
                events[1].record(self._stream)
                self._execute(bound)
                events[2].record(self._stream)
                for name, shape in bound.outputs.items():
                    self._download(name, self._allocated[name] if shape is None else shape)
                events[3].record(self._stream)
                self._stream.synchronize()
                times.append(Phases(*(later.milliseconds_since(e) for e, later in itertools.pairwise(events))))
        return times

    def time_layers(self, runs: int) -> dict[str, float]:
        """Mean milliseconds of each layer. TensorRT measures them without a CUDA graph, and slower than usual."""
        totals: dict[str, float] = {}

        def report(name: str, milliseconds: float) -> None:
            totals[name] = totals.get(name, 0.0) + milliseconds

        profiler = self._engine.tensorrt.profiler(report)
        with self._device.current():
            # Of its own, since a context cannot be told to stop profiling.
            bound = self._engine.new_context(cuda_graphs=False)
            self._set_shapes(bound)
            self._execute(bound)
            self._stream.synchronize()
            bound.raw.profiler = profiler
            for _ in range(runs):
                self._execute(bound)
                self._stream.synchronize()
        return {name: total / runs for name, total in totals.items()}

    def layer_information(self) -> str:
        """What TensorRT's engine inspector tells about the layers, as JSON."""
        with self._device.current():
            known = self._bound or self._engine.new_context()
            return self._engine.layer_information(known)

    # ---- inputs

    def _load(self, name: str, rows: Rows) -> None:
        """Copy an input into pinned memory, and from there to the GPU as it comes."""
        shape = self._shapes[name]
        dtype = numpy_dtype(self._engine.dtypes[name])
        nbytes = self._nbytes(name, shape)
        host = self._host[name]
        host.reserve(nbytes)
        target = host.array(shape, dtype)
        if name not in self._memory:
            np.copyto(target, rows.parts[0][name])
            return
        memory = self._memory[name]
        memory.reserve(nbytes)
        sent = 0
        if rows.is_batched(name):
            for count in copy_rows(rows.copies(name), target):
                arrived = nbytes // shape[0] * count
                if arrived - sent >= UPLOAD_BYTES:
                    self._stream.upload(host, memory, sent, arrived)
                    sent = arrived
        else:
            np.copyto(target, rows.parts[0][name])
        self._stream.upload(host, memory, sent, nbytes)

    def _upload(self, name: str, source: PinnedBuffer | None = None) -> None:
        """Send an input, unless TensorRT reads it on the host, from pinned memory: its own, or another."""
        if name in self._memory:
            nbytes = self._nbytes(name, self._shapes[name])
            self._memory[name].reserve(nbytes)
            self._stream.upload(source or self._host[name], self._memory[name], 0, nbytes)

    # ---- contexts

    def _bind(self) -> Context:
        """The context for the shapes at hand, bound to the buffers as they are."""
        key = (self._profile, *self._shapes.values(), *(self._values(name) for name in self._engine.on_host))
        bound = self._contexts.pop(key, None)
        if bound is None:
            if len(self._contexts) < MOST_CONTEXTS:
                bound = self._engine.new_context()
            else:
                _, bound = self._contexts.popitem(last=False)
            self._set_shapes(bound)
        elif bound.addresses != self._addresses():
            self._set_shapes(bound)
        self._contexts[key] = bound
        self._is_new = self._engine.is_new(key)
        return bound

    def _values(self, name: str) -> bytes:
        """The values of an input that shapes are computed from."""
        if name not in self._shapes:
            return b""
        return self._host[name].view(self._nbytes(name, self._shapes[name])).tobytes()

    def _addresses(self) -> tuple[int, ...]:
        return tuple(
            (self._memory[name] if name in self._memory else self._host[name]).address
            for name in (*self._engine.inputs, *self._engine.outputs)
        )

    def _set_shapes(self, bound: Context) -> None:
        context, engine = bound.raw, self._engine
        bound.addresses = ()
        bound.runs = 0
        if self._profile != bound.profile:
            if not context.set_optimization_profile_async(self._profile, self._stream.handle):
                raise engine.failure(f"switch to optimization profile {self._profile}")
            self._stream.synchronize()
            bound.profile = self._profile
        for name in engine.inputs:
            shape = self._shapes[name]
            if not context.set_input_shape(name, shape):
                raise engine.failure(f"take the shape {shape} for input {name!r}", InputShapeError)
            address = (self._memory[name] if name in self._memory else self._host[name]).address
            if not context.set_tensor_address(name, address):
                raise engine.failure(f"bind input {name!r}")
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            raise engine.failure(f"infer the output shapes from {_listed(self._shapes)}", InputShapeError) from error
        if missing:
            raise engine.failure(f"infer the output shapes, since {', '.join(missing)} is not specified")
        found = {name: tuple(context.get_tensor_shape(name)) for name in engine.outputs}
        bound.outputs = {name: None if depends_on_data(shape) else shape for name, shape in found.items()}
        if None in bound.outputs.values() and engine.uses_cuda_graphs:
            # A graph would replay the allocations of the run that it was captured from.
            engine.uses_cuda_graphs = False
            bound.raw, bound.profile = engine.new_context().raw, 0
            self._set_shapes(bound)
            return
        for name, known in bound.outputs.items():
            self._bind_output(context, name, known)
        bound.scratch_bytes = context.update_device_memory_size_for_shapes()
        bound.addresses = self._addresses()

    def _bind_output(self, context: trt_api.IExecutionContext, name: str, shape: tuple[int, ...] | None) -> None:
        """Give an output its memory; one of unknown shape asks the allocator for it while the engine runs."""
        if shape is None:
            if not context.set_output_allocator(name, self._allocator):
                raise self._engine.failure(f"set an output allocator for {name!r}")
            return
        nbytes = self._nbytes(name, shape)
        address = self._host[name].reserve(nbytes)
        if name in self._memory:
            address = self._memory[name].reserve(nbytes)
        if not context.set_tensor_address(name, address):
            raise self._engine.failure(f"bind output {name!r}")

    def _execute(self, bound: Context) -> None:
        self._allocation_error = None
        try:
            self._engine.execute(bound, self._stream, self._done)
        except ExecutionError as error:
            if self._allocation_error is not None:
                raise self._allocation_error from None
            if "capture" not in error.message:
                raise
            # Another library of this process allocated memory meanwhile, which CUDA forbids and we cannot prevent.
            _log.warning("A CUDA graph could not be captured, and its shapes run without: %s", error.message)
            bound.raw = self._engine.new_context(cuda_graphs=False).raw
            bound.profile, bound.scratch_address = 0, 0
            self._set_shapes(bound)
            self._engine.execute(bound, self._stream, self._done)

    def _reallocate(self, name: str, nbytes: int) -> int:
        try:
            return self._memory[name].reserve(nbytes)
        except Exception as error:  # noqa: BLE001  # must not travel through TensorRT, which takes 0 for a failure
            self._allocation_error = error
            return 0

    def _notify_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._allocated[name] = shape

    # ---- outputs

    def _download(self, name: str, shape: tuple[int, ...]) -> None:
        if name in self._memory:
            self._stream.download(self._memory[name], self._host[name], self._nbytes(name, shape))

    def _nbytes(self, name: str, shape: tuple[int, ...]) -> int:
        count = 1
        for size in shape:
            count *= size
        return count * numpy_dtype(self._engine.dtypes[name]).itemsize


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())
