"""Real models on the GPU: equal to a bare TensorRT loop bit for bit, and close to ONNX Runtime."""

from __future__ import annotations

import concurrent.futures
import time

import mlflow
import numpy as np
import pytest
from compare import relative_error
from real_models import ON_THE_GPU, RealModel

import mlflow_trt
from mlflow_trt.runtime.batching.sizes import FewSizes, pieces
from mlflow_trt.store.folder import read_folder

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=ON_THE_GPU, ids=lambda model: model.name)
def model(request) -> RealModel:
    return request.param


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp(model.name) / "model"
    mlflow_trt.save_model(model.path(), folder, **model.recipe)
    return read_folder(folder)


@pytest.fixture(scope="module")
def loaded(folder):
    started = time.perf_counter()
    # The sizes that a batch is cut into depend on time while they are compiled in the background.
    model = mlflow.pyfunc.load_model(str(folder.path), model_config={"warm_up": "off"})
    yield model, time.perf_counter() - started
    model.get_raw_model().close()


@pytest.fixture(scope="module")
def outputs(model, loaded):
    return {rows: loaded[0].predict(model.feeds(rows)) for rows in model.rows_at_once}


def test_close_to_onnxruntime(model, folder, loaded, outputs, report):
    worst, largest = 0.0, 0.0
    with mlflow_trt.load_model(str(folder.path), runtime="onnxruntime") as session:
        for rows, actual in outputs.items():
            expected = session.run(model.feeds(rows))
            worst = max(worst, relative_error(actual, expected))
            largest = max(largest, *(float(np.abs(actual[name] - expected[name]).max()) for name in expected))
    engine = folder.record.engines[0]
    rows = ", ".join(map(str, model.rows_at_once))
    report((model.name, str(folder.record.recipe.precision), rows, f"{largest:.2e}", f"{worst:.2e}",
            f"{engine.build_seconds:.2f}", f"{loaded[1]:.2f}"))  # fmt: skip
    assert worst < model.relative_error


def test_equal_to_a_bare_loop(model, folder, outputs):
    from bare import BareLoop  # needs pycuda

    record = folder.record
    axis = record.batch_axis
    loop = BareLoop(folder.read_plan(record.engines[0]))
    try:
        for rows, actual in outputs.items():
            feeds = model.feeds(rows)
            if axis is None or not axis.splits:
                expected = loop.run(feeds)
            else:
                limits = record.profiles[0].ranges[axis.inputs[0]]
                sizes = FewSizes(limits.min[0], limits.opt[0], limits.max[0])
                parts = [loop.run_piece(feeds, axis, piece) for piece in pieces(rows, sizes)]
                expected = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            for name, array in expected.items():
                assert np.array_equal(actual[name], array), (name, rows)
    finally:
        loop.close()


@pytest.mark.parametrize("max_batch_delay_ms", [0, 2.0], ids=["each by itself", "together"])
def test_eight_threads_at_once(max_batch_delay_ms, model, folder, outputs):
    tasks = [rows for rows in model.rows_at_once for _ in range(8)]
    feeds = {rows: model.feeds(rows) for rows in model.rows_at_once}
    settings = {"max_batch_delay_ms": max_batch_delay_ms, "warm_up": "off"}  # else some run in sizes that are ready
    loaded = mlflow.pyfunc.load_model(str(folder.path), model_config=settings)
    with loaded.get_raw_model(), concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda rows: loaded.predict(feeds[rows]), tasks))
    for rows, result in zip(tasks, results, strict=True):
        if max_batch_delay_ms:
            assert relative_error(result, outputs[rows]) < model.relative_error
        else:
            for name, array in outputs[rows].items():
                assert np.array_equal(result[name], array), (name, rows)
