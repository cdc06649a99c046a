"""CUDA: the primary context, streams, and buffers.

The driver keeps a stack of contexts for each thread, and a process that ends with one still pushed aborts. So there is
one primary context for each GPU and process, and every use of it stands in `with device.current():`, which pushes it
for the calling thread and pops it again. Memory is allocated and freed only inside such a block, and freed explicitly.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from mlflow_trt.backends.cuda_driver import Hardware, probe
from mlflow_trt.core.types import Gpu
from mlflow_trt.errors import ExecutionError, OutOfMemoryError, RuntimeUnavailableError
from mlflow_trt.runtime.cuda.driver import Driver, load_driver
from mlflow_trt.runtime.cuda.graphs import DriverGraphs, EntryPoints, Graph, Graphs

_devices: dict[int, Device] = {}
_devices_lock = threading.Lock()


def open_device(ordinal: int) -> Device:
    """The GPU of that CUDA ordinal; the same object for every caller in this process.

    Raises RuntimeUnavailableError where there is no such GPU, MissingDependencyError where no package
    is installed that calls the driver.
    """
    with _devices_lock:
        if ordinal not in _devices:
            hardware = probe()
            gpu = _find(hardware, ordinal)
            _devices[ordinal] = Device(gpu, hardware, load_driver()[1], DriverGraphs())
        return _devices[ordinal]


def _find(hardware: Hardware, ordinal: int) -> Gpu:
    if hardware.problem is not None:
        raise RuntimeUnavailableError(f"TensorRT needs an NVIDIA GPU: {hardware.problem}")
    for gpu in hardware.gpus:
        if gpu.ordinal == ordinal:
            return gpu
    known = ", ".join(f"{gpu.ordinal}: {gpu}" for gpu in hardware.gpus)
    raise RuntimeUnavailableError(f"there is no CUDA device {ordinal}; this process sees {known}")


class Device:
    """One GPU and its primary context in this process. Get it from `open_device`.

    Attributes:
        allocating: held while memory is allocated or freed, or the whole GPU waited for. CUDA refuses part of that
            while a graph is captured, and makes the capture fail: whoever captures holds it too.
    """

    allocating: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, gpu: Gpu, hardware: Hardware, driver: Driver, graphs: Graphs) -> None:
        self.gpu = gpu
        self.hardware = hardware
        self._driver = driver
        self._graphs = graphs
        try:
            driver.init()
            self._context = driver.Device(gpu.ordinal).retain_primary_context()
        except driver.Error as error:
            raise (self.translate_error(error) or error) from error

    def current(self) -> Current:
        """A block in which this GPU is the calling thread's, and the driver's errors become ours."""
        return Current(self)

    def translate_error(self, error: BaseException) -> Exception | None:
        """Our error for one of the driver's, None for any other."""
        if isinstance(error, self._driver.MemoryError):
            return OutOfMemoryError(
                f"{self.gpu.name} is out of memory ({error}): send smaller batches, or free memory on the GPU"
            )
        if isinstance(error, self._driver.Error):
            return ExecutionError(f"CUDA failed on {self.gpu.name}: {error}")
        return None

    def push(self) -> None:
        """Make it the calling thread's. Use `current`, which cannot be forgotten to end."""
        self._context.push()

    def pop(self) -> None:
        self._driver.Context.pop()

    def synchronize(self) -> None:
        """Wait for everything that was sent to this GPU by this process. The device is current."""
        self._driver.Context.synchronize()

    def loss(self) -> str | None:
        """What CUDA says where this process can use the GPU no more; None where it can.

        After a failed kernel or a fault of the hardware every call fails, until another process begins anew:
        https://docs.nvidia.com/cuda/cuda-driver-api/, at CUresult.
        """
        try:
            with self.allocating, self.current():
                self.synchronize()
        except ExecutionError as error:
            # Another library of this process captures a graph, and nobody may wait for the GPU meanwhile.
            return None if "captur" in error.message else error.message
        return None

    def fetch(
        self, buffer: DeviceBuffer, shape: tuple[int, ...], dtype: np.dtype[np.generic]
    ) -> npt.NDArray[np.generic]:
        """A copy of the beginning of a buffer, as an array of that shape."""
        array = np.empty(shape, dtype)
        if array.nbytes:
            with self.allocating, self.current():
                self._driver.memcpy_dtoh(array.reshape(-1).view(np.uint8), buffer.address)
        return array

    def entry_points(self) -> EntryPoints:
        """What launches graphs on this GPU without Python. Raises ExecutionError."""
        with self.current():
            return self._graphs.entry_points()

    def stream(self) -> Stream:
        return Stream(self._driver.Stream(), self._driver, self._graphs)

    def event(self) -> Event:
        return Event(self._driver.Event())

    def device_buffer(self, moves: Moves | None = None) -> DeviceBuffer:
        return DeviceBuffer(self._driver, moves)

    def pinned_buffer(self, moves: Moves) -> PinnedBuffer:
        return PinnedBuffer(self._driver, moves)


