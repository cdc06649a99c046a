"""`mlflow-trt serve --follow-aliases`: a version takes over from another while clients ask."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import networks
import numpy as np
import pytest
import tritonclient.http as triton
from helpers import PATIENCE, wait_for
from onnx import numpy_helper
from servers import TensorServer

import mlflow_trt
from examples.serving import running
from mlflow_trt.deploy.serve import follow
from mlflow_trt.deploy.serve.follow import AliasFollower
from mlflow_trt.deploy.serve.model_source import ModelSource
from mlflow_trt.deploy.serve.repository import ModelRepository

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


class Loaded:
    """A model that is served, as far as the follower knows one."""

    def __init__(self, source):
        self.source, self.name, self.version = source, source.name, source.version
        self.closed = threading.Event()

    def close(self):
        self.closed.set()


def served(version, alias):
    return Loaded(ModelSource(uri=f"models:/p/{version}", name="p", version=version, registered="p", alias=alias))


def live(version):
    return served(version, "live")


async def follow_until(is_enough, repository, load=live):
    following = asyncio.ensure_future(AliasFollower(repository, load, 0.01).follow())
    await asyncio.to_thread(wait_for, is_enough)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


class TestTheEnd:
    def test_no_registry_is_waited_for(self, monkeypatch):
        begun, may_go_on = threading.Event(), threading.Event()

        def unanswered(name, alias):
            begun.set()
            may_go_on.wait(PATIENCE)
            return "1"

        monkeypatch.setattr(follow, "alias_version", unanswered)
        asyncio.run(follow_until(begun.is_set, ModelRepository([live("1")])))
        assert not may_go_on.is_set()
        may_go_on.set()

    def test_no_version_is_waited_for_and_one_that_comes_too_late_is_closed(self, monkeypatch):
        begun, may_go_on, came = threading.Event(), threading.Event(), []

        def load(source):
            came.append(Loaded(source))
            begun.set()
            assert may_go_on.wait(PATIENCE)
            return came[0]

        monkeypatch.setattr(follow, "alias_version", lambda name, alias: "2")
        asyncio.run(follow_until(begun.is_set, ModelRepository([live("1")]), load))
        assert not may_go_on.is_set()
        assert not came[0].closed.is_set()
        may_go_on.set()
        assert came[0].closed.wait(PATIENCE)


def test_an_alias_that_comes_to_a_version_which_is_served_already(monkeypatch, messages):
    monkeypatch.setattr(follow, "alias_version", lambda name, alias: "2")
    repository = ModelRepository([live("1"), served("2", None)])
    said = (
        "p, version 1, stays: alias live leads to version 2, which is served by itself already; serve the alias under"
    )
    asyncio.run(follow_until(lambda: said in messages.text, repository))
    assert "NAME=models:/p@live" in messages.text
    assert repository.versions("p") == ["1", "2"]
