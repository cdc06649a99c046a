"""`mlflow-trt serve --follow-aliases`: a version takes over from another while clients ask."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import networks
import numpy as np
import pytest
import tritonclient.http as triton
from helpers import wait_for
from onnx import numpy_helper
from servers import TensorServer

import mlflow_trt
from examples.serving import running

pytestmark = pytest.mark.server

CLIENTS = 4


def scaled(factor):
    model = networks.product()
    (weights,) = model.graph.initializer
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights) * np.float32(factor), "w"))
    return model


def register(factor):
    options = {"name": "p", "registered_model_name": "p", "batch": (1, 4, 8), "verify": False}
    mlflow_trt.log_model(scaled(factor), **options)


def test_an_alias_that_moves(store):
    """Every answer is that of the version which it names, none is missing, and the new one comes to answer all."""
    register(1)
    register(2)
    store.client.set_registered_model_alias("p", "live", "1")
    server = TensorServer(
        "models:/p@live",
        model_config={"runtime": "onnxruntime"},
        options=["--follow-aliases", "0.2"],
        environment={"MLFLOW_TRACKING_URI": store.uri},
    )
    (weights,) = (numpy_helper.to_array(tensor) for tensor in networks.product().graph.initializer)
    right, done = [], threading.Event()
    versions = [[] for _ in range(CLIENTS)]  # that each client was answered by, in the order in which it asked

    def ask(seed):
        mine = versions[seed]
        x = networks.rows(3, seed=seed)
        tensor = triton.InferInput("x", [3, 16], "FP32").set_data_from_numpy(x)
        with triton.InferenceServerClient(server.address.removeprefix("http://")) as client:
            while not done.is_set():
                answer = client.infer("p", [tensor])
                version = int(answer.get_response()["model_version"])
                right.append(np.allclose(answer.as_numpy("y"), version * (x @ weights), atol=1e-3))
                mine.append(version)

    with running(server), ThreadPoolExecutor(CLIENTS) as pool:
        try:
            asking = [pool.submit(ask, seed) for seed in range(CLIENTS)]
            wait_for(lambda: all(len(mine) > 5 for mine in versions))
            assert all(set(mine) == {1} for mine in versions)
            store.client.set_registered_model_alias("p", "live", "2")
            wait_for(lambda: all(mine.count(2) > 5 for mine in versions))
            store.client.delete_registered_model_alias("p", "live")
            wait_for(lambda: "p, version 2, stays" in server.log())
        finally:
            done.set()
        for one in asking:
            one.result()
        assert not one_of_version_1(server)
    assert all(right)
    assert all(mine == sorted(mine) for mine in versions)  # never the old one again


def one_of_version_1(server):
    with triton.InferenceServerClient(server.address.removeprefix("http://")) as client:
        return client.is_model_ready("p", "1")
