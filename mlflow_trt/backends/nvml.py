"""How much memory of GPUs is in use, as nvidia-smi tells it.

Asked of NVIDIA's management library, which comes with the driver, and needs no CUDA context.
Source: https://docs.nvidia.com/deploy/nvml-api/.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from mlflow_trt.core.types import Gpu

_LIBRARY = "libnvidia-ml.so.1"


class _NvmlMemory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def gpu_memory(gpus: Iterable[Gpu]) -> dict[str, tuple[int, int]]:
    """By UUID, the free and the total bytes of those GPUs that the library knows."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return {}
    if library.nvmlInit_v2() != 0:
        return {}
    found = {}
    try:
        for gpu in gpus:
            handle, memory = ctypes.c_void_p(), _NvmlMemory()
            if (
                library.nvmlDeviceGetHandleByUUID(gpu.uuid.encode(), ctypes.byref(handle)) == 0
                and library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0
            ):
                found[gpu.uuid] = (memory.free, memory.total)
    finally:
        library.nvmlShutdown()
    return found
