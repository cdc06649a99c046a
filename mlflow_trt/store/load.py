"""The load policy: model folder and settings in, session out.

What runs is what was asked for, or an error says what to do. The one exception is `runtime="auto"`, which is asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_trt._version import __version__
from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.backends.cuda_driver import probe
from mlflow_trt.convert.engine.builder import build_engine, describe_plugins
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.core.compatibility import kernels_fit, why_not
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.progress_event import Progress
from mlflow_trt.core.scoring_server import advise_cpu, in_server
from mlflow_trt.core.scratch import scratch_folder
from mlflow_trt.core.settings import ALL, OWN, LoadSettings
from mlflow_trt.core.types import (
    BatchAxis,
    Distribution,
    EngineRecord,
    Gpu,
    HardwareCompatibility,
    Interface,
    PluginLibrary,
    TensorSpec,
    Weights,
)
from mlflow_trt.errors import (
    BuildError,
    EngineMismatchError,
    ExecutionError,
    MlflowTrtError,
    RuntimeUnavailableError,
)
from mlflow_trt.runtime.cuda.device import Device, open_device
from mlflow_trt.runtime.session import Session
from mlflow_trt.store import cache, self_test
from mlflow_trt.store.folder import ModelFolder
from mlflow_trt.store.gpu_lease import own_gpu
from mlflow_trt.store.kernel_cache import KernelFile
from mlflow_trt.store.plugins import check_plugins, load_plugins
from mlflow_trt.store.record import Record
from mlflow_trt.store.trust import check_trust

if TYPE_CHECKING:
    from mlflow_trt.runtime.engine.engine import KernelStore
    from mlflow_trt.runtime.tensorrt_session import TensorRTSession

_log = get_logger(__name__)


def open_session(folder: ModelFolder, settings: LoadSettings, progress: Progress | None = None) -> Session:
    """Load the model with the runtime that `settings` ask for.

    Raises:
        RuntimeUnavailableError: there is no GPU, or a package is missing (MissingDependencyError).
        EngineMismatchError: no stored engine fits and `on_mismatch` is `error`.
        IntegrityError: a file is not the one that was logged, or not that which is expected, whatever the runtime;
            SignatureError: nobody vouches for it who was to.
        BuildError, ExecutionError: an engine could not be rebuilt, or not be loaded.
        SelfTestError: the engine answers wrongly.
    """
    check_trust(folder, settings)
    if settings.runtime == "onnxruntime":
        return _open_onnxruntime(folder, settings)
    try:
        return open_tensorrt(folder, settings, progress)
    except (RuntimeUnavailableError, EngineMismatchError, BuildError, ExecutionError) as error:
        if settings.runtime != "auto":
            if isinstance(error, RuntimeUnavailableError):
                raise error.with_advice(advice=advise_cpu()) from error
            raise
        _log.warning("Running on ONNX Runtime, on the CPU, since TensorRT cannot run here: %s", error.message)
        session = _open_onnxruntime(folder, settings)
        session.fallback_reason = error.message
        return session


def _open_onnxruntime(folder: ModelFolder, settings: LoadSettings) -> Session:
    from mlflow_trt.runtime.onnxruntime_session import OnnxRuntimeSession

    record = folder.record
    axis = record.batch_axis
    limits = [profile.ranges[axis.inputs[0]].max[0] for profile in record.profiles] if axis else []
    source = folder.checked_model(record.source)
    return OnnxRuntimeSession(
        source,
        record.inputs,
        record.outputs,
        batch_axis=axis,
        largest_batch=max(limits, default=None),
        max_batch_delay_ms=settings.max_batch_delay_ms,
        providers=settings.onnx_execution_providers,
        session_options=settings.onnx_session_options,
    )


def open_tensorrt(folder: ModelFolder, settings: LoadSettings, progress: Progress | None = None) -> Session:
    """Load the model with TensorRT, whatever `settings` say of the runtime. Raises what `open_session` does."""
    if isinstance(settings.device, int):
        return _open_on(settings.device, folder, settings, progress)
    gpus = probe().gpus
    if settings.device == OWN:
        return _open_on(own_gpu(gpus).ordinal if gpus else 0, folder, settings, progress)
    from mlflow_trt.runtime.replicas import ReplicaSession

    sessions: dict[int, Session] = {}
    failures: dict[int, MlflowTrtError] = {}
    with contextlib.ExitStack() as stack:
        # One after the other: what the first compiles, and keeps, serves those that are like it.
        for ordinal in settings.ordinals([gpu.ordinal for gpu in gpus] or [0]):
            try:
                sessions[ordinal] = stack.enter_context(_open_on(ordinal, folder, settings, progress))
            except (RuntimeUnavailableError, EngineMismatchError, BuildError, ExecutionError) as error:
                failures[ordinal] = error
                if settings.device != ALL:
                    raise
        if not sessions:
            raise failures[min(failures)]
        for ordinal, failure in failures.items():
            _log.warning("The model runs on CUDA devices %s, not on %d: %s", [*sessions], ordinal, failure.message)
        stack.pop_all()
    return ReplicaSession(sessions) if len(sessions) > 1 else next(iter(sessions.values()))


def _open_on(ordinal: int, folder: ModelFolder, settings: LoadSettings, progress: Progress | None) -> Session:
    """A session on one GPU."""
    record = folder.record
    tensorrt = trt.load(_distribution_for(folder))
    plugins = check_plugins(record.engines, settings.plugins)
    device = open_device(ordinal)
    load_plugins(tensorrt, settings.plugins)

    def session(engine: EngineRecord, plan: bytes, kernels: tuple[bytes, ...] = ()) -> Session:
        store = kernel_file(engine, tensorrt, device, shipped=kernels)
        opened = session_of(folder, engine, plan, tensorrt=tensorrt, device=device, settings=settings, store=store)
        opened.plan_sha256 = engine.sha256
        try:
            if settings.self_test:
                self_test.check(opened, folder, _identity(engine, kernels, tensorrt, device, settings, plugins))
            if _warm_up(settings) == "on":
                opened.warm_up()
        except BaseException:
            opened.close()
            raise
        return opened

    reasons = []
    for engine in record.engines:
        reason = _why_not_used(engine, tensorrt, device, settings)
        if reason is None:
            try:
                shipped = shipped_kernels(folder, engine, tensorrt.version, device.gpu)
                return session(engine, folder.read_plan(engine), shipped)
            except EngineMismatchError as error:
                reason = error.message
        reasons.append(f"{engine.file}: {reason}")
    problem = f"No stored engine fits {device.gpu} and {tensorrt} ({'; '.join(reasons)})"
    _check_rebuild(record, settings, problem, reasons)
    return session(*_rebuilt(folder, tensorrt, device, problem, progress, settings.plugins))


def _check_rebuild(record: Record, settings: LoadSettings, problem: str, reasons: Sequence[str]) -> None:
    """Raise EngineMismatchError where an engine that does not fit is not to be rebuilt, or cannot be."""
    if record.is_engine_only:
        raise EngineMismatchError(
            f"{problem}. The model was imported as a plan, without the ONNX model to rebuild it from: import a plan "
            "that was built for this machine.",
            reasons=reasons,
        )
    if settings.on_mismatch == "error":
        raise EngineMismatchError(
            f"{problem}. Load with on_mismatch='rebuild', or log the model on a machine like this one.",
            reasons=reasons,
        )


def _why_not_used(engine: EngineRecord, tensorrt: trt.TensorRT, device: Device, settings: LoadSettings) -> str | None:
    if not settings.trust_engines:
        return "trust_engines is false, so nothing that came with the model is deserialized"
    reason = why_not(engine, tensorrt.distribution, tensorrt.version, device.gpu)
    if reason is None and engine.version_compatible and not settings.allow_engine_host_code:
        return "it was built version-compatible and so brings code for the CPU; allow_engine_host_code permits it"
    return reason


def shipped_kernels(folder: ModelFolder, engine: EngineRecord, version: str, gpu: Gpu) -> tuple[bytes, ...]:
    """The kernels that came with an engine, if they are for this machine.

    Raises IntegrityError where they are not the ones that were logged.
    """
    kernels = engine.kernels
    if kernels is None or not kernels_fit(kernels, version, gpu):
        return ()
    return (folder.read_kernels(kernels),)


def session_of(
    folder: ModelFolder,
    engine: EngineRecord,
    plan: bytes,
    *,
    tensorrt: trt.TensorRT,
    device: Device,
    settings: LoadSettings,
    store: KernelStore,
) -> TensorRTSession:
    """A session on an engine for the model in a folder. Raises what TensorRTSession raises."""
    record = folder.record
    return session_on(
        plan,
        tensorrt=tensorrt,
        device=device,
        settings=settings,
        inputs=record.inputs,
        outputs=record.outputs,
        batch_axis=record.batch_axis,
        weights_from=folder.checked_model(record.typed) if engine.weights is Weights.STRIPPED else None,
        weight_streaming=record.recipe.weight_streaming,
        store=store,
    )


def session_on(
    plan: bytes,
    *,
    tensorrt: trt.TensorRT,
    device: Device,
    settings: LoadSettings,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    batch_axis: BatchAxis | None,
    store: KernelStore,
    weights_from: Path | None = None,
    weight_streaming: bool = False,
) -> TensorRTSession:
    """A session on a plan, which is trusted. Compiled kernels are kept in `store`.

    Raises what TensorRTSession raises.
    """
    from mlflow_trt.runtime.tensorrt_session import TensorRTSession

    return TensorRTSession(
        plan,
        tensorrt=tensorrt,
        device=device,
        inputs=inputs,
        outputs=outputs,
        batch_axis=batch_axis,
        kernel_specialization=settings.kernel_specialization,
        cuda_graphs=settings.cuda_graphs == "on" or (settings.cuda_graphs == "auto" and tensorrt.is_rtx),
        max_batch_delay_ms=settings.max_batch_delay_ms,
        compile_beside_calls=_warm_up(settings) == "background",
        allow_engine_host_code=settings.allow_engine_host_code,
        weights_from=weights_from,
        weight_streaming=weight_streaming,
        kernel_store=store,
    )


def _warm_up(settings: LoadSettings) -> str:
    """What `auto` stands for here."""
    if settings.warm_up != "auto":
        return settings.warm_up
    return "on" if in_server() else "background"


def kernel_file(
    engine: EngineRecord, tensorrt: trt.TensorRT, device: Device, shipped: Sequence[bytes] = ()
) -> KernelFile:
    """Where the kernels of an engine are kept in the user's cache. `shipped` are those that came with the model."""
    identity = {
        "engine": engine.sha256,
        "tensorrt": str(tensorrt),
        "gpu": str(device.gpu),
        "driver": device.hardware.driver,
    }
    return KernelFile(cache.key_of(identity), shipped)


