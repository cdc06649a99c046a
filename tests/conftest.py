from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import networks
import numpy as np
import pytest
from helpers import Store
from mlflow import MlflowClient
from real_models import CLS, MAGIKA
from tiers import COLLECTED, COSTS

import mlflow_trt
from mlflow_trt.backends import onnxruntime_process
from mlflow_trt.backends.cuda_driver import probe
from mlflow_trt.backends.onnxruntime_process import shared_process
from mlflow_trt.core.arrays import Array

STORES = {"store", "module_store"}


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if STORES & fixtures:
            item.add_marker(pytest.mark.store)
        if "server" in fixtures:
            item.add_marker(pytest.mark.server)
    problem = probe().problem
    for item in items if problem else ():
        if item.get_closest_marker("gpu"):  # a keyword is a folder's name, too
            item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU: {problem}"))
    config.stash[COLLECTED] = [*items]
    yield  # options such as -m leave some out
    if hasattr(config, "workerinput"):  # one of several processes, which get one file after the other in this order
        _put_long_files_first(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if item.get_closest_marker("gpu") is None or probe().problem is not None:
        return (yield)
    with _share_of_the_gpu(alone=item.get_closest_marker("alone_on_gpu") is not None):
        return (yield)


@contextmanager
def _share_of_the_gpu(*, alone: bool) -> Iterator[None]:
    """Among all processes that run these tests: together with others, or while none of them uses the GPU."""
    path = Path(tempfile.gettempdir()) / f"mlflow-trt-tests-{os.getuid()}"
    with path.with_suffix(".turn").open("ab") as turn, path.with_suffix(".gpu").open("ab") as gpu:
        # Who wants it alone keeps the turn until the others have ended, or they would come one after the other.
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(gpu, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        yield


def _put_long_files_first(items: list[pytest.Item]) -> None:
    """Or, at the end, one process would be busy with a long file and the others idle."""
    costs = Counter[Path]()
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        costs[item.path] += max((cost for mark, cost in COSTS.items() if mark in marks), default=0) * 10 + 1
    items.sort(key=lambda item: (-costs[item.path], item.path))


@pytest.fixture(scope="session", autouse=True)
def _one_process_of_onnxruntime():
    """For all conversions, which else would start one each."""
    with shared_process():
        yield


@pytest.fixture
def own_processes(monkeypatch):
    """Conversions have their own process of ONNX Runtime, as a user's have."""
    monkeypatch.setattr(onnxruntime_process, "_current", ContextVar("own_process", default=None))


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    """No test sees engines that another one, or the user, cached."""
    monkeypatch.setenv("MLFLOW_TRT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _no_server_of_models(monkeypatch):
    """What makes this process one in a test, which MLflow's scoring server does for good, is taken back after it."""
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    monkeypatch.delenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT")


@pytest.fixture
def messages(caplog):
    """What the package tells the user, whether or not MLflow's logger passes it on to the root."""
    logger = logging.getLogger("mlflow.mlflow_trt")
    logger.propagate = False
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield caplog
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(caplog.handler)
    logger.propagate = True


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    """A database with MLflow's tables, which take seconds to make."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="module")
def module_store(tmp_path_factory, empty_database) -> Store:
    return Store(tmp_path_factory.mktemp("store"), empty_database)


@pytest.fixture
def store(tmp_path, empty_database) -> Store:
    return Store(tmp_path, empty_database)


@pytest.fixture(scope="session")
def magika_folder(tmp_path_factory) -> Path:
    """magika, converted once for all tests that only read it."""
    folder = tmp_path_factory.mktemp("magika") / "model"
    mlflow_trt.save_model(MAGIKA.path(), folder, **MAGIKA.recipe)
    return folder


@pytest.fixture(scope="session")
def cls_folder(tmp_path_factory) -> Path:
    """The text direction classifier: a model whose typed model differs from the source model."""
    folder = tmp_path_factory.mktemp("cls") / "model"
    mlflow_trt.save_model(CLS.path(), folder, **CLS.recipe)
    return folder


@pytest.fixture(scope="session")
def product_folder(tmp_path_factory) -> Path:
    """`networks.product`, for rows of 16, converted once for all tests that only read it."""
    folder = tmp_path_factory.mktemp("product") / "product"
    mlflow_trt.save_model(networks.product(), folder, batch=(1, 4, 8), verify=False)
    return folder


@pytest.fixture(scope="session")
def product_weights(product_folder) -> Array:
    """What it multiplies rows with, as ONNX Runtime computes it."""
    with mlflow_trt.load_model(str(product_folder), runtime="onnxruntime") as session:
        return session.run({"x": np.eye(16, dtype=np.float32)})["y"]
