"""From a registered model of flavor onnx to a registered one with an engine."""

from __future__ import annotations

import json

import mlflow
import networks
import numpy as np
import pytest
from compare import relative_error
from mlflow.models import ModelSignature, infer_signature
from real_models import MAGIKA
from tiers import exhaustive

import mlflow_trt
from mlflow_trt import RecipeError
from mlflow_trt.flavor.fetch import read_record

CPU = {"runtime": "onnxruntime"}


@pytest.fixture
def source(store):
    """Version 1 of `product`, of flavor onnx, with the alias champion."""
    with mlflow.start_run() as run:
        info = mlflow.onnx.log_model(
            networks.product(),
            name="product",
            registered_model_name="product",
            signature=infer_signature(networks.rows(2), networks.rows(2, 8)),
            pip_requirements=["onnxruntime"],
        )
    store.client.set_registered_model_alias("product", "champion", "1")
    return {"model": info.model_uri, "run": run.info.run_id, "model_id": info.model_id}


@pytest.mark.parametrize(
    "uri", ["models:/product/1", *exhaustive("models:/product@champion", "models:/product/latest")]
)
def test_converts_a_registered_version(uri, source, store):
    version = mlflow_trt.convert_model_version(uri, "product.trt", batch=(1, 4, 8), tags={"stage": "test"})

    assert (version.name, str(version.version)) == ("product.trt", "1")
    assert version.tags["mlflow_trt.source"] == "models:/product/1"
    assert set(version.tags) == {
        *(f"mlflow_trt.{name}" for name in ("source", "precision", "target", "fingerprint", "conversion")),
        "stage",
    }
    assert all(len(text) < 30 for text in version.tags.values())
    assert version.tags["stage"] == "test"
    record = read_record("models:/product.trt/1")
    kept = record.lineage["signature"]
    assert ModelSignature.from_dict(json.loads(kept)) == mlflow.models.get_model_info("models:/product/1").signature
    assert {key: value for key, value in record.lineage.items() if key != "signature"} == {
        "recipe_digest": record.lineage["recipe_digest"],
        "source": "models:/product/1",
        "name": "product",
        "version": "1",
        "model_id": source["model_id"],
        "run_id": source["run"],
    }
    model = mlflow.pyfunc.load_model("models:/product.trt/1", model_config=CPU)
    x = networks.rows(5)
    expected = mlflow.pyfunc.load_model("models:/product/1").predict(x)
    assert relative_error(model.predict(x), expected) < 1e-6


def test_converts_from_a_run_and_from_a_logged_model(source, store):
    for uri in (f"runs:/{source['run']}/product", source["model"]):
        version = mlflow_trt.convert_model_version(uri, "product-trt")
        assert read_record(f"models:/product-trt/{version.version}").lineage["model_id"] == source["model_id"]


def test_carries_the_signature_over(source, store):
    mlflow_trt.convert_model_version("models:/product/1", "product-trt")
    signature = mlflow.models.get_model_info("models:/product-trt/1").signature
    own = mlflow.models.get_model_info("models:/product/1").signature
    assert signature.inputs is None  # it has no name there
    (tensor,), (before,) = signature.outputs.inputs, own.outputs.inputs
    assert (tensor.type, tensor.shape, tensor.name) == (before.type, before.shape, "y")


@pytest.mark.exhaustive
def test_converts_a_model_of_our_own_again(store):
    mlflow_trt.log_model(MAGIKA.path(), name="magika", batch=(1, 2, 4), registered_model_name="magika")
    mlflow_trt.convert_model_version("models:/magika/1", "magika", batch=(1, 8, 16))
    first, second = read_record("models:/magika/1"), read_record("models:/magika/2")
    assert first.source == second.source
    assert second.profiles[0].ranges["bytes"].max == (16, 2048)


def test_a_failure_registers_nothing(source, store):
    before = len(store.logged_models())
    with pytest.raises(RecipeError):
        mlflow_trt.convert_model_version("models:/product/1", "product-trt", precision="fp13")
    with pytest.raises(mlflow.MlflowException, match="not found"):
        mlflow_trt.convert_model_version("models:/product/9", "product-trt")
    assert [model.name for model in store.client.search_registered_models()] == ["product"]
    assert len(store.logged_models()) == before


def test_external_data_comes_along(store, tmp_path):
    (tmp_path / "net").mkdir()
    networks.external(tmp_path / "net" / "net.onnx")
    mlflow_trt.save_model(tmp_path / "net" / "net.onnx", tmp_path / "model")
    version = mlflow_trt.convert_model_version(str(tmp_path / "model"), "product-trt")
    model = mlflow.pyfunc.load_model(f"models:/product-trt/{version.version}", model_config=CPU)
    weights = networks.onnx.numpy_helper.to_array(networks.product().graph.initializer[0])
    x = networks.rows(3)
    assert np.allclose(model.predict({"x": x})["y"], x @ weights, atol=1e-5)
