"""A model as objects of KServe: the runtime that serves models of this flavor, and the service of one model."""

from __future__ import annotations

from mlflow_trt.deploy.kubernetes.options import KubernetesOptions
from mlflow_trt.deploy.kubernetes.parts import Object, about, container, metadata, pod_annotations, pod_spec, volumes
from mlflow_trt.store.record import Record

_FORMAT = "mlflow-trt"
_STORAGE = "/mnt/models"
"""Where KServe's storage initializer puts the model."""


def kserve_objects(name: str, model_uri: str, record: Record, options: KubernetesOptions) -> list[Object]:
    """A ServingRuntime and an InferenceService, for KServe's mode without Knative.

    In what the runtime runs, KServe replaces {{.Name}} by the name of the service.
    """
    pod = pod_spec("{{.Name}}", model_uri, record, options, _STORAGE if options.storage_uri else "/opt/model")
    runtime: Object = {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ServingRuntime",
        "metadata": metadata(f"{name}-runtime", options),
        "spec": {
            "annotations": {
                **pod_annotations(pod),
                "prometheus.kserve.io/port": str(pod.port),
                "prometheus.kserve.io/path": "/metrics",
            },
            "supportedModelFormats": [{"name": _FORMAT, "version": "1", "autoSelect": False}],
            "protocolVersions": ["v2"],
            "multiModel": False,
            "containers": [container(pod, "kserve-container")],
            "volumes": volumes(),
        },
    }
    model: Object = {"modelFormat": {"name": _FORMAT}, "protocolVersion": "v2", "runtime": f"{name}-runtime"}
    if options.storage_uri is not None:
        model["storageUri"] = options.storage_uri
    predictor: Object = {
        "minReplicas": options.min_replicas,
        "maxReplicas": options.max_replicas,
        "terminationGracePeriodSeconds": pod.grace_seconds,
        "automountServiceAccountToken": False,
        "model": model,
    }
    annotations = {"serving.kserve.io/deploymentMode": "RawDeployment", **about(model_uri, record)}
    if options.scales:
        annotations["serving.kserve.io/autoscalerClass"] = "keda"
        predictor["autoScaling"] = {"metrics": [_metric(name, options)]}
    else:
        annotations["serving.kserve.io/autoscalerClass"] = "none"
    service: Object = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": metadata(name, options, annotations=annotations),
        "spec": {"predictor": predictor},
    }
    return [runtime, service]


def _metric(name: str, options: KubernetesOptions) -> Object:
    """Requests in flight, of all pods together: KEDA divides them by the value to tell how many there should be."""
    query = f'sum(mlflow_trt_requests_in_flight{{pod=~"{name}-predictor-.*"}})'
    return {
        "type": "External",
        "external": {
            "metric": {"backend": "prometheus", "serverAddress": options.prometheus, "query": query},
            "target": {"type": "Value", "value": str(options.requests_per_replica)},
        },
    }
