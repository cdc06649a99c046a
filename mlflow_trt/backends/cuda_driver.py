"""The CUDA driver library, and which GPUs it sees.

It is there wherever a GPU can be used: neither pycuda nor the CUDA toolkit is needed to find out that they are
missing. Source: the CUDA driver API, https://docs.nvidia.com/cuda/cuda-driver-api/.
"""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlflow_trt.core.forking import generation
from mlflow_trt.core.types import ComputeCapability, Gpu

_LIBRARY = "libcuda.so.1"
_DRIVER_RELEASE = Path("/sys/module/nvidia/version")
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76
_NO_GPU = "see whether nvidia-smi lists one here; a container gets it by `docker run --gpus all`"
_UNFIT_LIBRARIES = (
    "its libraries are of another release than the kernel's module, as after an update or in a container: see whether "
    "nvidia-smi works here, and restart the machine after an update"
)
_ADVICE = {
    2: "another process holds the GPU's memory: nvidia-smi lists who",
    100: _NO_GPU,
    101: "CUDA_VISIBLE_DEVICES names a GPU that is not there",
    803: _UNFIT_LIBRARIES,
    804: _UNFIT_LIBRARIES,
    999: "see whether nvidia-smi works here; else load the module nvidia_uvm again, or restart the machine",
}
"""What to do where the driver does not start, by its CUresult."""
_initialized_in: int | None = None


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The driver's release, the newest CUDA version it supports, and its GPUs; or the `problem` that hides them."""

    driver: str | None = None
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    problem: str | None = None


def probe() -> Hardware:
    """Ask the driver. Heeds CUDA_VISIBLE_DEVICES. Initializes CUDA in this process, so do not fork afterwards."""
    global _initialized_in  # noqa: PLW0603  # CUDA is initialized for the process
    if _initialized_in is not None and _initialized_in != generation():
        return Hardware(
            driver=_driver_release(),
            problem="this process was forked from one that had used CUDA, which CUDA does not survive; start processes "
            "with multiprocessing's 'spawn' or 'forkserver', or use CUDA in the forked ones only",
        )
    try:
        library = DriverLibrary()
    except OSError:
        return Hardware(problem=f"no NVIDIA driver: {_LIBRARY} was not found")
    try:
        library.call("cuInit", 0)
        _initialized_in = generation()
        return _ask(library)
    except DriverError as error:
        advice = _ADVICE.get(error.status)
        return Hardware(driver=_driver_release(), problem=f"{error} ({advice})" if advice else str(error))


class DriverError(Exception):
    """The driver refused a call; `status` is its CUresult."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class DriverLibrary:
    """Raises OSError where there is none."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(_LIBRARY)
        self._held = ctypes.PyDLL(_LIBRARY)

    def call(self, function: str, *arguments: object) -> None:
        """Raises DriverError."""
        self.check(function, getattr(self._library, function)(*arguments))

    def held(self, function: str) -> Callable[..., int]:
        """A function that keeps Python's interpreter lock, for what takes less time than getting the lock back."""
        found: Callable[..., int] = getattr(self._held, function)
        return found

    def address(self, function: str) -> int:
        """Where a function is, for code that calls it without Python."""
        return ctypes.cast(getattr(self._library, function), ctypes.c_void_p).value or 0

    def check(self, function: str, status: int) -> None:
        """Raises DriverError for what is not success."""
        if status != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            reason = text.value.decode() if text.value else f"error {status}"
            raise DriverError(f"the CUDA driver answers {function} with: {reason}", status)


def _ask(library: DriverLibrary) -> Hardware:
    call = library.call
    version = ctypes.c_int()
    call("cuDriverGetVersion", ctypes.byref(version))
    count = ctypes.c_int()
    call("cuDeviceGetCount", ctypes.byref(count))

    def gpu(ordinal: int) -> Gpu:
        device = ctypes.c_int()
        call("cuDeviceGet", ctypes.byref(device), ordinal)
        name = ctypes.create_string_buffer(256)
        call("cuDeviceGetName", name, len(name), device)
        major, minor = ctypes.c_int(), ctypes.c_int()
        call("cuDeviceGetAttribute", ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
        call("cuDeviceGetAttribute", ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
        memory = ctypes.c_size_t()
        call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        return Gpu(
            ordinal=ordinal,
            name=name.value.decode(),
            compute_capability=ComputeCapability(major.value, minor.value),
            memory=memory.value,
            uuid=_uuid_of(library, device),
        )

    return Hardware(
        driver=_driver_release(),
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
        gpus=tuple(gpu(ordinal) for ordinal in range(count.value)),
        problem=None if count.value else f"the CUDA driver sees no GPU ({_NO_GPU})",
    )


def _uuid_of(library: DriverLibrary, device: ctypes.c_int) -> str:
    """As CUDA_VISIBLE_DEVICES takes it. Of a MIG instance, the first version of the function tells the whole GPU's."""
    whole, own = (ctypes.c_ubyte * 16)(), (ctypes.c_ubyte * 16)()
    library.call("cuDeviceGetUuid", whole, device)
    try:
        library.call("cuDeviceGetUuid_v2", own, device)
    except AttributeError:  # drivers before CUDA 11.4 lack it
        own = whole
    kind = "GPU" if bytes(own) == bytes(whole) else "MIG"
    return f"{kind}-{uuid.UUID(bytes=bytes(own))}"


def _driver_release() -> str | None:
    try:
        return _DRIVER_RELEASE.read_text().strip()
    except OSError:
        return None
