"""The load policy: model folder and settings in, session out.

What runs is what was asked for, or an error says what to do. The one exception is `runtime="auto"`, which is asked for.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_trt import cache, self_test, trt
from mlflow_trt._logging import get_logger
from mlflow_trt._version import __version__
from mlflow_trt.artifact import ModelFolder, why_not
from mlflow_trt.convert.builder import Progress, build_engine
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.errors import (
    BuildError,
    EngineMismatchError,
    ExecutionError,
    RecipeError,
    RuntimeUnavailableError,
)
from mlflow_trt.kernel_file import KernelFile
from mlflow_trt.runtime.device import Device, open_device
from mlflow_trt.runtime.session import Session
from mlflow_trt.spec import BatchAxis, Distribution, HardwareCompatibility, TensorSpec, Weights

if TYPE_CHECKING:
    from mlflow_trt.runtime.tensorrt import TensorRTSession

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """How a model is loaded. They are logged with the model, so that `model_config=` and the environment can override
    each of them.

    Args:
        runtime: `tensorrt`: a GPU engine or an error. `auto`: TensorRT where it can run, else ONNX Runtime with a
            warning that names the reason. `onnxruntime`: the source model on the CPU.
        on_mismatch: no stored engine fits this GPU and TensorRT: `rebuild` one into the cache, with a warning, or
            `error`.
        device: CUDA device ordinal.
        kernel_specialization: TensorRT-RTX only. `eager` gives the same result from the first call of a new shape on;
            `lazy` answers sooner.
        cuda_graphs: launch shapes that come again as CUDA graphs: `auto` where the distribution can (TensorRT-RTX),
            `on` there or an error, `off` nowhere.
        max_batch_delay_ms: calls that arrive while a batch runs are put together into the next one, which stays open
            for so many milliseconds at most; 0 runs each call by itself. A call that is alone never waits.
        warm_up: run every batch size once while loading, so that no later call compiles kernels or makes contexts:
            `auto` under MLflow's scoring server, `on` everywhere, `off` nowhere.
        allow_engine_host_code: let engines bring code that runs on the CPU, as those do that were built with
            `version_compatible`. Only for engines from a source you trust like your own programs.
        self_test: run the model's golden sample before an engine is first used with a GPU, driver and TensorRT, and
            refuse the engine if it answers wrongly.
        answers: how outputs leave a scoring server. `lists`: as JSON's numbers, which any client reads. `base64`: with
            dtype and shape, many times faster, for clients that know of it, as `mlflow_trt.client` does.
    """

    runtime: str = "tensorrt"
    on_mismatch: str = "rebuild"
    device: int = 0
    kernel_specialization: str = "eager"
    cuda_graphs: str = "auto"
    max_batch_delay_ms: float = 2.0
    warm_up: str = "auto"
    allow_engine_host_code: bool = False
    self_test: bool = True
    answers: str = "lists"

    def __post_init__(self) -> None:
        choices = {
            "runtime": ("tensorrt", "auto", "onnxruntime"),
            "on_mismatch": ("rebuild", "error"),
            "kernel_specialization": ("eager", "lazy"),
            "cuda_graphs": ("auto", "on", "off"),
            "warm_up": ("auto", "on", "off"),
            "answers": ("lists", "base64"),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise RecipeError(f"{name} is {value!r}; choose one of {', '.join(known)}", option=name)
        for name in ("allow_engine_host_code", "self_test"):
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"{name} is {getattr(self, name)!r}; expected true or false", option=name)
        if not isinstance(self.device, int) or isinstance(self.device, bool) or self.device < 0:
            raise RecipeError(f"device is {self.device!r}; expected a CUDA device ordinal, 0 or more", option="device")
        delay = self.max_batch_delay_ms
        if isinstance(delay, bool) or not isinstance(delay, (int, float)) or not 0 <= delay < float("inf"):
            raise RecipeError(
                f"max_batch_delay_ms is {delay!r}; expected milliseconds, 0 or more", option="max_batch_delay_ms"
            )

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> LoadSettings:
        """Settings from a mapping such as `model_config`. Raises RecipeError for an unknown name or value."""
        known = [field.name for field in fields(cls)]
        unknown = [name for name in values or {} if name not in known]
        if unknown:
            raise RecipeError(
                f"unknown load setting {unknown[0]!r}; there are {', '.join(known)}", option=str(unknown[0])
            )
        return cls(**(values or {}))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def in_server() -> bool:
    """Whether this process is MLflow's scoring server, which sets a variable for the models that it runs."""
    return os.environ.get("_MLFLOW_IS_IN_SERVING_ENVIRONMENT") == "true"


