"""`mlflow models serve`, started for real, asked in every form that it takes."""

from __future__ import annotations

import io
import json
import re

import mlflow
import networks
import numpy as np
import pandas as pd
import pytest
import requests
from helpers import PATIENCE
from real_models import MAGIKA
from servers import served

import mlflow_trt

pytestmark = pytest.mark.server

CPU = {"runtime": "onnxruntime"}
COUNT = 5


@pytest.fixture(scope="module")
def feeds():
    return MAGIKA.feeds(COUNT)


@pytest.fixture(scope="module")
def expected(feeds, magika_folder):
    with mlflow_trt.load_model(str(magika_folder), runtime="onnxruntime") as session:
        return session.run(feeds)["target_label"]


@pytest.fixture(scope="module")
def server(module_store):
    """magika, registered and served."""
    mlflow_trt.log_model(MAGIKA.path(), name="magika", registered_model_name="magika", **MAGIKA.recipe)
    with served("models:/magika/1", module_store.uri, CPU) as address:
        yield address


def post(server, **request):
    response = requests.post(f"{server}/invocations", timeout=PATIENCE, **request)
    return response.status_code, response.json()


def post_json(server, body):
    return post(server, data=json.dumps(body), headers={"Content-Type": "application/json"})


def scores(answer):
    """Of a dict of arrays, or of records where a table was sent."""
    predictions = answer["predictions"]
    if isinstance(predictions, list):
        return np.asarray([row["target_label"] for row in predictions], np.float32)
    return np.asarray(predictions["target_label"], np.float32)


def frame(feeds):
    return pd.DataFrame({"bytes": [row.tolist() for row in feeds["bytes"]]})


@pytest.mark.parametrize(
    "body",
    [
        lambda feeds: {"inputs": {"bytes": feeds["bytes"].tolist()}},
        lambda feeds: {"inputs": feeds["bytes"].tolist()},
        lambda feeds: {"instances": [{"bytes": row.tolist()} for row in feeds["bytes"]]},
        lambda feeds: {"dataframe_split": frame(feeds).to_dict(orient="split")},
        lambda feeds: {"dataframe_records": frame(feeds).to_dict(orient="records")},
    ],
    ids=["inputs", "inputs of one tensor", "instances", "dataframe_split", "dataframe_records"],
)
def test_json(body, server, feeds, expected):
    status, answer = post_json(server, body(feeds))
    assert status == 200
    assert np.allclose(scores(answer), expected, atol=1e-6)


def test_parquet(server, feeds, expected):
    body = io.BytesIO()
    frame(feeds).to_parquet(body)
    status, answer = post(server, data=body.getvalue(), headers={"Content-Type": "application/vnd.apache.parquet"})
    assert status == 200
    assert np.allclose(scores(answer), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": {"byts": [[1] * 2048]}}, "input 'bytes' is missing"),
        ({"inputs": {"bytes": [[1] * 2047]}}, r"has the shape \(1, 2047\); expected 2048 at axis 1"),
        ({"inputs": {"bytes": [["a"] * 2048]}}, "input 'bytes' is of dtype <U1; expected int32"),
        ({"rows": []}, "inputs"),
    ],
)
def test_bad_input_is_a_bad_request(body, message, server):
    status, answer = post_json(server, body)
    assert status == 400
    assert re.search(message, answer["message"])


def test_the_server_goes_on_after_bad_input(server, feeds, expected):
    assert post_json(server, {"inputs": {"bytes": "nonsense"}})[0] == 400
    assert requests.get(f"{server}/ping", timeout=PATIENCE).ok
    status, answer = post_json(server, {"inputs": {"bytes": feeds["bytes"].tolist()}})
    assert status == 200
    assert np.allclose(scores(answer), expected, atol=1e-6)


@pytest.mark.exhaustive
def test_without_a_gpu_a_server_does_not_start_silently_on_the_cpu(store, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    mlflow_trt.log_model(networks.product(), name="product", registered_model_name="product")
    with (
        pytest.raises(RuntimeError, match="source model on the CPU, start the server with MLFLOW_PYFUNC"),
        served("models:/product/1", mlflow.get_tracking_uri(), {}),
    ):
        pass
