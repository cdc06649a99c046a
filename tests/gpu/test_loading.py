"""The load policy where there is a GPU."""

from __future__ import annotations

import concurrent.futures
import json
import shutil

import mlflow
import networks
import numpy as np
import pytest
from compare import relative_error
from helpers import PATIENCE, Store
from real_models import CLS, MAGIKA

import mlflow_trt
from examples.serving import served
from mlflow_trt import EngineMismatchError, IntegrityError
from mlflow_trt.backends import cuda_driver as hardware
from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.measure import doctor
from mlflow_trt.store import cache
from mlflow_trt.store import load as loading
from mlflow_trt.store.folder import read_folder
from mlflow_trt.store.record import RECORD_FILE

pytestmark = pytest.mark.gpu

X = networks.rows(5)


@pytest.fixture
def folder(tmp_path):
    mlflow_trt.save_model(networks.product(), tmp_path / "model", batch=(1, 4, 8))
    return tmp_path / "model"


@pytest.fixture
def expected(folder):
    with mlflow_trt.load_model(str(folder), runtime="onnxruntime") as session:
        return session.run({"x": X})


def made_by_another_release(folder):
    record = json.loads((folder / RECORD_FILE).read_text())
    record["engines"][0]["version"] = "1.0.0.1"
    (folder / RECORD_FILE).write_text(json.dumps(record))


@pytest.mark.parametrize("runtime", ["tensorrt", "auto"])
def test_the_stored_engine_is_used(runtime, folder, expected, monkeypatch):
    monkeypatch.setattr(loading, "build_engine", None)
    with mlflow_trt.load_model(str(folder), runtime=runtime) as session:
        assert session.runtime == "tensorrt"
        assert session.fallback_reason is None
        assert "TensorRT" in session.description
        assert relative_error(session.run({"x": X}), expected) < 2e-3


def test_an_engine_that_does_not_fit_is_rebuilt_once(folder, expected, monkeypatch, messages):
    made_by_another_release(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with mlflow_trt.load_model(str(folder)) as session:
        assert relative_error(session.run({"x": X}), expected) < 2e-3
    assert "No stored engine fits" in messages.text
    assert "it was built by TensorRT-RTX 1.0.0.1, and this is" in messages.text
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    monkeypatch.setattr(loading, "build_engine", None)
    with mlflow_trt.load_model(str(folder)) as session:
        assert relative_error(session.run({"x": X}), expected) < 2e-3


def test_a_damaged_cached_engine_is_built_again(folder, expected):
    made_by_another_release(folder)
    mlflow_trt.load_model(str(folder)).close()
    for plan in (cache.directory() / "engines").glob("*/engine.plan"):
        plan.write_bytes(plan.read_bytes()[:-1])
    with mlflow_trt.load_model(str(folder)) as session:
        assert relative_error(session.run({"x": X}), expected) < 2e-3


def test_engines_that_are_not_trusted_are_not_even_read(folder, expected, messages):
    for plan in (folder / "engines").iterdir():
        plan.write_bytes(b"somebody else's")
    with pytest.raises(IntegrityError):
        mlflow_trt.load_model(str(folder))
    with mlflow_trt.load_model(str(folder), trust_engines=False) as session:
        assert relative_error(session.run({"x": X}), expected) < 2e-3
    assert "trust_engines is false" in messages.text


def test_or_it_is_an_error(folder):
    made_by_another_release(folder)
    with pytest.raises(EngineMismatchError, match="Load with on_mismatch='rebuild'") as caught:
        mlflow_trt.load_model(str(folder), on_mismatch="error")
    assert "it was built by TensorRT-RTX 1.0.0.1" in caught.value.reasons[0]
    assert not (cache.directory() / "engines").exists()


def test_an_engine_for_another_gpu_does_not_fit(tmp_path):
    mlflow_trt.save_model(networks.product(), tmp_path / "model", targets=["sm75"])
    with pytest.raises(EngineMismatchError, match="it was built for sm75, and this GPU is"):
        mlflow_trt.load_model(str(tmp_path / "model"), on_mismatch="error")
    with mlflow_trt.load_model(str(tmp_path / "model"), runtime="onnxruntime") as session:
        expected = session.run({"x": X})
    with mlflow_trt.load_model(str(tmp_path / "model")) as session:
        assert relative_error(session.run({"x": X}), expected) < 2e-3


@pytest.mark.parametrize("runtime", ["tensorrt", "auto"])
def test_one_changed_byte_is_never_executed(runtime, folder):
    plan = folder / read_folder(folder).record.engines[0].file
    content = bytearray(plan.read_bytes())
    content[-10] ^= 1
    plan.write_bytes(content)
    with pytest.raises(IntegrityError):
        mlflow_trt.load_model(str(folder), runtime=runtime)


def test_a_rebuilt_typed_model(cls_folder, tmp_path):
    """cls is built from its typed model; the source model would not build."""
    shutil.copytree(cls_folder, tmp_path / "cls")
    made_by_another_release(tmp_path / "cls")
    feeds = CLS.feeds(4)
    with mlflow_trt.load_model(str(tmp_path / "cls"), runtime="onnxruntime") as session:
        expected = session.run(feeds)
    with mlflow_trt.load_model(str(tmp_path / "cls")) as session:
        assert relative_error(session.run(feeds), expected) < CLS.relative_error


def test_a_user_can_choose_lazy_kernels(folder, expected):
    with mlflow_trt.load_model(str(folder), kernel_specialization="lazy") as session:
        for _ in range(2):
            assert relative_error(session.run({"x": X}), expected) < 2e-3


@pytest.fixture
def with_kernels(tmp_path, monkeypatch):
    if not trt.load().is_rtx:
        pytest.skip("TensorRT compiles all kernels when it builds the engine")
    mlflow_trt.save_model(CLS.path(), tmp_path / "cls", store_kernels=True, **CLS.recipe)
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, str(tmp_path / "a fresh machine"))
    return tmp_path / "cls"


