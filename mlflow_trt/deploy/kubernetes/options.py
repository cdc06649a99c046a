"""What the user decides about the objects of Kubernetes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.errors import OptionError

KINDS = ("deployment", "kserve")


@dataclass(frozen=True, kw_only=True)
class KubernetesOptions:
    """What the user decides.

    Args:
        image: the image that the pods run, with its registry and tag.
        kind: `deployment` for a Deployment and a Service, `kserve` for a ServingRuntime and an InferenceService.
        name: of the objects, and of the model on the server; None takes the registered model's, or the folder's.
        namespace: where they are made; None for the current one.
        port: what the server listens on.
        gpus: GPUs of a pod. A process serves one, so more are for `device="all"`.
        min_replicas: pods there are at least.
        max_replicas: pods there are at most; more than `min_replicas` scales by requests in flight.
        requests_per_replica: requests in flight for each pod, above which there are more pods.
        prometheus: address of Prometheus, which KServe scales by.
        tracking_uri: load the model from this registry of MLflow when a pod starts, not from the image.
        storage_uri: load it from where KServe's storage initializer finds it, such as `s3://models/resnet50`.
        model_config: load settings.

    Raises:
        OptionError: a value makes no sense.
    """

    image: str
    kind: str = "deployment"
    name: str | None = None
    namespace: str | None = None
    port: int = 8080
    gpus: int = 1
    min_replicas: int = 1
    max_replicas: int = 1
    requests_per_replica: int = 32
    prometheus: str = "http://prometheus-operated.monitoring:9090"
    tracking_uri: str | None = None
    storage_uri: str | None = None
    model_config: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._check_texts()
        self._check_numbers()
        if self.storage_uri is not None and (self.kind != "kserve" or self.tracking_uri is not None):
            raise OptionError("storage_uri is for kserve, without tracking_uri", option="storage_uri")
        LoadSettings.of(self.model_config)

    def _check_texts(self) -> None:
        if self.kind not in KINDS:
            raise OptionError(f"kind is {self.kind!r}; choose one of {', '.join(KINDS)}", option="kind")
        if not re.fullmatch(r"[\w.:/@-]+", self.image):
            raise OptionError(f"image is {self.image!r}; expected one like registry/name:tag", option="image")
        for option in ("name", "namespace"):
            value = getattr(self, option)
            if value is not None and value != dns_label(value):
                raise OptionError(
                    f"{option} is {value!r}; expected small letters, digits and -, 50 at most", option=option
                )

    def _check_numbers(self) -> None:
        for option, least in (("gpus", 0), ("min_replicas", 0), ("requests_per_replica", 1)):
            if getattr(self, option) < least:
                raise OptionError(f"{option} is {getattr(self, option)}; expected {least} or more", option=option)
        if self.max_replicas < max(1, self.min_replicas):
            raise OptionError(
                f"max_replicas is {self.max_replicas}; expected {max(1, self.min_replicas)} or more",
                option="max_replicas",
            )
        if not self.min_replicas and self.kind != "kserve":
            raise OptionError("min_replicas is 0, which only kserve can do", option="min_replicas")
        if not 1 <= self.port < 1 << 16:
            raise OptionError(f"port is {self.port}; expected 1 to 65535", option="port")

    @property
    def scales(self) -> bool:
        return self.max_replicas > self.min_replicas


def dns_label(text: str) -> str:
    """The text as a name in Kubernetes, short enough for what KServe appends to it."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:50].strip("-")
