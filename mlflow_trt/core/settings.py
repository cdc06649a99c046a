"""The load settings: how a model is loaded, by its own defaults and what overrides them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from mlflow_trt.errors import OptionError

ModelConfig = Mapping[str, Any] | str | os.PathLike[str] | None
"""Load settings by name, or the path of a file of them."""

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
        onnx_session_options: for ONNX Runtime only, as for `mlflow.onnx.save_model`: `intra_op_num_threads`,
            `inter_op_num_threads`, `execution_mode` (`sequential` or `parallel`), `graph_optimization_level` (0, 1, 2
            or 99) and `extra_session_config`, a mapping.
        onnx_execution_providers: for ONNX Runtime only, as for `mlflow.onnx.save_model`: names of providers, or
            (name, options); those that are not available are left out with a warning. None: the CPU.
        max_request_bytes: under MLflow's scoring server, the most that the arrays or the table of a request may take;
            more is answered with 413.
        expected_digest: the sha256 of the record, `mlflow_trt.json`, which has those of all files that are used; a
            model with another one is refused. `mlflow-trt inspect --json` tells it.
        trust_engines: whether engines and kernels that came with the model are deserialized, which executes them; if
            not, an engine is built from its ONNX on this machine, and kept in the cache.
        signature: a file that `mlflow-trt sign` wrote; a model that it is not for is refused.
        signed_by: who has to have signed: the file of a public key, or an identity of Sigstore and its issuer,
            separated by a space.
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
    onnx_session_options: Mapping[str, Any] | None = None
    onnx_execution_providers: Sequence[Any] | None = None
    max_request_bytes: int = 512 << 20
    expected_digest: str | None = None
    trust_engines: bool = True
    signature: str | None = None
    signed_by: str | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value, known = getattr(self, name), get_args(choices)
            if value not in known:
                raise OptionError(f"{name} is {value!r}; choose one of {', '.join(known)}", option=name)
        for name in ("allow_engine_host_code", "self_test", "trust_engines"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} is {getattr(self, name)!r}; expected true or false", option=name)
        most = self.max_request_bytes
        if type(most) is not int or most < 1:
            raise OptionError(
                f"max_request_bytes is {most!r}; expected a number of bytes, 1 or more", option="max_request_bytes"
            )
        self._check_trust()
        self._check_device()
        self._check_plugins()
        self._check_onnxruntime()
        delay = self.max_batch_delay_ms
        if isinstance(delay, bool) or not isinstance(delay, (int, float)) or not 0 <= delay < float("inf"):
            raise OptionError(
                f"max_batch_delay_ms is {delay!r}; expected milliseconds, 0 or more", option="max_batch_delay_ms"
            )

    @classmethod
    def of(cls, values: ModelConfig) -> LoadSettings:
        """Settings from `model_config`, a mapping or a file of one. Raises OptionError for an unknown name or value."""
        values = read_model_config(values)
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
        return {name: _as_lists(value) for name, value in asdict(self).items()}

    def _check_onnxruntime(self) -> None:
        options, option = self.onnx_session_options, "onnx_session_options"
        if options is not None and not isinstance(options, Mapping):
            raise OptionError(f"{option} is {options!r}; expected a mapping", option=option)
        for key, value in (options or {}).items():
            if key not in _SESSION_OPTIONS:
                raise OptionError(
                    f"{option} has no {key!r}; there are {', '.join(_SESSION_OPTIONS)}, and extra_session_config takes "
                    "every other by the name that ONNX Runtime gives it",
                    option=option,
                )
            wanted, is_valid = _SESSION_OPTIONS[key]
            if not is_valid(value):
                raise OptionError(f"{option}: {key} is {value!r}; expected {wanted}", option=option)
        providers, option = self.onnx_execution_providers, "onnx_execution_providers"
        if providers is not None and (
            not isinstance(providers, (list, tuple)) or not providers or not all(map(_is_provider, providers))
        ):
            raise OptionError(
                f"{option} is {providers!r}; expected a list of names, such as CPUExecutionProvider, or of "
                "(name, options)",
                option=option,
            )

    def _check_plugins(self) -> None:
        several = (self.plugins,) if isinstance(self.plugins, str) else self.plugins
        if not isinstance(several, (list, tuple)) or not all(isinstance(path, str) and path for path in several):
            raise OptionError(f"plugins is {self.plugins!r}; expected paths of libraries", option="plugins")
        object.__setattr__(self, "plugins", tuple(several))  # frozen, and hashable whatever sequence came

    def _check_trust(self) -> None:
        digest = self.expected_digest
        if digest is not None and not (isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest)):
            raise OptionError(
                f"expected_digest is {digest!r}; expected a sha256, 64 digits of 0 to 9 and a to f",
                option="expected_digest",
            )
        for name, other in (("signature", "signed_by"), ("signed_by", "signature")):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value or "\0" in value):
                raise OptionError(f"{name} is {value!r}; expected text", option=name)
            if value is not None and getattr(self, other) is None:
                raise OptionError(f"{name} says nothing without {other}; give both", option=other)

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


def read_model_config(config: ModelConfig) -> Mapping[str, Any] | None:
    """The mapping itself, or the one in a file of YAML or JSON, as MLflow's flavors take it.

    Raises OptionError where the file is missing, or holds no mapping.
    """
    if not isinstance(config, (str, os.PathLike)):
        return config
    import yaml

    try:
        read = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(
            f"model_config names the file {config}, which cannot be read: {error}", option="model_config"
        ) from error
    if read is not None and not isinstance(read, dict):
        raise OptionError(
            f"model_config names the file {config}, which holds a {type(read).__name__}; expected load settings by "
            "name, as in `runtime: auto`",
            option="model_config",
        )
    return read


def with_settings(config: ModelConfig, **more: Any) -> Mapping[str, Any] | None:
    """Load settings with more, of which those that are None say nothing. Raises what `read_model_config` raises."""
    given = {name: value for name, value in more.items() if value is not None}
    return {**(read_model_config(config) or {}), **given} if given else read_model_config(config)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_mode(value: Any) -> bool:
    return isinstance(value, str) and value.lower() in ("sequential", "parallel")


_SESSION_OPTIONS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "intra_op_num_threads": ("a number of threads, 0 for as many as there are cores", _is_count),
    "inter_op_num_threads": ("a number of threads, 0 for as many as there are cores", _is_count),
    "execution_mode": ("sequential or parallel", _is_mode),
    "graph_optimization_level": ("0, 1, 2 or 99", lambda value: type(value) is int and value in (0, 1, 2, 99)),
    "extra_session_config": (
        "a mapping of texts to texts",
        lambda value: (
            isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair)
        ),
    ),
}


def _is_provider(entry: Any) -> bool:
    if isinstance(entry, str):
        return True
    return (
        isinstance(entry, (list, tuple))
        and len(entry) == 2
        and isinstance(entry[0], str)
        and isinstance(entry[1], Mapping)
    )


def _as_lists(value: Any) -> Any:
    """Without tuples and mappings of other kinds, which YAML would write as objects of Python."""
    if isinstance(value, (list, tuple)):
        return [_as_lists(part) for part in value]
    if isinstance(value, Mapping):
        return {key: _as_lists(part) for key, part in value.items()}
    return value