def open_session(folder: ModelFolder, settings: LoadSettings, progress: Progress | None = None) -> Session:
    """Load the model with the runtime that `settings` ask for.

    Raises:
        RuntimeUnavailableError: there is no GPU, or a package is missing (MissingDependencyError).
        EngineMismatchError: no stored engine fits and `on_mismatch` is `error`.
        IntegrityError: a file is not the one that was logged, whatever the runtime.
        BuildError, ExecutionError: an engine could not be rebuilt, or not be loaded.
        SelfTestError: the engine answers wrongly.
    """
    if settings.runtime == "onnxruntime":
        return _open_onnxruntime(folder, settings)
    try:
        return _open_tensorrt(folder, settings, progress)
    except (RuntimeUnavailableError, EngineMismatchError, BuildError, ExecutionError) as error:
        if settings.runtime != "auto":
            raise
        _log.warning("Running on ONNX Runtime, on the CPU, since TensorRT cannot run here: %s", error.message)
        session = _open_onnxruntime(folder, settings)
        session.fallback_reason = error.message
        return session


def _open_onnxruntime(folder: ModelFolder, settings: LoadSettings) -> Session:
    from mlflow_trt.runtime.onnxruntime import OnnxRuntimeSession

    record = folder.record
    axis = record.batch_axis
    limits = [profile.ranges[axis.inputs[0]].max[0] for profile in record.profiles] if axis else []
    return OnnxRuntimeSession(
        folder.checked_model(record.source),
        record.inputs,
        record.outputs,
        batch_axis=axis,
        largest_batch=max(limits, default=None),
        max_batch_delay_ms=settings.max_batch_delay_ms,
    )


def _open_tensorrt(folder: ModelFolder, settings: LoadSettings, progress: Progress | None) -> Session:
    record = folder.record
    tensorrt = trt.load(_distribution_for(folder))
    device = open_device(settings.device)

    def session(plan: bytes, weights: Weights = Weights.INCLUDED) -> Session:
        opened = session_on(
            plan,
            tensorrt=tensorrt,
            device=device,
            settings=settings,
            inputs=record.inputs,
            outputs=record.outputs,
            batch_axis=record.batch_axis,
            weights_from=folder.checked_model(record.typed) if weights is Weights.STRIPPED else None,
            weight_streaming=record.recipe.weight_streaming,
        )
        try:
            if settings.self_test:
                self_test.check(opened, folder, _identity(plan, tensorrt, device, settings))
            if settings.warm_up == "on" or (settings.warm_up == "auto" and in_server()):
                opened.warm_up()
        except BaseException:
            opened.close()
            raise
        return opened

    reasons = []
    for engine in record.engines:
        reason = why_not(engine, tensorrt.distribution, tensorrt.version, device.gpu)
        if reason is None and engine.version_compatible and not settings.allow_engine_host_code:
            reason = "it was built version-compatible and so brings code for the CPU; allow_engine_host_code permits it"
        if reason is None:
            try:
                return session(folder.read_plan(engine), engine.weights)
            except EngineMismatchError as error:
                reason = error.message
        reasons.append(f"{engine.file}: {reason}")
    problem = f"No stored engine fits {device.gpu} and {tensorrt} ({'; '.join(reasons)})"
    if settings.on_mismatch == "error":
        raise EngineMismatchError(
            f"{problem}. Load with on_mismatch='rebuild', or log the model on a machine like this one.",
            reasons=reasons,
        )
    return session(_rebuilt_plan(folder, tensorrt, device, problem, progress))