class Current:
    """The block of `Device.current`. Not a generator: calls enter it several times, and each microsecond shows."""

    __slots__ = ("_device",)

    def __init__(self, device: Device) -> None:
        self._device = device

    def __enter__(self) -> None:
        try:
            self._device.push()
        except Exception as error:
            raise (self._device.translate_error(error) or error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._device.pop()
        if error is not None:
            ours = self._device.translate_error(error)
            if ours is not None:
                raise ours from error


class Stream:
    """A CUDA stream of its own, not the default one, and the copies on it."""

    def __init__(self, stream: Any, driver: Driver, graphs: Graphs) -> None:
        self.handle = int(stream.handle)
        self._stream = stream
        self._driver = driver
        self._graphs = graphs

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """What `enqueue` sends to this stream, which does not run for it. `Device.allocating` is held.

        Raises ExecutionError, and what `enqueue` raises.
        """
        return self._graphs.capture(self.handle, enqueue)

    def upload(self, source: PinnedBuffer, target: DeviceBuffer, start: int, stop: int) -> None:
        """Copy these bytes of one to the same place in the other."""
        if stop > start:
            self._driver.memcpy_htod_async(target.address + start, source.view(start, stop), self._stream)

    def download(self, source: DeviceBuffer, target: PinnedBuffer, nbytes: int) -> None:
        if nbytes:
            self._driver.memcpy_dtoh_async(target.view(0, nbytes), source.address, self._stream)

    def copy(self, source: int, target: int, nbytes: int) -> None:
        """Copy from one address on the GPU to another."""
        if nbytes:
            self._driver.memcpy_dtod_async(target, source, nbytes, self._stream)

    def record(self, event: Any) -> None:
        event.record(self._stream)

    def wait_for(self, event: Event) -> None:
        """Let what follows on this stream start after the event; the calling thread goes on."""
        self._stream.wait_for_event(event.raw)

    def synchronize(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        self._stream = None


class Event:
    """A moment on a stream."""

    def __init__(self, event: Any) -> None:
        self.raw = event

    def record(self, stream: Stream) -> None:
        stream.record(self.raw)

    def synchronize(self) -> None:
        self.raw.synchronize()

    def milliseconds_since(self, earlier: Event) -> float:
        """Time on the GPU between two moments that have both passed."""
        return float(self.raw.time_since(earlier.raw))


class Moves:
    """Counts how often buffers got memory or gave it back: their addresses are good while the count stays the same.

    Comparing addresses would not do: freed memory may come back at the same address, and be smaller.
    """

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class DeviceBuffer:
    """Memory on the GPU that grows when more is needed and is kept for the next call."""

    def __init__(self, driver: Driver, moves: Moves | None = None) -> None:
        self.address = 0
        self._driver = driver
        self._moves = moves or Moves()
        self._memory: Any = None
        self.nbytes = 0

    def reserve(self, nbytes: int) -> int:
        """Make room for `nbytes`, whose contents are undefined, and return the address. Never zero."""
        if self._memory is None or nbytes > self.nbytes:
            with Device.allocating:
                self.free()
                self._moves.count += 1
                self._memory = self._driver.mem_alloc(max(nbytes, 1))
            self.nbytes = nbytes
            self.address = int(self._memory)
        return self.address

    def free(self) -> None:
        if self._memory is not None:
            self._moves.count += 1
            with Device.allocating:
                self._memory.free()
            self._memory = None
            self.nbytes = self.address = 0


class PinnedBuffer:
    """Page-locked host memory, which the GPU copies from and to at full speed; grows like DeviceBuffer."""

    def __init__(self, driver: Driver, moves: Moves) -> None:
        self.address = 0
        self._driver = driver
        self._moves = moves
        self._memory: Any = None

    def reserve(self, nbytes: int) -> int:
        """Make room for `nbytes`, whose contents are undefined, and return the host address. Never zero."""
        if self._memory is None or nbytes > self._memory.nbytes:
            with Device.allocating:
                self.free()
                self._moves.count += 1
                self._memory = self._driver.pagelocked_empty(max(nbytes, 1), np.uint8)
            self.address = int(self._memory.ctypes.data)
        return self.address

    def view(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        view: npt.NDArray[np.uint8] = self._memory[start:stop]
        return view

    def array(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
        """The beginning of the buffer as an array of that shape; not a copy."""
        return np.ndarray(shape, dtype, buffer=self._memory.data)

    def free(self) -> None:
        if self._memory is not None:
            self._moves.count += 1
            with Device.allocating:
                self._memory.base.free()
            self._memory = None
            self.address = 0


def _forget_devices() -> None:
    global _devices_lock  # whoever held it is in the process that this one was forked from
    _devices_lock, Device.allocating = threading.Lock(), threading.RLock()
    _devices.clear()


os.register_at_fork(after_in_child=_forget_devices)
