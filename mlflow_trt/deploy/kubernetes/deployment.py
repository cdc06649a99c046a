"""A model as a plain Deployment of Kubernetes, with a Service."""

from __future__ import annotations

from mlflow_trt.deploy.kubernetes.options import KubernetesOptions
from mlflow_trt.deploy.kubernetes.parts import (
    Object,
    about,
    container,
    labels,
    metadata,
    pod_annotations,
    pod_spec,
    volumes,
)
from mlflow_trt.store.record import Record


def deployment_objects(name: str, model_uri: str, record: Record, options: KubernetesOptions) -> list[Object]:
    """A Deployment and a Service, and an autoscaler where the number of pods varies."""
    pod = pod_spec(name, model_uri, record, options, "/opt/model")
    selector = {"app.kubernetes.io/name": name}
    template = {
        "metadata": {"labels": labels(name), "annotations": {**pod_annotations(pod), **about(model_uri, record)}},
        "spec": {
            "containers": [container(pod, "server")],
            "volumes": volumes(),
            "terminationGracePeriodSeconds": pod.grace_seconds,
            "automountServiceAccountToken": False,
        },
    }
    spec: Object = {
        "selector": {"matchLabels": selector},
        "template": template,
        # A pod more while they are exchanged, which wants a GPU more: else set maxSurge to 0.
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
    }
    if not options.scales:  # else the number is the autoscaler's
        spec = {"replicas": options.min_replicas, **spec}
    ports = [{"name": "http", "port": 80, "targetPort": "http", "appProtocol": "http"}]
    objects: list[Object] = [
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata(name, options), "spec": spec},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata(name, options),
            "spec": {"selector": selector, "ports": ports},
        },
    ]
    if options.scales:
        objects.append(_autoscaler(name, options))
    return objects


def _autoscaler(name: str, options: KubernetesOptions) -> Object:
    """Scales by what Prometheus's adapter makes of the server's metric."""
    target = {"type": "AverageValue", "averageValue": str(options.requests_per_replica)}
    metric = {"type": "Pods", "pods": {"metric": {"name": "mlflow_trt_requests_in_flight"}, "target": target}}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": metadata(name, options),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
            "minReplicas": options.min_replicas,
            "maxReplicas": options.max_replicas,
            "metrics": [metric],
        },
    }
