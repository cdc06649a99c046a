"""mlflow-trt kubernetes"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlflow_trt.cli.options import parse_settings, results_on_stdout


def kubernetes(
    uri: Annotated[str, typer.Argument(help="An MLflow model URI such as models:/name/version, or a folder.")],
    image: Annotated[str, typer.Option(help="What pods run, such as an image made by mlflow-trt dockerfile.")],
    kind: Annotated[str, typer.Option(help="deployment, or kserve for a ServingRuntime and an InferenceService.")] = (
        "deployment"
    ),
    output: Annotated[Path | None, typer.Option(help="A file to write. Default: standard output.")] = None,
    name: Annotated[str, typer.Option(help="Of the objects and the model. Default: the registered model's.")] = "",
    namespace: Annotated[str, typer.Option(help="Where they are made. Default: the current one.")] = "",
    port: Annotated[int, typer.Option(help="What the server listens on.")] = 8080,
    gpus: Annotated[int, typer.Option(help="GPUs of a pod.")] = 1,
    min_replicas: Annotated[int, typer.Option(help="Pods there are at least.")] = 1,
    max_replicas: Annotated[int, typer.Option(help="Pods there are at most; as many as requests in flight want.")] = 1,
    requests_per_replica: Annotated[int, typer.Option(help="Requests in flight that one pod is for.")] = 32,
    prometheus: Annotated[str, typer.Option(help="Prometheus's address, by which KServe scales.")] = "",
    tracking_uri: Annotated[str, typer.Option(help="Load the model from this registry, and follow its alias.")] = "",
    storage_uri: Annotated[str, typer.Option(help="Let KServe fetch the model from here, such as s3://...")] = "",
    model_config: Annotated[str, typer.Option(help='Load settings as JSON, like \'{"runtime": "auto"}\'.')] = "",
) -> None:
    """Write the objects of Kubernetes that serve a model: a Deployment and a Service, or KServe's."""
    from mlflow_trt.deploy.kubernetes.objects import kubernetes_objects, to_yaml, write_objects
    from mlflow_trt.deploy.kubernetes.options import KubernetesOptions

    settings = parse_settings(model_config, "--model-config")
    chosen = {"prometheus": prometheus} if prometheus else {}
    options = KubernetesOptions(
        image=image, kind=kind, name=name or None, namespace=namespace or None, port=port, gpus=gpus,
        min_replicas=min_replicas, max_replicas=max(min_replicas, max_replicas), model_config=settings,
        requests_per_replica=requests_per_replica, tracking_uri=tracking_uri or None, storage_uri=storage_uri or None,
        **chosen,
    )  # fmt: skip
    with results_on_stdout(output is None):
        objects = kubernetes_objects(uri, options)
    if output is None:
        typer.echo(to_yaml(objects), nl=False)
    else:
        write_objects(objects, output)
