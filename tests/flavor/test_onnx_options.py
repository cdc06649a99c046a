"""What `mlflow.onnx` takes: session options, providers, external data, names, files of settings, environments."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import networks
import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import Model

import mlflow_trt
from mlflow_trt import BuildError, OptionError
from mlflow_trt.convert.engine import builder
from mlflow_trt.flavor.fetch import read_record
from mlflow_trt.runtime.onnxruntime_session import OnnxRuntimeSession

CPU = {"runtime": "onnxruntime"}
OPTIONS = {
    "execution_mode": "parallel",
    "graph_optimization_level": 1,
    "intra_op_num_threads": 3,
    "inter_op_num_threads": 2,
    "extra_session_config": {"session.intra_op.allow_spinning": "0"},
}


def save(path, model=None, **keywords):
    mlflow_trt.save_model(networks.product() if model is None else model, path, verify=False, **keywords)


class TestOnnxRuntime:
    def test_session_options_mean_what_they_mean_in_mlflow_onnx(self, tmp_path):
        save(tmp_path / "model", onnx_session_options=OPTIONS, model_config=CPU)
        model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
        options = model.get_raw_model().inference_session.get_session_options()
        assert options.execution_mode == onnxruntime.ExecutionMode.ORT_PARALLEL
        assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 2)
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        assert Model.load(str(tmp_path / "model")).flavors["onnx"]["onnx_session_options"] == OPTIONS

    def test_they_are_load_settings_that_can_be_overridden(self, tmp_path, monkeypatch):
        save(tmp_path / "model", onnx_session_options={"intra_op_num_threads": 3})
        config = {**CPU, "onnx_session_options": {"intra_op_num_threads": 5}}
        with mlflow_trt.load_model(str(tmp_path / "model"), **config) as session:
            assert isinstance(session, OnnxRuntimeSession)
            assert session.inference_session.get_session_options().intra_op_num_threads == 5
        monkeypatch.setenv("MLFLOW_PYFUNC_INFERENCE_CONFIG", json.dumps(config))
        loaded = mlflow.pyfunc.load_model(str(tmp_path / "model"))
        assert loaded.get_raw_model().inference_session.get_session_options().intra_op_num_threads == 5

    def test_a_provider_that_is_not_there_is_left_out_with_a_warning(self, tmp_path, messages):
        providers = [("CUDAExecutionProvider", {"device_id": 0}), "CPUExecutionProvider"]
        save(tmp_path / "model", onnx_execution_providers=providers, model_config=CPU)
        loaded = mlflow.pyfunc.load_model(str(tmp_path / "model")).get_raw_model()
        assert loaded.inference_session.get_providers() == ["CPUExecutionProvider"]
        assert "it has no CUDAExecutionProvider that works here" in messages.text
        logged = Model.load(str(tmp_path / "model")).flavors["onnx"]["providers"]
        assert logged == [["CUDAExecutionProvider", {"device_id": 0}], "CPUExecutionProvider"]
        x = networks.rows(3)
        assert np.allclose(loaded.run({"x": x})["y"], mlflow_trt.load_model(str(tmp_path / "model")).run({"x": x})["y"])

    def test_an_option_of_a_provider_reaches_it(self, tmp_path):
        save(tmp_path / "model", onnx_execution_providers=[("CPUExecutionProvider", {})], model_config=CPU)
        loaded = mlflow.pyfunc.load_model(str(tmp_path / "model")).get_raw_model()
        assert loaded.inference_session.get_provider_options() == {"CPUExecutionProvider": {}}
        assert loaded.description.endswith("on the CPU")

    @pytest.mark.parametrize(
        ("keywords", "message"),
        [
            ({"onnx_session_options": {"threads": 1}}, "no 'threads'"),
            ({"onnx_session_options": {"intra_op_num_threads": -1}}, "a number of threads"),
            ({"onnx_session_options": {"execution_mode": "fast"}}, "sequential or parallel"),
            ({"onnx_session_options": {"graph_optimization_level": 3}}, "0, 1, 2 or 99"),
            ({"onnx_session_options": {"extra_session_config": {"key": 1}}}, "texts to texts"),
            ({"onnx_session_options": ["intra_op_num_threads"]}, "a mapping"),
            ({"onnx_execution_providers": "CPUExecutionProvider"}, "a list of names"),
            ({"onnx_execution_providers": [("CPUExecutionProvider",)]}, "a list of names"),
            ({"onnx_execution_providers": []}, "a list of names"),
        ],
    )
    def test_nonsense_is_refused_before_anything_is_built(self, keywords, message, tmp_path):
        with pytest.raises(OptionError, match=message) as caught:
            save(tmp_path / "model", **keywords)
        assert caught.value.option == next(iter(keywords))
        assert list(tmp_path.iterdir()) == []

    def test_a_model_that_was_damaged_is_named(self, tmp_path):
        save(tmp_path / "model", model_config=CPU)
        (tmp_path / "model" / "model.onnx").write_bytes(b"\x08\x09")
        with pytest.raises(mlflow_trt.IntegrityError, match="model.onnx"):
            mlflow_trt.load_model(str(tmp_path / "model"))


class TestExternalData:
    def test_weights_are_moved_out_and_in(self, tmp_path):
        model = networks.transformer()
        for name, moved in (("out", True), ("in", False), ("as it is", None)):
            save(tmp_path / name, model, batch=(1, 2, 4), shapes=SHAPES, save_as_external_data=moved)
            files = read_record(str(tmp_path / name)).source.files
            assert (len(files) > 1) == (moved is True)
            stored = onnx.load(tmp_path / name / "model.onnx").graph.initializer
            for found, given in zip(stored, model.graph.initializer, strict=True):
                assert np.array_equal(onnx.numpy_helper.to_array(found), onnx.numpy_helper.to_array(given))
        feeds = networks.sentences(3, 7)
        first, second = (
            mlflow_trt.load_model(str(tmp_path / name), runtime="onnxruntime").run(feeds) for name in ("out", "in")
        )
        assert all(np.array_equal(first[name], second[name]) for name in first)

    def test_of_a_file_with_external_data_too(self, tmp_path):
        networks.external(tmp_path / "net.onnx")
        save(tmp_path / "model", tmp_path / "net.onnx", save_as_external_data=False)
        assert len(read_record(str(tmp_path / "model")).source.files) == 1
        save(tmp_path / "same", tmp_path / "net.onnx", save_as_external_data=True)
        assert len(read_record(str(tmp_path / "same")).source.files) == 2


SHAPES = {"input_ids": ((-1, 4), (-1, 8), (-1, 16))}


class TestNames:
    def test_artifact_path_is_the_name(self, store, messages):
        info = mlflow_trt.log_model(networks.product(), artifact_path="old", verify=False)
        assert mlflow.get_logged_model(info.model_id).name == "old"
        assert "artifact_path is deprecated" in messages.text
        with pytest.raises(OptionError, match="give name only"):
            mlflow_trt.log_model(networks.product(), "new", artifact_path="old")

    def test_code_is_importable_once_a_model_is_loaded(self, tmp_path, monkeypatch):
        monkeypatch.setattr("sys.path", [*__import__("sys").path])
        (tmp_path / "code_of_a_model.py").write_text("ANSWER = 42\n")
        save(tmp_path / "model", code_paths=[str(tmp_path / "code_of_a_model.py")])
        mlflow_trt.load_model(str(tmp_path / "model"), runtime="onnxruntime").close()
        assert __import__("code_of_a_model").ANSWER == 42

    def test_per_cent_signs_in_paths_are_none_of_escapes(self, tmp_path):
        (tmp_path / "with%20sign").mkdir()
        folder = tmp_path / "with%20sign" / "model"
        save(folder)
        with mlflow_trt.load_model(str(folder), runtime="onnxruntime") as session:
            first = session.run({"x": networks.rows(2)})["y"]
        mlflow_trt.save_model(folder / "model.onnx", tmp_path / "again%20", verify=False)
        with mlflow_trt.load_model(str(tmp_path / "again%20"), runtime="onnxruntime") as session:
            assert np.array_equal(session.run({"x": networks.rows(2)})["y"], first)
        with mlflow_trt.load_model((tmp_path / "again%20").as_uri(), runtime="onnxruntime") as session:
            assert session.inputs[0].name == "x"


class TestModelConfig:
    @pytest.mark.parametrize(("name", "write"), [("settings.yaml", yaml.safe_dump), ("settings.json", json.dumps)])
    def test_a_file_is_read(self, name, write, tmp_path):
        (tmp_path / name).write_text(write({**CPU, "max_batch_delay_ms": 1}))
        save(tmp_path / "model", model_config=str(tmp_path / name))
        config = Model.load(str(tmp_path / "model")).flavors["python_function"]["config"]
        assert (config["runtime"], config["max_batch_delay_ms"]) == ("onnxruntime", 1)

    @pytest.mark.parametrize(
        ("content", "message"),
        [(None, "cannot be read"), ("[1, 2]", "holds a list"), ("a: [", "cannot be read"), ("run: 1", "unknown")],
    )
    def test_a_file_that_makes_no_sense_is_named(self, content, message, tmp_path):
        if content is not None:
            (tmp_path / "settings.yaml").write_text(content)
        with pytest.raises(OptionError, match=message):
            save(tmp_path / "model", model_config=tmp_path / "settings.yaml")


@pytest.fixture
def no_engine(monkeypatch):
    def refuse(*arguments, **keywords):
        raise BuildError("an engine was built")

    monkeypatch.setattr(builder, "build_engine", refuse)
    monkeypatch.setattr("mlflow_trt.convert.conversion.build_engine", refuse, raising=False)


@pytest.mark.usefixtures("no_engine")
class TestEnvironment:
    """Everything that is wrong with an environment is found before an engine is built."""

    @pytest.mark.parametrize(
        ("keywords", "error", "message"),
        [
            ({"pip_requirements": "missing.txt"}, OptionError, "missing.txt"),
            ({"pip_requirements": ["-r missing.txt"]}, OptionError, "missing.txt"),
            ({"extra_pip_requirements": "missing.txt"}, OptionError, "missing.txt"),
            ({"extra_pip_requirements": ["numpy=>1"]}, OptionError, "'numpy=>1', which is no requirement"),
            ({"pip_requirements": ["pandas==1.0", "Pandas>2"]}, OptionError, "exclude each other"),
            ({"extra_pip_requirements": ["numpy<1"]}, OptionError, "'numpy<1' exclude"),
            ({"extra_pip_requirements": [f"mlflow-trt=={mlflow_trt.__version__}.1"]}, OptionError, "exclude"),
            ({"pip_requirements": 7}, TypeError, "pip requirement"),
            ({"conda_env": "missing.yaml"}, OptionError, "missing.yaml"),
            ({"conda_env": {"name": "without dependencies"}}, OptionError, "a list of dependencies"),
            ({"conda_env": {"dependencies": [{"pip": ["a==1", "a==2"]}]}}, OptionError, "exclude"),
            ({"conda_env": {"dependencies": []}, "pip_requirements": ["a"]}, ValueError, "Only one of"),
        ],
    )
    def test_errors_come_early(self, keywords, error, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(error, match=message):
            save(tmp_path / "model", **keywords)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("content", ["a: [", "- 1", ""])
    def test_a_conda_file_that_is_none(self, content, tmp_path):
        (tmp_path / "conda.yaml").write_text(content)
        with pytest.raises(OptionError, match="conda_env"):
            save(tmp_path / "model", conda_env=str(tmp_path / "conda.yaml"))

    def test_what_pip_alone_can_judge_is_left_to_it(self, tmp_path):
        (tmp_path / "more.txt").write_text("pandas>=1  # a comment\n")
        lines = [
            f"-r {tmp_path / 'more.txt'}",
            "./wheels/own.whl",
            "git+https://host/own.git",
            "a==1 --hash=sha256:0",
            "a>0",
        ]
        with pytest.raises(BuildError, match="an engine was built"):
            save(tmp_path / "model", pip_requirements=lines)


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"name": "nets/first"}, MlflowException, "Invalid model name .*'nets/first'"),
        ({"name": None, "artifact_path": "v1.0"}, MlflowException, "Invalid model name .*'v1.0'"),
        ({"name": 7}, OptionError, "name is 7; expected a string"),
        ({"model_id": "m-0"}, MlflowException, "m-0"),
        ({"params": [1]}, OptionError, r"params is \[1\]; expected a dict"),
        ({"tags": ["a"]}, OptionError, r"tags is \['a'\]; expected a dict"),
        ({"metadata": "of mine"}, OptionError, "metadata is 'of mine'; expected a dict"),
        ({"metadata": {"score": np.float32(0.5)}}, OptionError, r"metadata cannot be written.*\b0\.5\b"),
    ],
)
def test_what_mlflow_cannot_log_is_refused_before_an_engine_is_built(keywords, error, message, store):
    with pytest.raises(error, match=message):
        mlflow_trt.log_model(networks.product(), **{"name": "model", **keywords})
    assert store.is_untouched()


def test_requirements_that_can_be_read_once(tmp_path):
    for option in ("pip_requirements", "extra_pip_requirements"):
        save(tmp_path / option, **{option: (line for line in ["pandas", "pytest"])})
        assert {"pandas", "pytest"} <= set((tmp_path / option / "requirements.txt").read_text().split())


def test_a_path_object_will_do_for_a_conda_file(tmp_path):
    environment = {"name": "own", "dependencies": ["python=3.12", {"pip": ["mlflow", "mlflow-trt"]}]}
    (tmp_path / "conda.yaml").write_text(yaml.safe_dump(environment))
    save(tmp_path / "model", conda_env=str(tmp_path / "conda.yaml"))
    assert yaml.safe_load(Path(tmp_path / "model" / "conda.yaml").read_text())["name"] == "own"
