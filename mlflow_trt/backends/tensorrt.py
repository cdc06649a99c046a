"""TensorRT itself: which distribution is installed, its versions, its logger, its types.

The only module that imports `tensorrt` or `tensorrt_rtx`, and the only one that knows how they differ.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from packaging.version import Version

from mlflow_trt.backends import tensorrt_api as trt_api
from mlflow_trt.backends import tensorrt_callbacks as trt_callbacks
from mlflow_trt.core.optional import is_installed
from mlflow_trt.core.types import ComputeCapability, Distribution, HardwareCompatibility, ProfilingVerbosity

DISTRIBUTION_VARIABLE = "MLFLOW_TRT_DISTRIBUTION"
"""The environment variable that chooses between `tensorrt` and `tensorrt_rtx` where both are installed."""

INSTALL_HINT = (
    "Install NVIDIA's TensorRT-RTX with `pip install 'mlflow-trt[rtx]'`, "
    "or TensorRT with `pip install 'mlflow-trt[tensorrt]'`."
)

# TensorRT's names on the left. nptype() of its own raises for the types that numpy lacks.
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


def installed() -> tuple[Distribution, ...]:
    """The distributions that are installed, the preferred one first. Imports none of them."""
    found = [distribution for distribution in Distribution if is_installed(distribution.value)]
    preferred = os.environ.get(DISTRIBUTION_VARIABLE)
    if preferred:
        found.sort(key=lambda d: d.value != preferred)
    return tuple(found)


def load(distribution: Distribution | None = None) -> TensorRT:
    """Import `distribution`, or the preferred one of those installed.

    Raises MissingDependencyError where it is not installed and RuntimeUnavailableError where its import fails.
    """
    # Not at the top of the file: errors imports mlflow, which takes seconds, and the build process needs neither.
    from mlflow_trt.errors import MissingDependencyError, OptionError, RuntimeUnavailableError

    preferred = os.environ.get(DISTRIBUTION_VARIABLE)
    if preferred and preferred not in set(Distribution):
        raise OptionError(
            f"{DISTRIBUTION_VARIABLE} is {preferred!r}; expected one of {', '.join(Distribution)}",
            option=DISTRIBUTION_VARIABLE,
        )
    if distribution is None:
        candidates = installed()
        if not candidates or (preferred and candidates[0].value != preferred):
            missing = preferred or "TensorRT"
            raise MissingDependencyError(
                f"{missing} is not installed. {INSTALL_HINT}", packages=("tensorrt-rtx", "tensorrt")
            )
        distribution = candidates[0]
    elif not is_installed(distribution.value):
        raise MissingDependencyError(
            f"{distribution.label} is not installed: `pip install {distribution.requirement}`",
            packages=(distribution.requirement,),
        )
    try:
        return import_distribution(distribution)
    except Exception as error:  # libraries that do not fit together fail in many ways
        others = [other for other in installed() if other is not distribution]
        way_out = f", or use the other with {DISTRIBUTION_VARIABLE}={others[0]}" if others else ""
        raise RuntimeUnavailableError(
            f"{distribution.label} is installed but cannot be imported: {type(error).__name__}: {error}. "
            f"Reinstall {distribution.requirement}{way_out}."
        ) from error


@functools.cache
def import_distribution(distribution: Distribution) -> TensorRT:
    """Import one distribution, once a process. Raises what the import raises."""
    return TensorRT(distribution, importlib.import_module(distribution.value))


class PluginError(Exception):
    """A library with plugins cannot be loaded; the text says which, and why."""


class TensorRT:
    """One imported distribution, typed."""

    def __init__(self, distribution: Distribution, module: Any) -> None:
        self.distribution = distribution
        self.version: str = module.__version__
        self._module = module
        self.log = trt_callbacks.new_logger(module)
        self._plugins: set[str] = set()
        # Some ONNX operators of the tensorrt distribution are plugins; TensorRT-RTX has none.
        if not self.is_rtx and not module.init_libnvinfer_plugins(self.log, ""):
            raise RuntimeError(f"its plugins cannot be loaded: {self.log.last_error()}")

    def __str__(self) -> str:
        return f"{self.distribution.label} {self.version}"

    @property
    def version_info(self) -> tuple[int, ...]:
        """The numbers of the version, major and minor."""
        return Version(self.version).release[:2]

    @property
    def is_rtx(self) -> bool:
        return self.distribution is Distribution.TENSORRT_RTX

    def load_plugins(self, libraries: Iterable[str]) -> None:
        """Load libraries with plugins into this process, each once; they stay until it ends.

        Raises PluginError for one that cannot be loaded. Loading executes what is in a library.
        """
        for library in libraries:
            path = os.path.realpath(library)
            if path in self._plugins:
                continue
            registry = cast(trt_api.IPluginRegistry, self._module.get_plugin_registry())
            if registry.load_library(path) is None:
                raise PluginError(f"{self} cannot load the plugins in {library}: {self.log.last_error()}")
            self._plugins.add(path)

    # ---- objects

    def builder(self) -> trt_api.Builder:
        return cast(trt_api.Builder, self._module.Builder(self.log))

    def network(self, builder: trt_api.Builder) -> trt_api.INetworkDefinition:
        """A strongly typed network: the only kind that TensorRT 11 and TensorRT-RTX have."""
        return builder.create_network(1 << int(self._module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def parser(self, network: trt_api.INetworkDefinition) -> trt_api.OnnxParser:
        return cast(trt_api.OnnxParser, self._module.OnnxParser(network, self.log))

    def allow_decomposed_attention(self, network: trt_api.INetworkDefinition) -> None:
        """Let attention run as several kernels where there is no fused one: by default nothing is built then."""
        boundary = getattr(self._module, "IAttentionBoundaryLayer", None)  # TensorRT before 10.14 lacks it
        for index in range(network.num_layers if boundary is not None else 0):
            layer: Any = network.get_layer(index)
            if layer.type.name == "ATTENTION_INPUT":
                layer.__class__ = boundary  # how TensorRT's bindings tell what kind of layer a plain one is
                layer.attention.decomposable = True

    def runtime(self, *, allow_engine_host_code: bool = False) -> trt_api.Runtime:
        """A runtime, which by default refuses plans that bring code for the CPU."""
        runtime = cast(trt_api.Runtime, self._module.Runtime(self.log))
        if allow_engine_host_code:
            runtime.engine_host_code_allowed = True
        return runtime

    def refit(self, engine: trt_api.ICudaEngine, model: str) -> str | None:
        """Put the weights of the ONNX file `model` into an engine that was built without; returns what went wrong."""
        refitter = cast(trt_api.Refitter, self._module.Refitter(engine, self.log))
        parser = cast(trt_api.OnnxParserRefitter, self._module.OnnxParserRefitter(refitter, self.log))
        if not parser.refit_from_file(model):
            errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
            return "; ".join(errors) or self.log.last_error()
        missing = refitter.get_missing_weights()
        if missing:
            return f"{len(missing)} weights are not in the model, {missing[0]} among them"
        return None if refitter.refit_cuda_engine() else self.log.last_error()

    def progress_monitor(self, report: Callable[[str, float], None]) -> trt_api.IProgressMonitor:
        """A monitor that calls `report(phase, fraction of the whole)`. Keep a reference while the build runs."""
        return trt_callbacks.new_progress_monitor(self._module, report)

    def profiler(self, report: Callable[[str, float], None]) -> trt_api.IProfiler:
        """A profiler that calls `report(layer, milliseconds)`. Keep a reference while the context runs."""
        return trt_callbacks.new_profiler(self._module, report)

    def layer_information(self, engine: trt_api.ICudaEngine, context: trt_api.IExecutionContext) -> str:
        """What the engine inspector tells, as JSON."""
        inspector = engine.create_engine_inspector()
        inspector.execution_context = context
        return inspector.get_engine_information(self._module.LayerInformationFormat.JSON)

    def output_allocator(
        self, reallocate: Callable[[str, int], int], notify_shape: Callable[[str, tuple[int, ...]], None]
    ) -> object:
        """An allocator for outputs whose size only the execution knows: `reallocate(name, nbytes)` gives an address."""
        return trt_callbacks.new_output_allocator(self._module, reallocate, notify_shape)

    # ---- enumerations

    @property
    def builder_flag(self) -> trt_api.BuilderFlag:
        return cast(trt_api.BuilderFlag, self._module.BuilderFlag)

    def memory_pool(self, name: str) -> trt_api.Enumerator:
        return cast(trt_api.Enumerator, getattr(self._module.MemoryPoolType, name.upper()))

    def profiling_verbosity(self, verbosity: ProfilingVerbosity) -> trt_api.Enumerator:
        return cast(trt_api.Enumerator, getattr(self._module.ProfilingVerbosity, verbosity.value.upper()))

    def hardware_compatibility(self, level: HardwareCompatibility) -> trt_api.Enumerator:
        return cast(trt_api.Enumerator, getattr(self._module.HardwareCompatibilityLevel, level.value.upper()))

    def tactic_sources(self, names: Sequence[str]) -> int:
        """The bit mask of tactic sources by name. Raises KeyError for a name this release does not have."""
        members = self._module.TacticSource.__members__
        return sum(1 << int(members[name]) for name in names)

    def compute_capabilities(self) -> dict[str, trt_api.Enumerator]:
        """The targets that TensorRT-RTX can build for, by name (`sm86`). Empty for the other distribution."""
        if not self.is_rtx:
            return {}
        members: dict[str, trt_api.Enumerator] = self._module.ComputeCapability.__members__
        return {name.lower(): value for name, value in members.items() if name.startswith("SM")}

    def is_input(self, engine: trt_api.ICudaEngine, name: str) -> bool:
        return bool(engine.get_tensor_mode(name) == self._module.TensorIOMode.INPUT)

    def is_on_host(self, engine: trt_api.ICudaEngine, name: str) -> bool:
        """Whether TensorRT reads or writes this tensor in host memory, because shapes are computed from it."""
        return bool(engine.get_tensor_location(name) == self._module.TensorLocation.HOST)

    def dtype(self, engine: trt_api.ICudaEngine, name: str) -> str:
        return self.dtype_name(engine.get_tensor_dtype(name))

    @staticmethod
    def dtype_name(dtype: trt_api.Enumerator) -> str:
        """The name that we have for one of TensorRT's types; TensorRT's own for a type that no model's input has."""
        return _DTYPES.get(dtype.name, dtype.name)

    # ---- what only TensorRT-RTX has

    def set_targets(self, config: trt_api.IBuilderConfig, targets: Sequence[ComputeCapability]) -> bool:
        """Build for these GPUs instead of for the release's default ones; False where TensorRT-RTX refuses one."""
        known = self.compute_capabilities()
        rtx_config = cast(trt_api.RtxIBuilderConfig, config)
        rtx_config.num_compute_capabilities = len(targets)
        accepted = [
            rtx_config.set_compute_capability(known[str(target)], index) for index, target in enumerate(targets)
        ]
        return all(accepted)

    def engine_validity(self, runtime: trt_api.Runtime, plan: bytes) -> str | None:
        """What TensorRT-RTX has against running the plan on this machine, or None.

        It is an opinion: release 1.6 calls engines invalid on Hopper, which is no official target, and runs them.
        """
        if not self.is_rtx:
            return None
        validity, diagnostics = cast(trt_api.RtxRuntime, runtime).get_engine_validity(plan)
        if validity != self._module.EngineValidity.INVALID:
            return None
        known = self._module.EngineInvalidityDiagnostics.__members__
        return ", ".join(name for name, value in known.items() if diagnostics & int(value)) or "INVALID"

    def contexts(self, engine: trt_api.ICudaEngine, kernel_specialization: str, kernels: Sequence[bytes]) -> Contexts:
        """What makes the engine's execution contexts.

        Args:
            engine: the engine.
            kernel_specialization: `eager` or `lazy`. Only TensorRT-RTX heeds this and the next.
            kernels: what `Contexts.kernels` gave in earlier processes; what does not fit this machine is passed over.
        """
        return Contexts(self._module, engine, kernel_specialization, kernels, is_rtx=self.is_rtx)


