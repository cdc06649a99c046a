"""What takes a GPU away from a process: a kernel that crashes, and others who hold its memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from mlflow_trt.backends.cuda_driver import DriverLibrary
from mlflow_trt.runtime.cuda.device import open_device

_TRAP = b".version 7.0\n.target sm_70\n.address_size 64\n.visible .entry crash() { trap; ret; }\0"


def lose(ordinal: int = 0) -> None:
    """Run a kernel that crashes: CUDA gives this GPU up until the process ends."""
    driver = DriverLibrary()
    module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    with open_device(ordinal).current():
        driver.call("cuModuleLoadData", ctypes.byref(module), _TRAP)
        driver.call("cuModuleGetFunction", ctypes.byref(kernel), module, b"crash")
        driver.call("cuLaunchKernel", kernel, 1, 1, 1, 1, 1, 1, 0, None, None, None)


def free_bytes() -> int:
    """Of the first GPU's memory, whoever has the rest."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with open_device(0).current():
        DriverLibrary().call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value


@contextlib.contextmanager
def left_free(nbytes: int) -> Iterator[None]:
    """Somebody else takes the first GPU's memory, but for so much."""
    device = open_device(0)
    left = free_bytes()
    with device.current():
        taken = device.device_buffer()
        taken.reserve(left - nbytes)
    try:
        yield
    finally:
        with device.current():
            taken.free()


def environment() -> dict[str, str]:
    """For processes that import what these tests do, this module among it."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}


if __name__ == "__main__":
    with left_free(int(sys.argv[1])):
        sys.stdout.write("taken\n")
        sys.stdout.flush()
        sys.stdin.read()
