"""Which package calls the CUDA driver: pycuda where it is installed, else NVIDIA's cuda-bindings.

pycuda is compiled on installation and needs the CUDA toolkit; cuda-bindings are wheels, and need the driver alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mlflow_trt.errors import MissingDependencyError, OptionError

PACKAGE_VARIABLE = "MLFLOW_TRT_CUDA_PACKAGE"
"""The environment variable that names the package to take, `pycuda` or `cuda-bindings`."""


class DeviceMemory(Protocol):
    """Memory on the GPU. `int()` gives its address."""

    def __int__(self) -> int: ...

    def free(self) -> None: ...


class Driver(Protocol):
    """What is used of the CUDA driver, under the names that `pycuda.driver` has for it.

    But for `init` and `Device`, a context is current where anything here is called. Streams and events are freed when
    nobody refers to them any more.
    """

    @property
    def Error(self) -> type[Exception]:  # noqa: N802  # pycuda's name
        """What everything raises that fails."""

    @property
    def MemoryError(self) -> type[Exception]:  # noqa: N802  # pycuda's name
        """The kind of it for which memory was lacking."""

    @property
    def Device(self) -> Any:  # noqa: N802  # pycuda's name
        """`Device(ordinal).retain_primary_context()` has a method `push`."""

    @property
    def Context(self) -> Any:  # noqa: N802  # pycuda's name
        """Has `pop()` and `synchronize()`, for the context that is current."""

    @property
    def Stream(self) -> Any:  # noqa: N802  # pycuda's name
        """`Stream()` has `handle`, `synchronize()` and `wait_for_event(event)`."""

    @property
    def Event(self) -> Any:  # noqa: N802  # pycuda's name
        """`Event()` has `record(stream)`, `synchronize()` and `time_since(earlier)` in milliseconds."""

    def init(self) -> None: ...

    def mem_alloc(self, nbytes: int) -> DeviceMemory: ...

    def pagelocked_empty(self, shape: int, dtype: npt.DTypeLike) -> npt.NDArray[np.uint8]:
        """An array in page-locked memory, whose `base` has a method `free`."""

    def memcpy_htod_async(self, dest: int, src: npt.NDArray[np.uint8], stream: Any) -> None: ...

    def memcpy_dtoh_async(self, dest: npt.NDArray[np.uint8], src: int, stream: Any) -> None: ...

    def memcpy_dtod_async(self, dest: int, src: int, size: int, stream: Any) -> None: ...

    def memcpy_dtoh(self, dest: npt.NDArray[np.uint8], src: int) -> None: ...


def load_driver() -> tuple[str, Driver]:
    """The package that calls the driver, and its calls.

    Raises MissingDependencyError where there is none, OptionError where the environment names one that is unknown.
    """
    wanted = os.environ.get(PACKAGE_VARIABLE)
    if wanted and wanted not in _LOADERS:
        raise OptionError(
            f"{PACKAGE_VARIABLE} is {wanted!r}; choose one of {', '.join(_LOADERS)}", option=PACKAGE_VARIABLE
        )
    problems = []
    for package in (wanted,) if wanted else _LOADERS:
        try:
            return package, _LOADERS[package]()
        except ImportError as error:
            problems.append(f"{package} cannot be imported ({error})")
    raise MissingDependencyError(
        f"nothing can call the CUDA driver: {' and '.join(problems)}. `pip install 'mlflow-trt[cuda-core]'` brings "
        "wheels; `pip install 'mlflow-trt[cuda]'` compiles pycuda, which needs the CUDA toolkit (nvcc).",
        packages=(wanted,) if wanted else tuple(_LOADERS),
    )


def _load_pycuda() -> Driver:
    import pycuda.driver  # noqa: TID251  # the one place

    driver: Driver = pycuda.driver
    return driver


def _load_cuda_bindings() -> Driver:
    from cuda.bindings import driver  # noqa: TID251  # the one place

    from mlflow_trt.runtime.cuda.bindings_driver import BindingsDriver

    return BindingsDriver(driver)


_LOADERS: Mapping[str, Callable[[], Driver]] = MappingProxyType(
    {"pycuda": _load_pycuda, "cuda-bindings": _load_cuda_bindings}
)
