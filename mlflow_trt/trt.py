"""TensorRT itself: which distribution is installed, its versions, its logger, its types.

The only module that imports `tensorrt` or `tensorrt_rtx`, and the only one that knows how they differ.
"""

from __future__ import annotations

import collections
import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

from mlflow_trt import trt_api
from mlflow_trt._logging import get_logger
from mlflow_trt.spec import ComputeCapability, Distribution, HardwareCompatibility, ProfilingVerbosity

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

_log = get_logger(__name__)


def is_installed(module: str) -> bool:
    """Whether a module can be imported; a folder of that name that merely lies on the path does not count."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


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
    from mlflow_trt.errors import MissingDependencyError, RecipeError, RuntimeUnavailableError

    preferred = os.environ.get(DISTRIBUTION_VARIABLE)
    if preferred and preferred not in set(Distribution):
        raise RecipeError(
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


class TensorRT:
    """One imported distribution, typed."""

    def __init__(self, distribution: Distribution, module: Any) -> None:
        self.distribution = distribution
        self.version: str = module.__version__
        self._module = module
        self.log = _new_logger(module)
        # Some ONNX operators of the tensorrt distribution are plugins; TensorRT-RTX has none.
        if not self.is_rtx and not module.init_libnvinfer_plugins(self.log, ""):
            raise RuntimeError(f"its plugins cannot be loaded: {self.log.last_error()}")

    def __str__(self) -> str:
        return f"{self.distribution.label} {self.version}"

    @property
    def version_info(self) -> tuple[int, ...]:
        """The numbers of the version, major and minor."""
        return tuple(map(int, self.version.split(".")[:2]))

    @property
    def is_rtx(self) -> bool:
        return self.distribution is Distribution.TENSORRT_RTX

    # ---- objects

    def builder(self) -> trt_api.Builder:
        return cast(trt_api.Builder, self._module.Builder(self.log))

    def network(self, builder: trt_api.Builder) -> trt_api.INetworkDefinition:
        """A strongly typed network: the only kind that TensorRT 11 and TensorRT-RTX have."""
        return builder.create_network(1 << int(self._module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def parser(self, network: trt_api.INetworkDefinition) -> trt_api.OnnxParser:
        return cast(trt_api.OnnxParser, self._module.OnnxParser(network, self.log))

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
        return _new_progress_monitor(self._module, report)

    def profiler(self, report: Callable[[str, float], None]) -> trt_api.IProfiler:
        """A profiler that calls `report(layer, milliseconds)`. Keep a reference while the context runs."""
        return _new_profiler(self._module, report)

    def layer_information(self, engine: trt_api.ICudaEngine, context: trt_api.IExecutionContext) -> str:
        """What the engine inspector tells, as JSON."""
        inspector = engine.create_engine_inspector()
        inspector.execution_context = context
        return inspector.get_engine_information(self._module.LayerInformationFormat.JSON)

    def output_allocator(
        self, reallocate: Callable[[str, int], int], notify_shape: Callable[[str, tuple[int, ...]], None]
    ) -> object:
        """An allocator for outputs whose size only the execution knows: `reallocate(name, nbytes)` gives an address."""
        return _new_output_allocator(self._module, reallocate, notify_shape)

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
        return _DTYPES[engine.get_tensor_dtype(name).name]

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

    def execution_context(
        self, engine: trt_api.ICudaEngine, kernel_specialization: str
    ) -> trt_api.IExecutionContext | None:
        """A new execution context; `kernel_specialization` is `eager` or `lazy`, which only TensorRT-RTX heeds."""
        if not self.is_rtx:
            return engine.create_execution_context()
        config = cast(trt_api.RtxICudaEngine, engine).create_runtime_config()
        strategies = self._module.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = getattr(strategies, kernel_specialization.upper())
        return engine.create_execution_context(config)


class _Log:
    """Keeps the last error lines that TensorRT wrote, and passes everything on to Python's logging at DEBUG.

    TensorRT has one logger for the whole process, and sessions run in many threads: each line is kept with its thread.
    """

    def __init__(self) -> None:
        self._errors: collections.deque[tuple[int, str]] = collections.deque(maxlen=100)
        self._lock = threading.Lock()

    def keep(self, message: str) -> None:
        with self._lock:
            self._errors.append((threading.get_ident(), message.strip()))

    def errors(self) -> list[str]:
        """The error lines of the calling thread, and of TensorRT's own threads, since the last call; oldest first."""
        others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        with self._lock:
            mine = [line for thread, line in self._errors if thread not in others]
            kept = [(thread, line) for thread, line in self._errors if thread in others]
            self._errors.clear()
            self._errors.extend(kept)
        return mine

    def last_error(self) -> str:
        """The newest of these lines, or a word that there is none."""
        lines = self.errors()
        return lines[-1] if lines else "TensorRT's log says nothing more"


def _new_logger(module: Any) -> Any:
    severity = cast(trt_api.Severity, module.ILogger.Severity)

    class Logger(_Log, module.ILogger):  # type: ignore[misc]  # the base class comes from the imported distribution
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            _Log.__init__(self)

        def log(self, level: trt_api.Enumerator, message: str) -> None:
            # Errors are quoted by whoever finds that a call failed; here they would only be said twice.
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                self.keep(message)
            if level != severity.VERBOSE:
                _log.debug("%s", message.strip())

    return Logger()


def _new_progress_monitor(module: Any, report: Callable[[str, float], None]) -> trt_api.IProgressMonitor:
    class Phase:
        def __init__(self, name: str, steps: int) -> None:
            self.name = name
            self.steps = max(steps, 1)
            self.done = 0

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # as above
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._phases: list[Phase] = []
            self._lock = threading.Lock()

        def phase_start(self, phase_name: str, _parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases.append(Phase(phase_name, num_steps))
                self._report()

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                for phase in self._phases:
                    if phase.name == phase_name:
                        phase.done = min(step + 1, phase.steps)
                self._report()
            return True

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases = [phase for phase in self._phases if phase.name != phase_name]

        def _report(self) -> None:
            fraction = 0.0
            for phase in reversed(self._phases):
                fraction = min((phase.done + fraction) / phase.steps, 1.0)
            report(self._phases[-1].name, fraction)

    return cast(trt_api.IProgressMonitor, Monitor())


def _new_profiler(module: Any, report: Callable[[str, float], None]) -> trt_api.IProfiler:
    class Profiler(module.IProfiler):  # type: ignore[misc]  # as above
        def __init__(self) -> None:
            module.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            report(layer_name, ms)

    return cast(trt_api.IProfiler, Profiler())


def _new_output_allocator(
    module: Any, reallocate: Callable[[str, int], int], notify: Callable[[str, tuple[int, ...]], None]
) -> object:
    class OutputAllocator(module.IOutputAllocator):  # type: ignore[misc]  # as above
        def __init__(self) -> None:
            module.IOutputAllocator.__init__(self)

        def reallocate_output_async(
            self, tensor_name: str, _memory: int, size: int, _alignment: int, _stream: int
        ) -> int:
            return reallocate(tensor_name, size)

        def notify_shape(self, tensor_name: str, shape: Sequence[int]) -> None:
            notify(tensor_name, tuple(shape))

    return OutputAllocator()