def session_on(
    plan: bytes,
    *,
    tensorrt: trt.TensorRT,
    device: Device,
    settings: LoadSettings,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    batch_axis: BatchAxis | None,
    weights_from: Path | None = None,
    weight_streaming: bool = False,
) -> TensorRTSession:
    """A session on a plan, which is trusted. Raises what TensorRTSession raises."""
    from mlflow_trt.runtime.tensorrt import TensorRTSession

    if settings.cuda_graphs == "on" and not tensorrt.is_rtx:
        raise RuntimeUnavailableError(
            f"cuda_graphs='on': only TensorRT-RTX captures CUDA graphs by itself; for {tensorrt} the application would "
            "have to, and pycuda has no API for it. Use 'auto'."
        )
    identity = {
        "engine": hashlib.sha256(plan).hexdigest(),
        "tensorrt": str(tensorrt),
        "gpu": str(device.gpu),
        "driver": device.hardware.driver,
    }
    return TensorRTSession(
        plan,
        tensorrt=tensorrt,
        device=device,
        inputs=inputs,
        outputs=outputs,
        batch_axis=batch_axis,
        kernel_specialization=settings.kernel_specialization,
        cuda_graphs=settings.cuda_graphs != "off",
        max_batch_delay_ms=settings.max_batch_delay_ms,
        allow_engine_host_code=settings.allow_engine_host_code,
        weights_from=weights_from,
        weight_streaming=weight_streaming,
        kernel_store=KernelFile(cache.key_of(identity)),
    )


def _identity(plan: bytes, tensorrt: trt.TensorRT, device: Device, settings: LoadSettings) -> dict[str, object]:
    """Everything that may make the same model answer differently."""
    return {
        "engine": hashlib.sha256(plan).hexdigest(),
        "tensorrt": str(tensorrt),
        "gpu": device.gpu.uuid,
        "driver": device.hardware.driver,
        "kernel_specialization": settings.kernel_specialization,
        "cuda_graphs": settings.cuda_graphs,
    }


def _distribution_for(folder: ModelFolder) -> Distribution | None:
    """Of the installed distributions the first that the model has an engine of; None leaves the choice to trt."""
    built = {engine.distribution for engine in folder.record.engines}
    return next((distribution for distribution in trt.installed() if distribution in built), None)


def _rebuilt_plan(
    folder: ModelFolder, tensorrt: trt.TensorRT, device: Device, problem: str, progress: Progress | None
) -> bytes:
    record = folder.record
    recipe = _for_this_machine(record.recipe, tensorrt, device)
    key = cache.key_of(
        {
            "mlflow_trt": __version__,
            "typed": record.typed.digest,
            "recipe": asdict(recipe),
            "profiles": [asdict(profile) for profile in record.profiles],
            "tensorrt": str(tensorrt),
            "gpu": str(device.gpu),
            "driver": device.hardware.driver,
        }
    )
    with cache.only_one(key), tempfile.TemporaryDirectory(prefix="mlflow-trt-") as workdir:
        cached = cache.find_engine(key)
        if cached is not None:
            _log.info("%s; using the engine that was built before on this machine", problem)
            return cached
        _log.warning("%s; building one, which is kept in %s", problem, cache.directory())
        plan = Path(workdir) / "engine.plan"
        engine = build_engine(
            folder.checked_model(record.typed),
            plan,
            recipe,
            record.profiles,
            distribution=tensorrt.distribution,
            gpu=device.gpu.uuid,
            progress=progress,
        )
        cache.store_engine(key, engine, plan)
        _log.info("Built %s in %.1f s", engine, engine.build_seconds)
        return plan.read_bytes()


def _for_this_machine(recipe: Recipe, tensorrt: trt.TensorRT, device: Device) -> Recipe:
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
