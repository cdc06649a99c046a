"""save_model and log_model against a real MLflow store."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import stat
from pathlib import Path

import mlflow
import networks
import numpy as np
import onnx
import pytest
import yaml
from compare import relative_error
from helpers import needs_release
from mlflow.models import Model, ModelSignature, infer_signature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.types.schema import Array
from real_models import CLS, MAGIKA

import mlflow_trt
from mlflow_trt import BuildError, OnnxModelError, OptionError, Recipe, RecipeError
from mlflow_trt.convert.engine import builder
from mlflow_trt.deploy.serve.model_source import resolve_source
from mlflow_trt.deploy.serve.served_model import load_served_model
from mlflow_trt.flavor import mlmodel as packaging
from mlflow_trt.flavor.fetch import read_record
from mlflow_trt.measure.verify_logged import verify_model

CPU = {"runtime": "onnxruntime"}


def log(model=None, **keywords):
    return mlflow_trt.log_model(networks.product() if model is None else model, name="model", **keywords)


def local(uri: str) -> Path:
    return Path(mlflow.artifacts.download_artifacts(uri))


class TestLogging:
    def test_the_main_job(self, store):
        info = mlflow_trt.log_model(
            MAGIKA.path(), name="magika-trt", precision="fp32", batch=(1, 8, 32), registered_model_name="magika-trt"
        )
        assert info.registered_model_version == 1
        model = mlflow.pyfunc.load_model("models:/magika-trt/1", model_config=CPU)
        feeds = MAGIKA.feeds(5)
        with mlflow_trt.load_model(info.model_uri, runtime="onnxruntime") as session:
            assert relative_error(model.predict(feeds["bytes"]), session.run(feeds)) == 0

    def test_three_flavors(self, store):
        info = log()
        flavors = Model.load(info.model_uri).flavors
        assert set(flavors) == {"mlflow_trt", "onnx", "python_function"}
        own = flavors["mlflow_trt"]
        assert own["format"] == 1
        assert own["precision"] == "fp32"
        assert own["profiles"] == [{"x": "1x16:8x16:32x16"}]
        engine = own["engines"][0]
        assert engine["sha256"] == hashlib.sha256((local(info.model_uri) / engine["file"]).read_bytes()).hexdigest()
        assert flavors["python_function"]["loader_module"] == "mlflow_trt"
        assert flavors["python_function"]["config"] == mlflow_trt.LoadSettings().to_dict()

    def test_mlflow_onnx_loads_the_source_model(self, store):
        info = log(CLS.path(), **CLS.recipe)
        assert mlflow.onnx.load_model(info.model_uri) == onnx.load(CLS.path())

    def test_what_can_be_searched_for(self, store):
        info = log(precision="tf32", batch=(2, 4, 8), targets=["sm86"], registered_model_name="product",
                   tags={"team": "vision"}, params={"width": 16})  # fmt: skip
        logged = mlflow.get_logged_model(info.model_id)
        version = store.client.get_model_version("product", "1")
        expected = {
            "mlflow_trt.precision": "tf32",
            "mlflow_trt.target": "sm86",
        }
        assert logged.params == {
            **expected,
            "mlflow_trt.tensorrt": f"tensorrt_rtx {importlib.metadata.version('tensorrt-rtx')}",
            "mlflow_trt.batch": "2:4:8",
            "mlflow_trt.source_digest": hashlib.sha256(networks.product().SerializeToString()).hexdigest(),
            "width": "16",
        }
        assert expected.items() <= logged.tags.items()
        conversion = version.tags.pop("mlflow_trt.conversion")
        assert re.fullmatch("[0-9a-f]{12}", conversion)
        assert version.tags == {**expected, "team": "vision"}
        for condition in ("tags.`mlflow_trt.precision` = 'tf32'", "params.`mlflow_trt.batch` = '2:4:8'"):
            found = store.client.search_logged_models([store.experiment_id], condition)
            assert [model.model_id for model in found] == [info.model_id]
        assert store.client.search_model_versions("tags.`mlflow_trt.target` = 'sm86'")

    def test_requirements_are_explicit(self, store):
        requirements = (local(log().model_uri) / "requirements.txt").read_text().splitlines()
        version = importlib.metadata.version
        assert f"mlflow-trt[cuda-core,rtx]=={mlflow_trt.__version__}" in requirements
        assert f"tensorrt-rtx=={version('tensorrt-rtx')}" in requirements
        assert f"mlflow=={version('mlflow')}" in requirements
        assert f"onnx=={version('onnx')}" in requirements

    def test_what_a_model_needs_by_default_is_what_is_installed(self):
        requirements = mlflow_trt.get_default_pip_requirements()
        assert f"mlflow-trt[cuda-core,rtx]=={mlflow_trt.__version__}" in requirements
        assert f"tensorrt-rtx=={importlib.metadata.version('tensorrt-rtx')}" in requirements
        assert set(requirements) <= set(mlflow_trt.get_default_conda_env()["dependencies"][-1]["pip"])

    def test_the_keywords_of_every_flavor(self, store, tmp_path):
        (tmp_path / "helper_code.py").write_text("ANSWER = 42\n")
        (tmp_path / "labels.txt").write_text("cat\ndog\n")
        with mlflow.start_run() as run:
            info = log(
                code_paths=[str(tmp_path / "helper_code.py")],
                extra_files=[str(tmp_path / "labels.txt")],
                extra_pip_requirements=["pillow>=10"],
                metadata={"owner": "vision"},
                model_type="classifier",
                step=3,
                await_registration_for=0,
                input_example={"x": networks.rows(2)},
            )
        folder = local(info.model_uri)
        assert (folder / "code" / "helper_code.py").exists()
        assert (folder / "extra_files" / "labels.txt").exists()
        assert "pillow>=10" in (folder / "requirements.txt").read_text()
        model = Model.load(str(folder))
        assert model.metadata == {"owner": "vision"}
        assert model.run_id == run.info.run_id
        assert np.allclose(model.load_input_example(str(folder))["x"], networks.rows(2))
        assert mlflow.get_logged_model(info.model_id).model_type == "classifier"

    def test_no_run_is_created(self, store):
        log()
        assert mlflow.active_run() is None
        assert store.client.search_runs([store.experiment_id]) == []

    def test_an_environment_of_the_users_own(self, store):
        environment = {"name": "mine", "dependencies": ["python=3.12", {"pip": ["mlflow", "mlflow-trt"]}]}
        written = yaml.safe_load((local(log(conda_env=environment).model_uri) / "conda.yaml").read_text())
        assert written["name"] == "mine"
        assert log(pip_requirements=["mlflow-trt"]).flavors

    def test_load_settings_become_the_models_defaults(self, store):
        info = log(model_config={"runtime": "onnxruntime"})
        model = mlflow.pyfunc.load_model(info.model_uri)
        assert model.get_raw_model().runtime == "onnxruntime"
        with mlflow_trt.load_model(info.model_uri) as session:
            assert session.runtime == "onnxruntime"

    def test_the_environment_overrides_load_settings(self, store, monkeypatch):
        info = log()
        monkeypatch.setenv("MLFLOW_PYFUNC_INFERENCE_CONFIG", json.dumps(CPU))
        assert mlflow.pyfunc.load_model(info.model_uri).get_raw_model().runtime == "onnxruntime"
        with mlflow_trt.load_model(info.model_uri) as session:
            assert session.runtime == "onnxruntime"
        served = load_served_model(resolve_source(f"served={info.model_uri}"), {"answers": "base64"})
        assert served.session.runtime == "onnxruntime"
        served.close()

    @pytest.mark.parametrize("text", ["{runtime: auto}", '["runtime"]', "7"])
    def test_an_environment_that_holds_no_load_settings(self, text, product_folder, monkeypatch):
        monkeypatch.setenv("MLFLOW_PYFUNC_INFERENCE_CONFIG", text)
        with pytest.raises(OptionError, match="variable MLFLOW_PYFUNC_INFERENCE_CONFIG holds no load settings"):
            mlflow_trt.load_model(str(product_folder))

    def test_the_same_proto_twice(self, store):
        proto = networks.product()
        before = proto.SerializeToString()
        first, second = log(proto), log(proto)
        assert proto.SerializeToString() == before
        read = [read_record(info.model_uri).source.digest for info in (first, second)]
        assert read[0] == read[1]

    def test_external_data(self, store, tmp_path):
        (tmp_path / "net").mkdir()
        proto = networks.external(tmp_path / "net" / "net.onnx")
        info = log(tmp_path / "net" / "net.onnx")
        assert (
            mlflow.onnx.load_model(info.model_uri).graph.initializer[0].raw_data == proto.graph.initializer[0].raw_data
        )
        x = networks.rows(3)
        with mlflow_trt.load_model(info.model_uri, runtime="onnxruntime") as session:
            weights = onnx.numpy_helper.to_array(proto.graph.initializer[0])
            assert np.allclose(session.run({"x": x})["y"], x @ weights, atol=1e-5)

    def test_links_to_the_model_and_its_weights(self, store, tmp_path):
        """As the caches of model hubs lay files out: the weights that count are beside the link."""
        for name in ("blobs", "snapshot", "other"):
            (tmp_path / name).mkdir()
        proto = networks.external(tmp_path / "blobs" / "net.onnx")
        (tmp_path / "blobs" / "net.onnx").rename(tmp_path / "blobs" / "1")
        (tmp_path / "blobs" / "weights.bin").rename(tmp_path / "blobs" / "2")
        (tmp_path / "snapshot" / "net.onnx").symlink_to("../blobs/1")
        (tmp_path / "snapshot" / "weights.bin").symlink_to("../blobs/2")
        (tmp_path / "other" / "net.onnx").symlink_to("../blobs/1")
        weights = np.frombuffer((tmp_path / "blobs" / "2").read_bytes(), np.float32) * 2
        (tmp_path / "other" / "weights.bin").write_bytes(weights.tobytes())
        plans = {}
        for name, factor in (("snapshot", 1), ("other", 2)):
            info = log(tmp_path / name / "net.onnx", allow_external_data_from=tmp_path / "blobs")
            weights = onnx.numpy_helper.to_array(proto.graph.initializer[0]) * factor
            stored = onnx.numpy_helper.to_array(mlflow.onnx.load_model(info.model_uri).graph.initializer[0])
            assert np.array_equal(stored, weights)
            folder = local(info.model_uri)
            plans[name] = (folder / read_record(str(folder)).engines[0].file).read_bytes()
        assert plans["snapshot"] != plans["other"]

    def test_a_link_to_a_file_elsewhere_is_not_copied_into_the_model(self, tmp_path):
        networks.external(tmp_path / "net.onnx")
        (tmp_path / "secret").mkdir()
        (tmp_path / "weights.bin").rename(tmp_path / "secret" / "id_rsa")
        (tmp_path / "model").mkdir()
        (tmp_path / "net.onnx").rename(tmp_path / "model" / "net.onnx")
        (tmp_path / "model" / "weights.bin").symlink_to(tmp_path / "secret" / "id_rsa")
        with pytest.raises(OnnxModelError, match=r"id_rsa, outside of the folder of the model"):
            mlflow_trt.save_model(tmp_path / "model" / "net.onnx", tmp_path / "converted")
        assert not (tmp_path / "converted").exists()
        with pytest.raises(OptionError, match="expected a folder"):
            mlflow_trt.save_model(
                tmp_path / "model" / "net.onnx", tmp_path / "converted", allow_external_data_from=tmp_path / "nowhere"
            )

    def test_the_user_is_told_what_was_chosen(self, store, messages):
        log()
        assert "axis 0 of input 'x' is taken as the batch axis, for 1 to 32 rows" in messages.text
        assert "Building a TensorRT engine of network ..." in messages.text
        assert "Built TensorRT-RTX" in messages.text

    def test_an_mlflow_of_another_flavor_is_refused(self, store, tmp_path):
        mlflow.onnx.save_model(networks.product(), tmp_path / "onnx-model", pip_requirements=[])
        with pytest.raises(mlflow_trt.ArtifactError, match="is not a model that mlflow-trt logged"):
            mlflow_trt.load_model(str(tmp_path / "onnx-model"))
        info = mlflow.onnx.log_model(networks.product(), name="onnx", pip_requirements=["onnx"])
        with pytest.raises(mlflow_trt.ArtifactError, match="has the flavors .*, not mlflow_trt"):
            read_record(info.model_uri)
        with pytest.raises(mlflow_trt.ArtifactError, match="is a file, not a model of MLflow"):
            read_record(__file__)
        for open_it in (mlflow_trt.load_model, verify_model):
            with pytest.raises(mlflow_trt.ArtifactError, match=f"^{info.model_uri} has no mlflow_trt.json"):
                open_it(info.model_uri)


class TestFailuresLeaveNothing:
    @pytest.mark.parametrize(
        ("model", "keywords", "error"),
        [
            (lambda path: path / "no.onnx", {}, OnnxModelError),
            (lambda path: networks.product(), {"precision": "fp13"}, RecipeError),
            (lambda path: networks.product(batch=3), {"batch": 4}, RecipeError),
            (lambda path: networks.product(), {"model_config": {"runtime": "gpu"}}, OptionError),
            (lambda path: networks.product(), {"recipe": Recipe(), "batch": 4}, RecipeError),
        ],
    )
    def test_in_the_store(self, model, keywords, error, store, tmp_path):
        with pytest.raises(error):
            log(model(tmp_path), registered_model_name="product", **keywords)
        assert store.is_untouched()

    def test_when_the_build_fails(self, store, monkeypatch):
        monkeypatch.setattr(builder, "_WORKER", "import os; os.abort()")
        with pytest.raises(BuildError):
            log(registered_model_name="product")
        assert store.is_untouched()

    def test_when_the_user_interrupts(self, store):
        def interrupt(event):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            log(registered_model_name="product", progress=interrupt)
        assert store.is_untouched()

    @pytest.mark.parametrize(
        ("keywords", "message"),
        [
            ({"extra_files": "labels.txt"}, "extra_files is 'labels.txt'; expected a list"),
            ({"extra_files": ["/no/labels.txt"]}, "extra_files: /no/labels.txt does not exist"),
            ({"code_paths": ["/no/code"]}, "code_paths: /no/code does not exist"),
            ({"conda_env": {}, "pip_requirements": []}, "Only one of"),
            ({"signature": "x"}, "signature is a str; expected a mlflow.models.ModelSignature"),
            ({"pip_requirements": "/no/requirements.txt"}, "No such file"),
            ({"metadata": {"a": np.float32(1)}}, "cannot represent"),
            ({"input_example": object()}, "Expected one of the following types"),
            ({"registered_model_name": ""}, "Missing value for required parameter 'name'"),
            pytest.param({"registered_model_name": "a/b"}, "Invalid model name", marks=needs_release("mlflow", "3.11")),
            ({"tags": {"": "x"}}, "tag|Tag|key"),
        ],
    )
    def test_when_an_option_is_wrong(self, keywords, message, store):
        with pytest.raises((mlflow.MlflowException, ValueError, OSError, yaml.YAMLError), match=message):
            log(**{"registered_model_name": "product", **keywords})
        assert store.is_untouched()

    def test_in_a_folder(self, tmp_path):
        target = tmp_path / "out" / "model"
        with pytest.raises(mlflow.MlflowException):
            mlflow_trt.save_model(networks.product(), target, input_example=object())
        assert not target.parent.exists()

    def test_in_a_folder_when_mlflow_fails(self, tmp_path, monkeypatch):
        def full(*arguments, **keywords):
            raise OSError("No space left on device")

        monkeypatch.setattr(packaging, "write_environment", full)
        with pytest.raises(OSError, match="No space left"):
            mlflow_trt.save_model(networks.product(), tmp_path / "out" / "model")
        assert list((tmp_path / "out").iterdir()) == []

    def test_where_nothing_can_be_written_is_found_out_first(self, monkeypatch):
        monkeypatch.setattr(builder, "_WORKER", "import os; os.abort()")
        with pytest.raises(OptionError, match="/proc/version is no folder that you may write to"):
            mlflow_trt.save_model(networks.product(), "/proc/version/model")

    def test_an_existing_folder_is_kept(self, tmp_path):
        (tmp_path / "precious").write_text("mine")
        with pytest.raises(OptionError, match="exists already"):
            mlflow_trt.save_model(networks.product(), tmp_path)
        assert (tmp_path / "precious").read_text() == "mine"


class TestFolders:
    def test_a_read_only_folder_loads_and_stays_as_it_was(self, cls_folder, tmp_path):
        def state():
            return {path: (path.stat().st_mtime_ns, path.stat().st_mode) for path in cls_folder.rglob("*")}

        for path in (cls_folder, *cls_folder.rglob("*")):
            path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
        before = state()
        try:
            model = mlflow.pyfunc.load_model(str(cls_folder), model_config=CPU)
            model.predict(CLS.feeds(2))
            assert state() == before
        finally:
            for path in (cls_folder, *cls_folder.rglob("*")):
                path.chmod(path.stat().st_mode | stat.S_IWUSR)

    def test_an_empty_folder_may_be_filled(self, tmp_path):
        (tmp_path / "model").mkdir()
        mlflow_trt.save_model(networks.product(), tmp_path / "model")
        assert (tmp_path / "model" / "MLmodel").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_the_current_folder_stays_the_current_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        mlflow_trt.save_model(networks.product(), ".")
        assert Path("MLmodel").exists()
        assert sorted(path.name for path in Path.cwd().iterdir()) == sorted(path.name for path in tmp_path.iterdir())

    def test_a_link_to_an_empty_folder_is_filled(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        mlflow_trt.save_model(networks.product(), tmp_path / "link")
        assert (tmp_path / "real" / "MLmodel").exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]

    def test_a_relative_path(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        mlflow_trt.save_model(networks.product(), "model")
        assert mlflow.pyfunc.load_model("model", model_config=CPU).predict(networks.rows(2))["y"].shape == (2, 8)


class TestSignatures:
    def signature(self, folder):
        return Model.load(str(folder)).signature

    def test_is_derived_from_the_graph(self, magika_folder, tmp_path):
        """Of outputs: MLflow would cast inputs to it. Those are in the file for whoever looks."""
        assert self.signature(magika_folder).inputs is None
        assert self.signature(magika_folder).outputs == Schema([ColSpec(Array("float"), "target_label")])
        own = Model.load(str(magika_folder)).flavors["mlflow_trt"]
        assert own["inputs"] == [{"name": "bytes", "dtype": "int32", "shape": ["unk__214", 2048]}]
        assert [(output["name"], output["dtype"]) for output in own["outputs"]] == [("target_label", "float32")]
        mlflow_trt.save_model(networks.ranks(), tmp_path / "model", batch=(1, 4, 8), verify=False)
        assert self.signature(tmp_path / "model").outputs == Schema([
            ColSpec(Array(Array("float")), "scaled"), ColSpec(Array("float"), "sums"), ColSpec("float", "total"),
            ColSpec("long", "doubled"),
        ])  # fmt: skip

    def test_of_named_tensors(self, tmp_path):
        mlflow_trt.save_model(MAGIKA.path(), tmp_path / "model", signature=True, verify=False, **MAGIKA.recipe)
        signature = self.signature(tmp_path / "model")
        assert signature.inputs == Schema([TensorSpec(np.dtype("int32"), (-1, 2048), "bytes")])
        assert signature.outputs == Schema([TensorSpec(np.dtype("float32"), (-1, 214), "target_label")])

    def test_a_dimension_that_the_profiles_fix_is_fixed(self, tmp_path):
        mlflow_trt.save_model(CLS.path(), tmp_path / "model", signature=True, verify=False, **CLS.recipe)
        assert self.signature(tmp_path / "model").inputs.inputs[0].shape == (-1, 3, 48, 192)

    def test_the_rows_of_a_static_batch_are_free_where_they_can_be_split(self, tmp_path):
        mlflow_trt.save_model(networks.product(), tmp_path / "model", batch=4, signature=True)
        assert self.signature(tmp_path / "model").inputs.inputs[0].shape == (-1, 16)

    def test_a_model_without_inputs(self, tmp_path):
        constant = networks.helper.make_node(
            "Constant", [], ["c"], value=networks.constant("v", np.arange(4, dtype=np.float32))
        )
        twice = networks.helper.make_node("Add", ["c", "c"], ["y"])
        model = networks.model([constant, twice], [], [networks.value("y", networks.FLOAT, [4])])
        mlflow_trt.save_model(model, tmp_path / "model")
        assert self.signature(tmp_path / "model").inputs is None
        outputs = mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config=CPU).predict({})
        assert outputs["y"].tolist() == [0, 2, 4, 6]

    def test_bfloat16_is_float32_to_mlflow(self, tmp_path):
        mlflow_trt.save_model(networks.bfloat16_product(), tmp_path / "model", signature=True)
        assert self.signature(tmp_path / "model").inputs.inputs[0].type == np.dtype("float32")

    def test_the_users_own(self, tmp_path):
        own = infer_signature(networks.rows(2), networks.rows(2, 8))
        mlflow_trt.save_model(networks.product(), tmp_path / "model", signature=own)
        assert self.signature(tmp_path / "model") == own
        model = mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config=CPU)
        assert model.predict(networks.rows(2))["y"].shape == (2, 8)

    def test_params_are_left_out_with_a_remark(self, tmp_path, messages):
        temperature = ParamSchema([ParamSpec("temperature", "double", 0.5)])
        for name, signature in {
            "all": infer_signature(networks.rows(2), networks.rows(2, 8), params={"temperature": 0.5}),
            "nothing else": ModelSignature(params=temperature),
        }.items():
            folder = tmp_path / name
            mlflow_trt.save_model(
                networks.product(), folder, signature=signature, input_example=(networks.rows(2), {"temperature": 0.1})
            )
            assert "The params of the signature (temperature) are left out" in messages.text
            assert any("(temperature) are left out" in remark for remark in read_record(str(folder)).remarks)
            left = self.signature(folder)
            assert left is None or (left.params is None and left.inputs == signature.inputs)
            model = mlflow.pyfunc.load_model(str(folder), model_config=CPU)
            assert model.predict(networks.rows(2), params={"temperature": 1.5})["y"].shape == (2, 8)

    def test_none_at_all(self, tmp_path):
        mlflow_trt.save_model(networks.product(), tmp_path / "model", signature=False)
        assert self.signature(tmp_path / "model") is None
