"""Objects for Kubernetes: compared with the schemas of its releases and of KServe, and what they run is run."""

from __future__ import annotations

import ast
import functools
import os
import re
import sys
from pathlib import Path

import kubernetes_validate
import networks
import numpy as np
import pytest
import requests
import yaml
from command_line import run
from tiers import exhaustive
from wheel_files import wheel_file

import mlflow_trt
from examples.serving import ServerProcess, free_port, running
from mlflow_trt.client import Client
from mlflow_trt.deploy.kubernetes.objects import kubernetes_objects, to_yaml
from mlflow_trt.deploy.kubernetes.options import KubernetesOptions, dns_label
from mlflow_trt.errors import OptionError

pytestmark = pytest.mark.slow

IMAGE = "registry.example.org/models/product:1.2"
RELEASES = ("1.30", kubernetes_validate.latest_version())
KSERVE = "kserve==0.21.0"
SETTINGS = {"runtime": "onnxruntime"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "A product.v2"
    mlflow_trt.save_model(networks.product(), folder, batch=(1, 4, 8), verify=False)
    return folder


def objects(folder, **options):
    return {one["kind"]: one for one in kubernetes_objects(str(folder), KubernetesOptions(image=IMAGE, **options))}


def validate(one):
    for release in RELEASES:
        kubernetes_validate.validate(one, release, strict=True)


VARIANTS = [
    {},
    {"name": "resnet50", "namespace": "models", "port": 9000, "gpus": 0, "model_config": SETTINGS},
    {"min_replicas": 2, "max_replicas": 8, "requests_per_replica": 16},
]


@pytest.mark.parametrize("options", VARIANTS)
def test_deployments_fit_the_schemas_of_kubernetes(options, folder):
    made = objects(folder, **options)
    assert list(made) == ["Deployment", "Service", *(["HorizontalPodAutoscaler"] if "max_replicas" in options else [])]
    for one in made.values():
        validate(one)
    assert list(yaml.safe_load_all(to_yaml(list(made.values())))) == list(made.values())


def test_the_schemas_refuse_what_is_wrong(folder):
    deployment = objects(folder)["Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    container["readinesProbe"] = container.pop("readinessProbe")
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(deployment)


def test_what_a_deployment_says(folder):
    made = objects(folder, min_replicas=3, max_replicas=3)
    pod = made["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert made["Deployment"]["metadata"]["name"] == "a-product-v2"
    assert made["Deployment"]["spec"]["replicas"] == 3
    assert made["Service"]["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["resources"]["requests"]["memory"] == "3Gi"  # 2 GiB, and the engine
    assert pod["metadata"]["annotations"]["mlflow-trt/precision"] == "fp32"
    assert re.fullmatch("TensorRT-RTX [0-9.]+, sm80plus", pod["metadata"]["annotations"]["mlflow-trt/engines"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod["spec"]["volumes"]}
    drain = int(container["command"][container["command"].index("--drain-seconds") + 1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > drain + 60


@functools.cache
def kserve_type(kind):
    """The fields of a class of KServe's own API, with their types, and those that have to be there."""
    file = re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", kind).lower()
    text = wheel_file(KSERVE, f"kserve/models/{file}.py").read_text()
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign):
            name = getattr(node.targets[0], "id", None)
            if name in {"openapi_types", "attribute_map"}:
                found[name] = ast.literal_eval(node.value)
    names = found["attribute_map"]
    required = {names[field] for field in re.findall(r"Invalid value for `(\w+)`, must not be `None`", text)}
    return {names[field]: kind for field, kind in found["openapi_types"].items()}, required


def check(value, kind, place):
    """Compare a value with a type of KServe's API. Types of Kubernetes itself are compared elsewhere."""
    if match := re.fullmatch(r"list\[(.*)\]", kind):
        assert isinstance(value, list), place
        for number, one in enumerate(value):
            check(one, match[1], f"{place}[{number}]")
    elif match := re.fullmatch(r"dict\(str, (.*)\)", kind):
        assert isinstance(value, dict), place
        for key, one in value.items():
            check(one, match[1], f"{place}.{key}")
    elif kind in {"str", "int", "bool"}:
        assert type(value).__name__ == kind, place
    elif kind == "V1beta1MetricQuantity":
        assert re.fullmatch(r"\d+", value), place
    elif kind.startswith(("V1alpha1", "V1beta1")):
        fields, required = kserve_type(kind)
        assert required <= value.keys() <= fields.keys(), place
        for key, one in value.items():
            check(one, fields[key], f"{place}.{key}")


KSERVE_VARIANTS = [
    {},
    {"name": "resnet50", "namespace": "models", "storage_uri": "s3://models/resnet50", "min_replicas": 0},
    {"min_replicas": 1, "max_replicas": 4, "prometheus": "http://prometheus:9090", "model_config": SETTINGS},
]


@pytest.mark.parametrize("options", KSERVE_VARIANTS)
def test_objects_of_kserve_fit_its_types(options, folder):
    made = objects(folder, kind="kserve", **options)
    runtime, service = made["ServingRuntime"], made["InferenceService"]
    check(runtime, "V1alpha1ServingRuntime", "ServingRuntime")
    check(service, "V1beta1InferenceService", "InferenceService")
    assert service["spec"]["predictor"]["model"]["runtime"] == runtime["metadata"]["name"]
    (known,) = runtime["spec"]["supportedModelFormats"]
    assert service["spec"]["predictor"]["model"]["modelFormat"]["name"] == known["name"]
    # What is Kubernetes' own in them, as a pod.
    pod = {key: runtime["spec"][key] for key in ("containers", "volumes")}
    pod["terminationGracePeriodSeconds"] = service["spec"]["predictor"]["terminationGracePeriodSeconds"]
    validate({"apiVersion": "v1", "kind": "Pod", "metadata": runtime["metadata"], "spec": pod})
    model = "/mnt/models" if "storage_uri" in options else "/opt/model"
    assert pod["containers"][0]["command"][2] == f"{{{{.Name}}}}={model}"
    scales = service["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"]
    assert scales == ("keda" if options.get("max_replicas", 1) > options.get("min_replicas", 1) else "none")


def test_types_of_kserve_refuse_what_is_wrong(folder):
    service = objects(folder, kind="kserve")["InferenceService"]
    service["spec"]["predictor"]["minReplica"] = 1
    with pytest.raises(AssertionError, match=r"InferenceService\.spec\.predictor"):
        check(service, "V1beta1InferenceService", "InferenceService")


@pytest.mark.server
@pytest.mark.parametrize("source", ["registry", *exhaustive("image")])
def test_what_a_pod_runs_serves_the_model(source, folder, store, request):
    if source == "registry":
        mlflow_trt.log_model(networks.product(), name="p", registered_model_name="p", batch=(1, 4, 8), verify=False)
        store.client.set_registered_model_alias("p", "live", "1")
        options = {"tracking_uri": store.uri}
    else:
        options = {}
    uri = "models:/p@live" if options else str(folder)
    port = free_port()
    made = objects(uri, name="product", port=port, model_config=SETTINGS, **options)
    (container,) = made["Deployment"]["spec"]["template"]["spec"]["containers"]
    local = {"product=/opt/model": f"product={folder}", "0.0.0.0": "127.0.0.1", "mlflow-trt": "mlflow_trt"}
    command = [sys.executable, "-m", *(local.get(part, part) for part in container["command"])]
    assert ("--follow-aliases" in command) == (source == "registry")
    variables = {one["name"]: one["value"] for one in container["env"] if one["name"] != "HOME"}
    address = f"http://127.0.0.1:{port}"
    ready = container["startupProbe"]["httpGet"]["path"]
    server = ServerProcess(command, {**os.environ, **variables}, ready=f"{address}{ready}")
    with running(server), Client(address, model="product") as client:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert requests.get(address + container[probe]["httpGet"]["path"], timeout=10).ok
        path = made["Deployment"]["spec"]["template"]["metadata"]["annotations"]["prometheus.io/path"]
        assert "mlflow_trt_requests_in_flight" in requests.get(address + path, timeout=10).text
        x = networks.rows(3)
        with mlflow_trt.load_model(uri, runtime="onnxruntime") as session:
            assert np.array_equal(client.predict({"x": x})["y"], session.run({"x": x})["y"])
        server.kill()  # asked to end, it would go on for as long as a pod may have requests


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "helm"}, "kind is 'helm'; choose one of deployment, kserve"),
        ({"image": "a b"}, "image is 'a b'; expected one like registry/name:tag"),
        ({"name": "A"}, "name is 'A'; expected small letters"),
        ({"namespace": "-"}, "namespace is '-'; expected small letters"),
        ({"gpus": -1}, "gpus is -1; expected 0 or more"),
        ({"min_replicas": 3}, "max_replicas is 1; expected 3 or more"),
        ({"min_replicas": 0}, "min_replicas is 0, which only kserve can do"),
        ({"port": 0}, "port is 0; expected 1 to 65535"),
        ({"storage_uri": "s3://a"}, "storage_uri is for kserve, without tracking_uri"),
        ({"model_config": {"runtim": 1}}, "unknown load setting 'runtim'"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(OptionError, match=message):
        KubernetesOptions(**{"image": IMAGE, **options})


def test_names(folder):
    assert dns_label("ResNet_50 (v2)") == "resnet-50-v2"
    assert len(dns_label("x" * 99)) == 50
    with pytest.raises(OptionError, match="is no URI that a registry knows"):
        objects(folder, tracking_uri="http://mlflow:5000")


def test_from_the_command_line(folder, tmp_path):
    code, output, errors = run("kubernetes", folder, "--image", IMAGE, "--kind", "kserve", "--max-replicas", 3)
    assert code == 0, errors
    assert [one["kind"] for one in yaml.safe_load_all(output)] == ["ServingRuntime", "InferenceService"]
    file = tmp_path / "product.yaml"
    for expected in (0, 1):
        code, output, errors = run("kubernetes", folder, "--image", IMAGE, "--output", file)
        assert (code, output) == (expected, "")
    assert "exists already" in errors
    assert [one["kind"] for one in yaml.safe_load_all(Path(file).read_text())] == ["Deployment", "Service"]