def _identity(
    engine: EngineRecord,
    kernels: tuple[bytes, ...],
    tensorrt: trt.TensorRT,
    device: Device,
    settings: LoadSettings,
    plugins: tuple[PluginLibrary, ...],
) -> dict[str, object]:
    """Everything that may make the same model answer differently."""
    return {
        "engine": engine.sha256,
        "tensorrt": str(tensorrt),
        "gpu": device.gpu.uuid,
        "driver": device.hardware.driver,
        "kernel_specialization": settings.kernel_specialization,
        "cuda_graphs": settings.cuda_graphs,
        "kernels": [hashlib.sha256(shipped).hexdigest() for shipped in kernels],
        "plugins": [plugin.sha256 for plugin in plugins],
    }


def _distribution_for(folder: ModelFolder) -> Distribution | None:
    """Of the installed distributions the first that the model has an engine of; None leaves the choice to trt."""
    built = {engine.distribution for engine in folder.record.engines}
    return next((distribution for distribution in trt.installed() if distribution in built), None)


def _rebuilt(
    folder: ModelFolder,
    tensorrt: trt.TensorRT,
    device: Device,
    problem: str,
    progress: Progress | None,
    plugins: Sequence[str],
) -> tuple[EngineRecord, bytes]:
    if plugins and tensorrt.is_rtx:
        raise RuntimeUnavailableError(f"{problem}, and {tensorrt}, which has no plugins, cannot rebuild it.")
    record = folder.record
    recipe = replace(_adapt_recipe(record.recipe, tensorrt, device), plugins=tuple(plugins))
    key = cache.key_of(
        {
            "mlflow_trt": __version__,
            "typed": record.typed.digest,
            "recipe": asdict(replace(recipe, plugins=())),
            "plugins": [plugin.sha256 for plugin in describe_plugins(plugins)],
            "profiles": [asdict(profile) for profile in record.profiles],
            "tensorrt": str(tensorrt),
            "gpu": str(device.gpu),
            "driver": device.hardware.driver,
        }
    )
    with cache.lock_key(key), scratch_folder() as workdir:
        cached = cache.find_engine(key)
        if cached is not None:
            _log.info("%s; using the engine that was built before on this machine", problem)
            return cached
        _log.warning("%s; building one, which is kept in %s", problem, cache.directory())
        plan = workdir / "engine.plan"
        engine = build_engine(
            folder.checked_model(record.typed),
            plan,
            recipe,
            record.profiles,
            interface=Interface(record.inputs, record.outputs),
            distribution=tensorrt.distribution,
            gpu=device.gpu.uuid,
            progress=progress,
        ).engine
        cache.store_engine(key, engine, plan)
        _log.info("Built %s in %.1f s", engine, engine.build_seconds)
        return engine, plan.read_bytes()


def _adapt_recipe(recipe: Recipe, tensorrt: trt.TensorRT, device: Device) -> Recipe:
    """The recipe without what concerns other machines: a rebuilt engine has one target, this GPU."""
    here = str(device.gpu.compute_capability)
    return replace(
        recipe,
        targets=(here,) if here in tensorrt.compute_capabilities() else (),
        hardware_compatibility=HardwareCompatibility.NONE,
        version_compatible=False,
        timing_cache=None,
        # The typed model is at hand anyway, and the cache is not shipped.
        weights=Weights.INCLUDED,
    )
