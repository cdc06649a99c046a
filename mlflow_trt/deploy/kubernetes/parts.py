"""What the objects have in common: the pod, which runs `mlflow-trt serve`, its probes, names and labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlflow_trt.deploy.dockerfile import CACHE
from mlflow_trt.deploy.kubernetes.options import KubernetesOptions
from mlflow_trt.store.record import Record

Object = dict[str, Any]

DRAIN_SECONDS = 15
"""How long a server goes on while the cluster learns that it is not ready."""
_TIMEOUT = 60
_GIB = 1 << 30
_BASE_MEMORY = 2 * _GIB
"""What Python, CUDA and TensorRT take before there is a model."""
_USER = 10001  # that of the image
_FOLLOW_SECONDS = 30
_VOLUMES = {"cache": CACHE, "tmp": "/tmp"}  # noqa: S108  # in a container of its own


@dataclass(frozen=True, kw_only=True)
class PodSpec:
    """What differs between pods.

    Args:
        image: what it runs.
        model: the folder or URI of the model.
        name: what the server calls it.
        port: what the server listens on.
        gpus: how many it gets.
        memory: of the host, as Kubernetes writes it.
        tracking_uri: where `model` is looked up; None for a folder.
        settings: load settings.
    """

    image: str
    model: str
    name: str
    port: int
    gpus: int
    memory: str
    tracking_uri: str | None
    settings: Mapping[str, Any] | None

    @property
    def grace_seconds(self) -> int:
        """Until Kubernetes kills it: it goes on, then answers what it has."""
        return DRAIN_SECONDS + _TIMEOUT + 10

    @property
    def command(self) -> list[str]:
        listen = ["--host", "0.0.0.0", "--port", str(self.port)]  # noqa: S104  # in a pod of its own
        command = ["mlflow-trt", "serve", f"{self.name}={self.model}", *listen]
        command += ["--timeout", str(_TIMEOUT), "--drain-seconds", str(DRAIN_SECONDS)]
        if self.tracking_uri and "@" in self.model:
            command += ["--follow-aliases", str(_FOLLOW_SECONDS)]
        if self.settings:
            command += ["--model-config", json.dumps(dict(self.settings))]
        return command


def container(pod: PodSpec, name: str) -> Object:
    """The only container of a pod."""
    found: Object = {
        "name": name,
        "image": pod.image,
        "command": pod.command,
        "ports": [{"name": "http", "containerPort": pod.port, "protocol": "TCP"}],
        # The first start on a GPU may build an engine and compile kernels, which takes minutes.
        "startupProbe": _probe("ready", periodSeconds=10, failureThreshold=90),
        "readinessProbe": _probe("ready", periodSeconds=5, failureThreshold=2),
        "livenessProbe": _probe("live", periodSeconds=10, failureThreshold=3),
        "resources": {
            "requests": {"cpu": "1", "memory": pod.memory},
            "limits": {"memory": pod.memory, **({"nvidia.com/gpu": str(pod.gpus)} if pod.gpus else {})},
        },
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [{"name": volume, "mountPath": path} for volume, path in _VOLUMES.items()],
    }
    variables = {"HOME": "/tmp", "MLFLOW_TRACKING_URI": pod.tracking_uri}  # noqa: S108  # the only place to write
    found["env"] = [{"name": key, "value": value} for key, value in variables.items() if value]
    return found


def volumes() -> list[Object]:
    """Where a pod may write; what is cached there goes with it."""
    return [{"name": volume, "emptyDir": {}} for volume in _VOLUMES]


def pod_annotations(pod: PodSpec) -> dict[str, str]:
    """Where Prometheus finds the metrics, for those who let it look for annotations."""
    return {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(pod.port),
        "prometheus.io/path": "/metrics",
    }


def _probe(what: str, **how: int) -> Object:
    return {"httpGet": {"path": f"/v2/health/{what}", "port": "http"}, "timeoutSeconds": 5, **how}


def pod_spec(name: str, model_uri: str, record: Record, options: KubernetesOptions, folder: str) -> PodSpec:
    """What a pod runs; `folder` is where the model lies in it, unless it comes from a registry."""
    return PodSpec(
        image=options.image,
        model=model_uri if options.tracking_uri else folder,
        name=name,
        port=options.port,
        gpus=options.gpus,
        memory=memory_request(record),
        tracking_uri=options.tracking_uri,
        settings=options.model_config,
    )


def metadata(name: str, options: KubernetesOptions, **more: Mapping[str, str]) -> Object:
    """What every object begins with."""
    found: Object = {"name": name}
    if options.namespace is not None:
        found["namespace"] = options.namespace
    return {**found, "labels": labels(name), **{key: dict(value) for key, value in more.items()}}


def labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": name, "app.kubernetes.io/managed-by": "mlflow-trt"}


def about(model_uri: str, record: Record) -> dict[str, str]:
    """Annotations that say what is served."""
    engines = ", ".join(f"{engine.distribution.label} {engine.version}, {engine.target}" for engine in record.engines)
    return {
        "mlflow-trt/model": model_uri,
        "mlflow-trt/precision": str(record.recipe.precision),
        "mlflow-trt/engines": engines,
    }


def memory_request(record: Record) -> str:
    """Memory of the host: the largest engine twice, while it is read and loaded, beside what is needed anyway."""
    largest = max((engine.size for engine in record.engines), default=0)
    return f"{-(-(_BASE_MEMORY + 2 * largest) // _GIB)}Gi"
