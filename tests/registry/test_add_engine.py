"""Several engines in one model: how one is added, and which one is taken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlflow
import networks
import numpy as np
import pytest
from command_line import run
from helpers import Store, gpu
from mlflow.artifacts import download_artifacts
from registries import failing, registry_state

import mlflow_trt
from mlflow_trt import RecipeError
from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.core.compatibility import why_not
from mlflow_trt.core.types import Distribution
from mlflow_trt.registry import add_engine
from mlflow_trt.registry.add_engine import _widen_requirements
from mlflow_trt.registry.add_engine import add_engine as add
from mlflow_trt.store.folder import read_folder
from mlflow_trt.store.write_folder import add_engine_file


@pytest.fixture(scope="module")
def converted(module_store):
    mlflow.onnx.log_model(networks.product(), name="p", registered_model_name="p", pip_requirements=["onnx"])
    mlflow_trt.convert_model_version("models:/p/1", "p-trt", batch=(1, 4, 8), targets="sm86", tags={"team": "a"})
    module_store.client.update_model_version("p-trt", "1", "described")
    return module_store


@pytest.fixture
def registered(converted, tmp_path):
    return Store.copy_of(converted, tmp_path / "store")


def digests(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_makes_a_new_version_and_leaves_the_old_one_alone(registered, tmp_path):
    before = digests(Path(download_artifacts("models:/p-trt/1", dst_path=str(tmp_path / "before"))))
    made = add("models:/p-trt/1", targets="sm120", alias="both")
    assert (made.name, str(made.version)) == ("p-trt", "2")
    after = Path(download_artifacts("models:/p-trt/1", dst_path=str(tmp_path / "after")))
    assert digests(after) == before

    folder = read_folder(Path(download_artifacts("models:/p-trt/2", dst_path=str(tmp_path / "made"))))
    first, second = folder.record.engines
    assert [first.target, second.target] == ["sm86", "sm120"]
    assert (folder.path / first.file).read_bytes() == before[first.file]
    assert len(folder.read_plan(second)) == second.size
    assert folder.record.recipe.targets == ("sm86",)
    left, right = (
        json.loads(text) for text in (before["mlflow_trt.json"], (folder.path / "mlflow_trt.json").read_bytes())
    )
    assert {key for key in left if left[key] != right[key]} == {"engines", "lineage"}
    model = mlflow.models.Model.load(str(folder.path))
    assert [engine["target"] for engine in model.flavors["mlflow_trt"]["engines"]] == ["sm86", "sm120"]
    assert model.signature == mlflow.models.Model.load("models:/p-trt/1").signature
    x = networks.rows(11)
    outputs = [
        mlflow.pyfunc.load_model(f"models:/p-trt/{n}", model_config={"runtime": "onnxruntime"}).predict({"x": x})["y"]
        for n in (1, 2)
    ]
    assert np.array_equal(*outputs)


def test_lineage_goes_on(registered):
    made = add("models:/p-trt/1", targets="sm120", alias="both")
    assert made.tags["mlflow_trt.extends"] == "models:/p-trt/1"
    assert made.tags["mlflow_trt.source"] == "models:/p/1"
    assert made.tags["mlflow_trt.target"] == "sm86, sm120"
    assert made.tags["team"] == "a"
    assert made.description == "fp32, batch 1:4:8, sm86, sm120, from models:/p/1, error not measured\n\ndescribed"
    old = registered.client.get_model_version("p-trt", "1")
    assert old.tags["mlflow_trt.converted_to.p-trt.2"] == "models:/p-trt/2"
    assert str(registered.client.get_model_version_by_alias("p-trt", "both").version) == "2"


def test_an_engine_that_is_there_is_not_built_again(registered, messages):
    assert str(add("models:/p-trt/1", targets="sm86").version) == "1"
    assert "models:/p-trt/1 has an engine for this already" in messages.text


def test_each_gpu_gets_its_own(registered, tmp_path):
    add("models:/p-trt/1", targets=["sm89", "sm120"])
    record = read_folder(Path(download_artifacts("models:/p-trt/2", dst_path=str(tmp_path)))).record
    version = trt.load().version

    def fitting(target):
        return [
            engine.target
            for engine in record.engines
            if why_not(engine, Distribution.TENSORRT_RTX, version, gpu(target)) is None
        ]

    assert fitting("sm86") == ["sm86"]
    assert fitting("sm89") == fitting("sm120") == ["sm89-sm120"]
    assert fitting("sm80") == []


def test_without_a_gpu_a_target_is_needed(registered, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(RecipeError, match="there is no GPU here to build an engine for") as caught:
        add("models:/p-trt/1")
    assert caught.value.option == "targets"


@pytest.mark.parametrize("step", ["set_alias", "point_to", "register_version", "log_folder", "build_engine"])
def test_a_failure_leaves_the_registry_as_it_was(step, registered, monkeypatch):
    before = registry_state(registered.client)
    with monkeypatch.context() as patched:
        patched.setattr(add_engine, step, failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            add("models:/p-trt/1", targets="sm120", alias="both")
    assert registry_state(registered.client) == before


def test_engines_of_several_releases_and_gpu_models(tmp_path):
    mlflow_trt.save_model(networks.product(), tmp_path / "model", batch=4)
    record = read_folder(tmp_path / "model").record
    (engine,) = record.engines
    plan = tmp_path / "model" / engine.file
    for version in (engine.version, "1.9.0.1", engine.version):
        record = add_engine_file(tmp_path / "model", replace(engine, version=version), plan, extends="models:/m/1")
        _widen_requirements(tmp_path / "model", record)
    names = [known.file.removeprefix("engines/tensorrt_rtx-") for known in record.engines]
    assert names == [f"{engine.version}-sm80plus.plan", f"{engine.version}-sm80plus-2.plan", "1.9.0.1-sm80plus.plan",
                     f"{engine.version}-sm80plus-3.plan"]  # fmt: skip
    assert read_folder(tmp_path / "model").record == record
    for file in ("requirements.txt", "conda.yaml"):
        assert f"tensorrt-rtx>={engine.version},<=1.9.0.1" in (tmp_path / "model" / file).read_text()
    for newer in ("1.10.0.1", "1.10.0.1.post1", "1.11.0.1"):
        record = add_engine_file(tmp_path / "model", replace(engine, version=newer), plan, extends="models:/m/1")
        _widen_requirements(tmp_path / "model", record)
        for file in ("requirements.txt", "conda.yaml"):
            words = (tmp_path / "model" / file).read_text().split()
            assert f"tensorrt-rtx>={engine.version},<={newer}" in words


def test_the_command(registered):
    tracking = {"MLFLOW_TRACKING_URI": registered.uri, "MLFLOW_EXPERIMENT_ID": registered.experiment_id}
    code, output, errors = run("add-engine", "models:/p-trt/1", "--target", "sm120", "--json", **tracking)
    assert code == 0, errors
    result = json.loads(output)
    assert result["uri"] == "models:/p-trt/2"
    assert result["lineage"]["extends"] == "models:/p-trt/1"
    code, _, errors = run("add-engine", "no-uri", **tracking)
    assert code == 1
    assert "is no registered version; expected models:/name/version" in errors
