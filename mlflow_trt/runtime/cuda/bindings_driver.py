"""The CUDA driver through NVIDIA's cuda-bindings, with the face of `pycuda.driver` that `Driver` describes.

Sources: https://docs.nvidia.com/cuda/cuda-driver-api/, group__CUDA__MEM.html, group__CUDA__STREAM.html,
group__CUDA__EVENT.html and group__CUDA__PRIMARY__CTX.html.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

_OUT_OF_MEMORY = 2
_DEFAULT_FLAGS = 0


class CudaError(Exception):
    """A call of the driver failed."""


class CudaMemoryError(CudaError):
    """A call of the driver failed since memory was lacking."""


class BindingsDriver:
    """Calls `cuda.bindings.driver`, whose functions return a status and then what they have to give."""

    Error = CudaError
    MemoryError = CudaMemoryError

    def __init__(self, bindings: Any) -> None:
        self._bindings = bindings
        self.Context = SimpleNamespace(pop=self._pop, synchronize=self._synchronize)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the driver, and return what it gives: None, a value, or a tuple of them."""
        status, *values = getattr(self._bindings, name)(*arguments)
        if int(status):
            kind = CudaMemoryError if int(status) == _OUT_OF_MEMORY else CudaError
            raise kind(f"{name} failed: {self._text(status)}")
        return values[0] if len(values) == 1 else tuple(values) or None

    def init(self) -> None:
        self.call("cuInit", 0)

    def Device(self, ordinal: int) -> _Device:  # noqa: N802  # pycuda's name
        return _Device(self, ordinal)

    def Stream(self) -> _Stream:  # noqa: N802  # pycuda's name
        return _Stream(self)

    def Event(self) -> _Event:  # noqa: N802  # pycuda's name
        return _Event(self)

    def mem_alloc(self, nbytes: int) -> _DeviceMemory:
        return _DeviceMemory(self, int(self.call("cuMemAlloc", nbytes)))

    def pagelocked_empty(self, shape: int, dtype: npt.DTypeLike) -> npt.NDArray[np.uint8]:
        nbytes = shape * np.dtype(dtype).itemsize
        address = int(self.call("cuMemHostAlloc", nbytes, _DEFAULT_FLAGS))
        return np.asarray(_PinnedMemory(self, address, shape, np.dtype(dtype)))

    def memcpy_htod_async(self, dest: int, src: npt.NDArray[np.uint8], stream: _Stream) -> None:
        self.call("cuMemcpyHtoDAsync", dest, _address(src), src.nbytes, stream.raw)

    def memcpy_dtoh_async(self, dest: npt.NDArray[np.uint8], src: int, stream: _Stream) -> None:
        self.call("cuMemcpyDtoHAsync", _address(dest), src, dest.nbytes, stream.raw)

    def memcpy_dtod_async(self, dest: int, src: int, size: int, stream: _Stream) -> None:
        self.call("cuMemcpyDtoDAsync", dest, src, size, stream.raw)

    def memcpy_dtoh(self, dest: npt.NDArray[np.uint8], src: int) -> None:
        self.call("cuMemcpyDtoH", _address(dest), src, dest.nbytes)

    def _pop(self) -> None:
        self.call("cuCtxPopCurrent")

    def _synchronize(self) -> None:
        self.call("cuCtxSynchronize")

    def _text(self, status: Any) -> str:
        texts = []
        for function in (self._bindings.cuGetErrorName, self._bindings.cuGetErrorString):
            failed, text = function(status)
            if not int(failed) and text:
                texts.append(text.decode() if isinstance(text, bytes) else str(text))
        return ": ".join(texts) or f"status {int(status)}"


class _Device:
    def __init__(self, driver: BindingsDriver, ordinal: int) -> None:
        self._driver = driver
        self._raw = driver.call("cuDeviceGet", ordinal)

    def retain_primary_context(self) -> _PrimaryContext:
        return _PrimaryContext(self._driver, self._driver.call("cuDevicePrimaryCtxRetain", self._raw))


class _PrimaryContext:
    """Never released: a process keeps its GPUs until it ends."""

    def __init__(self, driver: BindingsDriver, raw: Any) -> None:
        self._driver = driver
        self._raw = raw

    def push(self) -> None:
        self._driver.call("cuCtxPushCurrent", self._raw)


class _Stream:
    def __init__(self, driver: BindingsDriver) -> None:
        self._driver = driver
        self.raw = driver.call("cuStreamCreate", _DEFAULT_FLAGS)
        self.handle = int(self.raw)

    def synchronize(self) -> None:
        self._driver.call("cuStreamSynchronize", self.raw)

    def wait_for_event(self, event: _Event) -> None:
        self._driver.call("cuStreamWaitEvent", self.raw, event.raw, _DEFAULT_FLAGS)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of the process the driver may be gone
            self._driver.call("cuStreamDestroy", self.raw)


class _Event:
    def __init__(self, driver: BindingsDriver) -> None:
        self._driver = driver
        self.raw = driver.call("cuEventCreate", _DEFAULT_FLAGS)

    def record(self, stream: _Stream) -> None:
        self._driver.call("cuEventRecord", self.raw, stream.raw)

    def synchronize(self) -> None:
        self._driver.call("cuEventSynchronize", self.raw)

    def time_since(self, earlier: _Event) -> float:
        return float(self._driver.call("cuEventElapsedTime", earlier.raw, self.raw))

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of the process the driver may be gone
            self._driver.call("cuEventDestroy", self.raw)


class _DeviceMemory:
    def __init__(self, driver: BindingsDriver, address: int) -> None:
        self._driver = driver
        self._address = address

    def __int__(self) -> int:
        return self._address

    def free(self) -> None:
        self._driver.call("cuMemFree", self._address)


class _PinnedMemory:
    """The base of an array in page-locked memory."""

    def __init__(self, driver: BindingsDriver, address: int, shape: int, dtype: np.dtype[Any]) -> None:
        self._driver = driver
        self._address = address
        self.__array_interface__ = {"shape": (shape,), "typestr": dtype.str, "data": (address, False), "version": 3}

    def free(self) -> None:
        self._driver.call("cuMemFreeHost", self._address)


def _address(array: npt.NDArray[np.uint8]) -> int:
    return int(array.__array_interface__["data"][0])
