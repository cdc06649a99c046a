"""The load settings: how a model is loaded, by its own defaults and what overrides them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mlflow_trt.errors import RecipeError


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
