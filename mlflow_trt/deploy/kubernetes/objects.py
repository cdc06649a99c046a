"""A model as objects of Kubernetes: a Deployment with a Service, or a runtime and a service of KServe.

The pods run `mlflow-trt serve` in an image such as `mlflow-trt dockerfile` describes. What the objects say of memory
and of the model comes from its record; how many there are, and where the model comes from, is the user's to say.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from mlflow_trt.deploy.kubernetes.deployment import deployment_objects
from mlflow_trt.deploy.kubernetes.kserve import kserve_objects
from mlflow_trt.deploy.kubernetes.options import KubernetesOptions, dns_label
from mlflow_trt.deploy.kubernetes.parts import Object
from mlflow_trt.errors import OptionError
from mlflow_trt.flavor.fetch import local_path, read_record


def kubernetes_objects(model_uri: str, options: KubernetesOptions) -> list[Object]:
    """The objects, in the order in which they are to be made. Needs no cluster, and of the model only its record.

    Raises:
        ArtifactError: it is no model of this flavor.
        OptionError: no name follows from the URI, or the model cannot be loaded from a registry by it.
    """
    record = read_record(model_uri)
    name = options.name or _name_of(model_uri)
    if options.tracking_uri is not None and not model_uri.startswith(("models:/", "runs:/")):
        raise OptionError(f"{model_uri} is no URI that a registry knows, which tracking_uri needs", option="uri")
    if options.kind == "kserve":
        return kserve_objects(name, model_uri, record, options)
    return deployment_objects(name, model_uri, record, options)


def to_yaml(objects: list[Object]) -> str:
    """All objects as one text, for `kubectl apply -f -`."""
    return str(yaml.safe_dump_all(objects, sort_keys=False, width=120))


def write_objects(objects: list[Object], path: Path) -> None:
    """Write them into a file. Raises OptionError where it is there already."""
    try:
        with path.open("x") as file:
            file.write(to_yaml(objects))
    except FileExistsError:
        raise OptionError(f"{path} exists already; name another file", option="output") from None


def _name_of(model_uri: str) -> str:
    registered = re.fullmatch(r"models:/([^/@]+)(?:[/@][^/]+)?", model_uri)
    local = local_path(model_uri)
    name = dns_label(registered[1] if registered else local.resolve().name if local.is_dir() else "")
    if not name:
        raise OptionError(f"{model_uri} tells no name for the model; give one with name=", option="name")
    return name
