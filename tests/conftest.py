from __future__ import annotations

import logging
from pathlib import Path

import networks
import numpy as np
import pytest
from helpers import Store
from mlflow import MlflowClient
from real_models import CLS, MAGIKA

import mlflow_trt
from mlflow_trt.backends.cuda_driver import probe
from mlflow_trt.core.arrays import Array

STORES = {"store", "module_store"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if STORES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.store)
    problem = probe().problem
    if problem is None:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU: {problem}"))


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    """No test sees engines that another one, or the user, cached."""
    monkeypatch.setenv("MLFLOW_TRT_CACHE_DIR", str(tmp_path / "cache"))


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