def _digest(blob: bytes) -> bytes:
    return hashlib.sha256(blob).digest()


class Contexts:
    """Makes execution contexts that bring no scratch memory of their own: `set_device_memory` gives it to them.

    Those of TensorRT-RTX share the kernels that they compile.
    """

    def __init__(
        self,
        module: Any,
        engine: trt_api.ICudaEngine,
        kernel_specialization: str,
        kernels: Sequence[bytes],
        *,
        is_rtx: bool,
    ) -> None:
        self._module = module
        self._engine: trt_api.ICudaEngine | None = engine
        self._config: trt_api.RtxIRuntimeConfig | None = None
        self._cache: trt_api.RtxIRuntimeCache | None = None
        # TensorRT-RTX never gives back what it takes to read kernels: half a megabyte each time.
        self._contained = {_digest(blob) for blob in kernels}
        if is_rtx:
            self._config = self._configured(kernel_specialization)
            self._cache = self._config.create_runtime_cache()
            for blob in kernels:
                self._cache.deserialize(blob)
            self._config.set_runtime_cache(self._cache)

    def new(self) -> trt_api.IExecutionContext | None:
        """A context; None where there is no room for it."""
        engine = cast(trt_api.ICudaEngine, self._engine)
        if self._config is not None:
            return engine.create_execution_context(self._config)
        return engine.create_execution_context(self._module.ExecutionContextAllocationStrategy.USER_MANAGED)

    def kernels(self, others: Sequence[bytes] = ()) -> bytes | None:
        """The kernels compiled so far, and those of `others`, for later processes on a machine like this.

        None for TensorRT, which has compiled everything when it builds the engine.
        """
        if self._cache is None or self._config is None:
            return None
        own = _bytes(self._cache.serialize())
        foreign = [blob for blob in others if _digest(blob) not in self._contained]
        if not foreign:
            self._contained.add(_digest(own))
            return own
        together = self._config.create_runtime_cache()
        for blob in (*foreign, own):
            together.deserialize(blob)
        return _bytes(together.serialize())

    def close(self) -> None:
        """Let go of the engine."""
        self._config = None
        self._cache = None
        self._engine = None

    def _configured(self, kernel_specialization: str) -> trt_api.RtxIRuntimeConfig:
        config = cast(trt_api.RtxICudaEngine, self._engine).create_runtime_config()
        specializations = self._module.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = getattr(specializations, kernel_specialization.upper())
        # Not by itself: we capture the copies along with the engine, and know when the addresses have changed.
        config.cuda_graph_strategy = self._module.CudaGraphStrategy.DISABLED
        allocation = self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        config.set_execution_context_allocation_strategy(allocation)
        return config


def _bytes(memory: trt_api.IHostMemory) -> bytes:
    return bytes(memoryview(cast(Any, memory)))
