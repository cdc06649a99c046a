"""Arrays on the GPU: those of other libraries as inputs, and ours as outputs, without a trip through the host."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlflow_trt.core.arrays import numpy_dtype
from mlflow_trt.core.forking import finalize
from mlflow_trt.core.types import TensorSpec
from mlflow_trt.errors import InputDtypeError, InputError, InputShapeError
from mlflow_trt.runtime.cuda import dlpack
from mlflow_trt.runtime.cuda.device import Device, DeviceBuffer, Stream


class DeviceArray:
    """A contiguous array in GPU memory, ready to be read. Freed when nobody refers to it any more.

    Other libraries take it without a copy: `torch.from_dlpack(array)`, `cupy.asarray(array)`; `numpy()` copies.
    """

    def __init__(self, device: Device, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype = dtype
        self.shape = shape
        self._device = device
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * numpy_dtype(dtype).itemsize
        with device.current():
            buffer = device.device_buffer()
            self.address = buffer.reserve(self.nbytes)
        self._buffer = buffer
        finalize(self, _free, device, buffer)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3, https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html. It has no bfloat16."""
        if self.dtype == "bfloat16":
            raise AttributeError("the CUDA array interface has no bfloat16: use DLPack")
        typestr = numpy_dtype(self.dtype).str
        return {"shape": self.shape, "typestr": typestr, "data": (self.address, False), "version": 3, "stream": None}

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self._device.gpu.ordinal

    def __dlpack__(
        self,
        *,
        stream: Any = None,  # whatever the stream: it is ready
        max_version: tuple[int, int] | None = None,  # ours is older than any that is asked for
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule with this memory; with `copy=True` with a copy of it, or with `dl_device=(1, 0)` on the host.

        Raises BufferError for any other device, and for the host where `copy=False` forbids what it takes.
        """
        if dl_device is not None and tuple(map(int, dl_device)) != self.__dlpack_device__():
            if tuple(map(int, dl_device)) != (dlpack.CPU, 0):
                raise BufferError(f"{self!r} can be had where it is or on the host, not on device {dl_device}")
            if copy is False:
                raise BufferError(f"{self!r} is on the GPU: it is a copy on the host, which copy=False forbids")
            if self.dtype == "bfloat16":
                raise BufferError("numpy has no bfloat16 to hand out on the host: take it on the GPU")
            host: Any = self.numpy()
            return host.__dlpack__()
        owner = self._copied() if copy else self
        return dlpack.export(owner, owner.address, self.dtype, self.shape, self._device.gpu.ordinal)

    def _copied(self) -> DeviceArray:
        copied = DeviceArray(self._device, self.dtype, self.shape)
        with self._device.current():
            stream = self._device.stream()
            try:
                stream.copy(self.address, copied.address, self.nbytes)
                stream.synchronize()
            finally:
                stream.close()
        return copied

    def numpy(self) -> npt.NDArray[np.generic]:
        """A copy on the host."""
        return self._device.fetch(self._buffer, self.shape, numpy_dtype(self.dtype))

    def __repr__(self) -> str:
        return f"<DeviceArray {self.dtype} {self.shape} on {self._device.gpu}>"


def _free(device: Device, buffer: DeviceBuffer) -> None:
    with device.current():
        buffer.free()


class View(NamedTuple):
    """Another library's array, which is to be released when it was read."""

    address: int
    shape: tuple[int, ...]
    release: Any


def view(value: Any, spec: TensorSpec, device: Device, stream: Stream) -> View:
    """The GPU memory of an input that has `__dlpack__` or `__cuda_array_interface__`, safe to read on `stream`.

    Raises InputError for anything else, on another GPU too; InputDtypeError and InputShapeError for a dtype or layout
    that is not the engine's.
    """
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        found = _from_dlpack(value, spec, device, stream)
    elif hasattr(value, "__cuda_array_interface__"):
        found = _from_interface(value.__cuda_array_interface__, device)
    else:
        raise InputError(
            f"input {spec.name!r} is a {type(value).__name__}; expected an array on the GPU with __dlpack__ or "
            "__cuda_array_interface__. `run` takes arrays on the host.",
            tensor=spec.name,
        )
    try:
        _check(found, spec)
    except BaseException:
        found.release()
        raise
    return View(found.address, found.shape, found.release)


def ordinal_of(value: Any) -> int | None:
    """The CUDA device that an array is on; None where it is on none, or does not tell."""
    if not hasattr(value, "__dlpack_device__"):
        return None
    kind, ordinal = (int(part) for part in value.__dlpack_device__())
    return ordinal if kind == dlpack.CUDA else None


def _from_dlpack(value: Any, spec: TensorSpec, device: Device, stream: Stream) -> dlpack.Imported:
    kind, ordinal = (int(part) for part in value.__dlpack_device__())
    if (kind, ordinal) != (dlpack.CUDA, device.gpu.ordinal):
        where = f"CUDA device {ordinal}" if kind == dlpack.CUDA else "the host"
        raise InputError(
            f"input {spec.name!r} is on {where}; the session runs on CUDA device {device.gpu.ordinal}", tensor=spec.name
        )
    try:
        return dlpack.read(value.__dlpack__(stream=stream.handle))
    except (ValueError, BufferError) as error:
        raise InputDtypeError(f"input {spec.name!r}: {error}", tensor=spec.name) from error


def _from_interface(interface: dict[str, Any], device: Device) -> dlpack.Imported:
    # The interface names a stream to wait for, which pycuda cannot do with a stream that is not its own.
    with device.allocating, device.current():
        device.synchronize()
    dtype = np.dtype(interface["typestr"])
    strides = interface.get("strides")
    return dlpack.Imported(
        address=int(interface["data"][0] or 0),
        device=(dlpack.CUDA, device.gpu.ordinal),
        dtype=dtype.name,
        shape=tuple(interface["shape"]),
        strides=None if strides is None else tuple(stride // dtype.itemsize for stride in strides),
        release=lambda: None,
    )


def _check(found: dlpack.Imported, spec: TensorSpec) -> None:
    if found.dtype != spec.dtype:
        raise InputDtypeError(
            f"input {spec.name!r} is of dtype {found.dtype}; expected {spec.dtype}: convert it on the GPU",
            tensor=spec.name,
        )
    fits = len(found.shape) == len(spec.fixed) and all(
        wanted in (None, size) for size, wanted in zip(found.shape, spec.fixed, strict=True)
    )
    if not fits:
        raise InputShapeError(f"input {spec.name!r} has the shape {found.shape}; expected {spec}", tensor=spec.name)
    expected = tuple(int(np.prod(found.shape[axis + 1 :], dtype=np.int64)) for axis in range(len(found.shape)))
    actual = found.strides or expected
    if any(size > 1 and actual[axis] != expected[axis] for axis, size in enumerate(found.shape)):
        raise InputShapeError(
            f"input {spec.name!r} is not contiguous: pass `.contiguous()` or a copy of it", tensor=spec.name
        )
