"""The load settings: how a model is loaded, by its own defaults and what overrides them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from mlflow_trt.errors import OptionError

ALL = "all"
"""`LoadSettings(device="all")`: every GPU that the process sees."""
OWN = "own"
"""`LoadSettings(device="own")`: one GPU for each process."""


Runtime = Literal["tensorrt", "auto", "onnxruntime"]
OnMismatch = Literal["rebuild", "error"]
KernelSpecialization = Literal["eager", "lazy"]
CudaGraphs = Literal["auto", "on", "off"]
WarmUp = Literal["auto", "on", "background", "off"]
Answers = Literal["lists", "base64"]
DeviceRequest = int | Sequence[int] | Literal["all", "own"]

_CHOICES = {
    "runtime": Runtime,
    "on_mismatch": OnMismatch,
    "kernel_specialization": KernelSpecialization,
    "cuda_graphs": CudaGraphs,
    "warm_up": WarmUp,
    "answers": Answers,
}


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """How a model is loaded. They are logged with the model, so that `model_config=` and the environment can override
    each of them.

    Args:
        runtime: `tensorrt`: a GPU engine or an error. `auto`: TensorRT where it can run, else ONNX Runtime with a
            warning that names the reason. `onnxruntime`: the source model on the CPU.
        on_mismatch: no stored engine fits this GPU and TensorRT: `rebuild` one into the cache, with a warning, or
            `error`.
        device: CUDA device ordinal. Several, as in `[0, 1]`, or `all`: the engine is loaded on each of these GPUs, and
            work goes where there is room for it. `own`: the first GPU that no other process has taken in this way, for
            servers with a worker for each GPU; more processes than GPUs share them evenly.
        kernel_specialization: TensorRT-RTX only. `eager` gives the same result from the first call of a new shape on;
            `lazy` answers sooner.
        cuda_graphs: launch shapes that come again as CUDA graphs, which take small inputs and outputs over the bus,
            too: `auto` with TensorRT-RTX, `on` with TensorRT as well, `off` nowhere.
        max_batch_delay_ms: calls that arrive while a batch runs are put together into the next one, which stays open
            for so many milliseconds at most; 0 runs each call by itself. A call that is alone never waits.
        warm_up: when the batch sizes are compiled. `on`: all of them while loading. `background`: the one that the
            first call needs, and the others beside the calls, which are run in the sizes that are ready. `off`: each in
            the first call that needs it. `auto`: `on` under MLflow's scoring server, elsewhere `background`.
        allow_engine_host_code: let engines bring code that runs on the CPU, as those do that were built with
            `version_compatible`. Only for engines from a source you trust like your own programs.
        self_test: run the model's golden sample before an engine is first used with a GPU, driver and TensorRT, and
            refuse the engine if it answers wrongly.
        plugins: libraries with plugins of TensorRT that the model's engine needs. They are loaded because you name them
            here, so only from a source you trust like your own programs; a model cannot name any itself.
        answers: how outputs leave a scoring server. `lists`: as JSON's numbers, which any client reads. `base64`: with
            dtype and shape, many times faster, for clients that know of it, as `mlflow_trt.client` does.
    """

    runtime: Runtime = "tensorrt"
    on_mismatch: OnMismatch = "rebuild"
    device: DeviceRequest = 0
    kernel_specialization: KernelSpecialization = "eager"
    cuda_graphs: CudaGraphs = "auto"
    max_batch_delay_ms: float = 2.0
    warm_up: WarmUp = "auto"
    allow_engine_host_code: bool = False
    self_test: bool = True
    plugins: Sequence[str] = ()
    answers: Answers = "lists"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value, known = getattr(self, name), get_args(choices)
            if value not in known:
                raise OptionError(f"{name} is {value!r}; choose one of {', '.join(known)}", option=name)
        for name in ("allow_engine_host_code", "self_test"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} is {getattr(self, name)!r}; expected true or false", option=name)
        self._check_device()
        self._check_plugins()
        delay = self.max_batch_delay_ms
        if isinstance(delay, bool) or not isinstance(delay, (int, float)) or not 0 <= delay < float("inf"):
            raise OptionError(
                f"max_batch_delay_ms is {delay!r}; expected milliseconds, 0 or more", option="max_batch_delay_ms"
            )

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> LoadSettings:
        """Settings from a mapping such as `model_config`. Raises OptionError for an unknown name or value."""
        known = [field.name for field in fields(cls)]
        unknown = [name for name in values or {} if name not in known]
        if unknown:
            raise OptionError(
                f"unknown load setting {unknown[0]!r}; there are {', '.join(known)}", option=str(unknown[0])
            )
        return cls(**(values or {}))

    @classmethod
    def check_logged(cls, values: Mapping[str, Any] | None) -> None:
        """Raise OptionError for settings that a model may not bring itself: plugins are executed."""
        if (values or {}).get("plugins"):
            raise OptionError(
                "the model's own settings name plugins, and nothing is loaded because a model says so: whoever loads "
                "it names them, with model_config={'plugins': [...]}",
                option="plugins",
            )

    def ordinals(self, visible: Sequence[int]) -> tuple[int, ...]:
        """The CUDA device ordinals meant where the process sees these GPUs, of which `own` may be any."""
        if isinstance(self.device, int):
            return (self.device,)
        return tuple(visible if self.device in (ALL, OWN) else map(int, self.device))

    @property
    def first_device(self) -> int:
        """The GPU for what needs only one, such as measuring."""
        return self.ordinals((0,))[0]

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON and YAML know them."""
        device = list(self.device) if isinstance(self.device, tuple) else self.device
        return asdict(self) | {"device": device, "plugins": list(self.plugins)}

    def _check_plugins(self) -> None:
        several = (self.plugins,) if isinstance(self.plugins, str) else self.plugins
        if not isinstance(several, (list, tuple)) or not all(isinstance(path, str) and path for path in several):
            raise OptionError(f"plugins is {self.plugins!r}; expected paths of libraries", option="plugins")
        object.__setattr__(self, "plugins", tuple(several))  # frozen, and hashable whatever sequence came

    def _check_device(self) -> None:
        if self.device in (ALL, OWN):
            return
        several = isinstance(self.device, (list, tuple))
        ordinals = tuple(self.device) if isinstance(self.device, (list, tuple)) else (self.device,)
        if not ordinals or any(type(ordinal) is not int or ordinal < 0 for ordinal in ordinals):
            raise OptionError(
                f"device is {self.device!r}; expected a CUDA device ordinal, 0 or more, a list of them, 'all' or 'own'",
                option="device",
            )
        if len(set(ordinals)) < len(ordinals):
            raise OptionError(f"device is {self.device!r}, which names a GPU twice", option="device")
        if several:
            object.__setattr__(self, "device", ordinals)  # frozen, and hashable whatever sequence came
