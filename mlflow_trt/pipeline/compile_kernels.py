"""Kernels in a model: TensorRT-RTX compiles them on the GPU of this machine, and machines like it need not do it again.

Everything that has to be decided and written is done on bytes. What needs a GPU is behind a protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.core.compatibility import check_targets, kernels_fit, why_not
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.types import Distribution, EngineRecord, Gpu
from mlflow_trt.errors import (
    EngineMismatchError,
    ExecutionError,
    OptionError,
    RuntimeUnavailableError,
)
from mlflow_trt.runtime.cuda.device import open_device
from mlflow_trt.store.folder import ModelFolder, read_folder
from mlflow_trt.store.load import session_of
from mlflow_trt.store.record import Record
from mlflow_trt.store.write_folder import add_kernels_file

_log = get_logger(__name__)


class KernelCompiler(Protocol):
    """A GPU that kernels can be compiled on."""

    @property
    def gpu(self) -> Gpu: ...

    @property
    def driver(self) -> str | None: ...

    def compile_kernels(self, folder: ModelFolder, engine: EngineRecord) -> bytes:
        """The kernels for every batch size of every profile, as TensorRT-RTX serializes them.

        Raises what running the engine raises.
        """
        ...


class GpuCompiler:
    """The GPU of this machine.

    Raises RuntimeUnavailableError, or MissingDependencyError which is one, where there is none that can be used.
    """

    def __init__(self, settings: LoadSettings) -> None:
        # With lazy kernels a run ends before its own are compiled.
        self._settings = replace(settings, kernel_specialization="eager")
        self._tensorrt = trt.load(Distribution.TENSORRT_RTX)
        self._device = open_device(settings.first_device)

    @property
    def gpu(self) -> Gpu:
        return self._device.gpu

    @property
    def driver(self) -> str | None:
        return self._device.hardware.driver

    def compile_kernels(self, folder: ModelFolder, engine: EngineRecord) -> bytes:
        # Not the user's cache, which may hold kernels for shapes that others ran.
        store = _Memory()
        with session_of(
            folder,
            engine,
            folder.read_plan(engine),
            tensorrt=self._tensorrt,
            device=self._device,
            settings=self._settings,
            store=store,
        ) as session:
            session.warm_up()
        if not store.kernels:
            raise ExecutionError(f"{self._tensorrt} gave no kernels for {engine.file}; leave store_kernels out")
        return store.kernels


class _Memory:
    """A KernelStore that nobody else sees."""

    kernels: bytes | None = None

    def read(self) -> list[bytes]:
        return []

    def update(self, merge: Callable[[list[bytes]], bytes | None]) -> None:
        self.kernels = merge([])


def check_kernels(
    recipe: Recipe | None, settings: LoadSettings, compiler: KernelCompiler | None = None
) -> KernelCompiler:
    """What compiles the kernels of a model that is made by this recipe. Called before any work is done.

    Args:
        recipe: None is for an engine that is built for the GPU of this machine, whichever that is.
        compiler: None takes the GPU of this machine.

    Raises:
        OptionError: TensorRT compiles everything when it builds.
        RecipeError: this machine's GPU is none of the targets.
        RuntimeUnavailableError: there is no GPU to compile on; MissingDependencyError: or no package to do it with.
    """
    try:
        tensorrt = trt.load()
        if not tensorrt.is_rtx:
            raise OptionError(
                f"store_kernels is for TensorRT-RTX, and {tensorrt} compiles all kernels when it builds the engine; "
                f"leave it out, or build with TensorRT-RTX ({trt.DISTRIBUTION_VARIABLE}=tensorrt_rtx)",
                option="store_kernels",
            )
        compiler = compiler or GpuCompiler(settings)
    except RuntimeUnavailableError as error:
        raise error.with_advice(
            wanted="store_kernels compiles on a GPU",
            advice="Log the model on a machine like those that will run it, or leave store_kernels out: they then "
            "compile at first use.",
        ) from error
    if recipe is not None:
        check_targets(recipe.targets, compiler.gpu, what="store_kernels compiles", otherwise="leave store_kernels out")
    return compiler


def has_kernels(record: Record, gpu: Gpu) -> bool:
    """Whether the engine that would be loaded on this GPU comes with kernels for it."""
    tensorrt = trt.load(Distribution.TENSORRT_RTX)
    for engine in record.engines:
        if why_not(engine, tensorrt.distribution, tensorrt.version, gpu) is None:
            return engine.kernels is not None and kernels_fit(engine.kernels, tensorrt.version, gpu)
    return False


def store_kernels(path: Path, compiler: KernelCompiler) -> Record:
    """Compile the kernels of the engine that fits the compiler's GPU into a model folder that was not logged yet.

    Raises EngineMismatchError where none fits, and what running it raises.
    """
    folder = read_folder(path)
    tensorrt = trt.load(Distribution.TENSORRT_RTX)
    reasons = []
    for engine in folder.record.engines:
        reason = why_not(engine, tensorrt.distribution, tensorrt.version, compiler.gpu)
        if reason is None:
            _log.info("Compiling the kernels of %s on %s ...", engine, compiler.gpu)
            kernels = compiler.compile_kernels(folder, engine)
            _log.info("Stored %.1f MB of kernels with the model", len(kernels) / 1e6)
            return add_kernels_file(path, engine, kernels, gpu=compiler.gpu, driver=compiler.driver)
        reasons.append(f"{engine.file}: {reason}")
    raise EngineMismatchError(
        f"store_kernels: no engine fits {compiler.gpu} and {tensorrt} ({'; '.join(reasons)}); build one that does, or "
        "leave store_kernels out",
        reasons=reasons,
    )