def kernels_of(session) -> bytes:
    with session._scheduler.slots.borrow() as slot, slot.engine.device.current():
        return slot.engine._contexts.kernels()


def test_stored_kernels_are_not_compiled_again(with_kernels, tmp_path, monkeypatch):
    """A session that never ran has the kernels that came with the model, and needs hardly any others."""
    (engine,) = read_folder(with_kernels).record.engines
    here = hardware.probe().gpus[0]
    assert (engine.kernels.gpu, engine.kernels.compute_capability) == (here.name, str(here.compute_capability))
    feeds = CLS.feeds(4)
    with mlflow_trt.load_model(str(with_kernels), runtime="onnxruntime") as session:
        expected = session.run(feeds)
    with mlflow_trt.load_model(str(with_kernels), self_test=False) as session:
        first = len(kernels_of(session))
        session.warm_up()
        more = len(kernels_of(session)) - first
        assert relative_error(session.run(feeds), expected) < CLS.relative_error

    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, str(tmp_path / "another fresh machine"))
    record = json.loads((with_kernels / RECORD_FILE).read_text())
    record["engines"][0]["kernels"] = None
    (with_kernels / RECORD_FILE).write_text(json.dumps(record))
    with mlflow_trt.load_model(str(with_kernels), self_test=False) as session:
        without = len(kernels_of(session))
    assert first > without
    assert more < (first - without) / 10


def test_the_self_test_runs_on_stored_kernels(with_kernels, messages):
    mlflow_trt.load_model(str(with_kernels)).close()
    assert "Self-test passed" in messages.text


@pytest.mark.parametrize("runtime", ["tensorrt", "auto"])
def test_changed_kernels_are_never_executed(runtime, with_kernels):
    path = with_kernels / read_folder(with_kernels).record.engines[0].kernels.file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"\.kernels is not the file that was logged"):
        mlflow_trt.load_model(str(with_kernels), runtime=runtime)


def test_where_nothing_can_be_cached_the_rebuilt_engine_is_used(folder, expected, monkeypatch, messages):
    made_by_another_release(folder)
    monkeypatch.setenv("MLFLOW_TRT_CACHE_DIR", "/proc/no/cache")
    with mlflow_trt.load_model(str(folder)) as session:
        assert relative_error(session.run({"x": X}), expected) < 2e-3
    assert "The engine cannot be kept in /proc/no/cache" in messages.text


def test_four_at_once_build_one_engine(folder, messages):
    made_by_another_release(folder)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        sessions = list(pool.map(lambda _: mlflow_trt.load_model(str(folder)), range(4)))
    for session in sessions:
        session.close()
    assert messages.text.count("; building one") == 1


def test_the_doctor_runs_an_engine():
    diagnosis = doctor.examine()
    assert diagnosis.can_build
    assert diagnosis.can_run
    assert diagnosis.can_run_on_cpu


def test_served(tmp_path, empty_database):
    store = Store(tmp_path, empty_database)
    mlflow_trt.log_model(MAGIKA.path(), name="magika", registered_model_name="magika", **MAGIKA.recipe)
    feeds = MAGIKA.feeds(11)
    here = mlflow.pyfunc.load_model("models:/magika/1")
    assert here.get_raw_model().runtime == "tensorrt"
    expected = here.predict(feeds)["target_label"]
    here.get_raw_model().close()
    import requests

    with served("models:/magika/1", store.uri, {}) as address:
        for _ in range(3):
            response = requests.post(
                f"{address}/invocations", json={"inputs": feeds["bytes"].tolist()}, timeout=PATIENCE
            )
            assert response.status_code == 200
            scores = np.asarray(response.json()["predictions"]["target_label"], np.float32)
            assert np.array_equal(scores, expected)
