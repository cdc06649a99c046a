"""PythonModels with an ONNX Runtime session or a torch module: what is around the network stays as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import networks
import numpy as np
import pandas as pd
import pytest
from command_line import run
from repository import SUPPORT
from text_classifier import TextClassifier

import mlflow_trt
from mlflow_trt import AccuracyError, ArtifactError, IntegrityError, OnnxModelError, OptionError, SelfTestError
from mlflow_trt.convert.onnx.model import sha256_of
from mlflow_trt.flavor.fetch import read_record
from mlflow_trt.flavor.whole import answers

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's, about type hints and examples

CPU = {"runtime": "onnxruntime"}
TEXTS = [
    "warm sun",
    "cold rain over the river and the hills",
    "a",
    "the night was long and nobody slept at all in town",
]


CODE = SUPPORT / "text_classifier.py"


@pytest.fixture(scope="module")
def network_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "network.onnx"
    path.write_bytes(networks.transformer().SerializeToString())
    return path


def log(model, network_file, example, **more):
    mlflow.pyfunc.log_model(
        name="source", registered_model_name="source", python_model=model, artifacts={"network": str(network_file)},
        input_example=example, pip_requirements=["onnxruntime", "pandas>=2"], **more,
    )  # fmt: skip


def both(**config):
    made = mlflow.pyfunc.load_model("models:/made/1", model_config={**CPU, **config})
    return mlflow.pyfunc.load_model("models:/source/1", model_config=config or None), made


class TestOnnxRuntimeSession:
    @pytest.fixture(params=[CODE], ids=["from code"])
    def converted(self, request, store, network_file):
        log(request.param, network_file, pd.DataFrame({"text": TEXTS}), model_config={"decimals": 6})
        mlflow_trt.convert_model_version(
            "models:/source/1", "made", batch=(1, 4, 8), shapes={"input_ids": ((-1, 1), (-1, 8), (-1, 64))}
        )

    @pytest.mark.parametrize("converted", [CODE, TextClassifier()], ids=["from code", "pickled"], indirect=True)
    def test_its_face_is_that_of_the_source(self, converted):
        source, made = both()
        frame = pd.DataFrame({"text": [*TEXTS, *reversed(TEXTS)] * 3}, index=pd.Index(range(100, 124), name="id"))
        expected, answer = source.predict(frame), made.predict(frame)
        pd.testing.assert_frame_equal(answer, expected, atol=1e-5)
        assert answer["label"].nunique() > 1
        assert answer["score"].std() > 1e-3
        assert made.metadata.signature == source.metadata.signature
        assert type(made.unwrap_python_model()).__name__ == "TextClassifier"
        record = read_record("models:/made/1")
        assert record.whole is not None
        assert record.whole.network == "python_model.session"
        assert record.whole.lengths is not None
        assert len(record.whole.lengths.sizes) <= 4
        assert record.lineage["flavor"] == "python_model"
        agreement = record.whole.agreement
        assert agreement is not None
        assert agreement.inputs > 1
        assert agreement.numbers == agreement.texts == agreement.equal > len(TEXTS)
        assert agreement.largest_error < 1e-5
        assert agreement.runtime.startswith("ONNX Runtime")
        _, shown, _ = run("inspect", "models:/made/1")
        assert f"{agreement.equal} of {agreement.texts} texts equal" in " ".join(shown.split())
        requirements = mlflow.pyfunc.get_model_dependencies("models:/made/1")
        lines = Path(requirements).read_text().splitlines()
        assert "pandas>=2" in lines
        assert any(line.startswith("mlflow-trt[") for line in lines)

    @pytest.mark.exhaustive
    def test_settings_are_split_by_name(self, converted):
        source, made = both(decimals=1)
        frame = pd.DataFrame({"text": TEXTS})
        answer = made.predict(frame)
        pd.testing.assert_frame_equal(answer, source.predict(frame))
        assert (answer["score"] * 10 % 1 < 1e-9).all()

    @pytest.mark.exhaustive
    def test_the_network_alone_is_there_too(self, converted):
        feeds = networks.sentences(3, 8)
        with mlflow_trt.load_model("models:/made/1", runtime="onnxruntime") as session:
            assert session.run(feeds)["logits"].shape == (3, 3)

    @pytest.mark.exhaustive
    def test_what_measures_models_takes_the_network(self, converted):
        # In float32 and without a GPU both sides are the source.
        assert str(mlflow_trt.verify_model("models:/made/1").verdict) in {"passed", "nothing was compared"}
        times = mlflow_trt.benchmark("models:/made/1", [2], seconds=0.01)
        assert times.measurements[0].latency.p50 > 0

    def test_a_text_that_is_too_long_is_an_error_in_both(self, converted):
        source, made = both()
        frame = pd.DataFrame({"text": ["word " * 80]})
        with pytest.raises(Exception, match="ONNX|onnx"):
            source.predict(frame)
        with pytest.raises(mlflow.exceptions.MlflowException):
            made.predict(frame)

    def test_a_file_that_was_changed_is_not_run(self, converted, tmp_path):
        folder = tmp_path / "copy"
        shutil.copytree(mlflow.artifacts.download_artifacts("models:/made/1"), folder)
        (folder / "whole" / "more.py").write_text("import os")
        with pytest.raises(IntegrityError, match=r"more.py is not among the files that were logged"):
            mlflow.pyfunc.load_model(str(folder), model_config=CPU)
        (folder / "whole" / "more.py").unlink()
        with (folder / "whole" / CODE.name).open("a") as file:
            file.write("# more")
        with pytest.raises(IntegrityError, match="text_classifier.py is not the file that was logged"):
            mlflow.pyfunc.load_model(str(folder), model_config=CPU)

    def test_the_input_example_is_answered_at_load(self, converted, tmp_path):
        folder = tmp_path / "copy"
        shutil.copytree(mlflow.artifacts.download_artifacts("models:/made/1"), folder)
        record = json.loads((folder / "mlflow_trt.json").read_text())
        golden = json.loads((folder / "golden_whole.json").read_text())
        golden["predictions"][0]["label"] = "other"
        golden["predictions"][0]["score"] += 0.5
        (folder / "golden_whole.json").write_text(json.dumps(golden))
        record["whole"]["files"]["golden_whole.json"] = sha256_of(folder / "golden_whole.json")
        (folder / "mlflow_trt.json").write_text(json.dumps(record))
        with pytest.raises(SelfTestError, match=r"answers its input example otherwise .*'predictions'\]\[0\]"):
            mlflow.pyfunc.load_model(str(folder), model_config=CPU)
        mlflow.pyfunc.load_model(str(folder), model_config={**CPU, "self_test": False})

    @pytest.mark.parametrize("converted", [TextClassifier()], ids=["pickled"], indirect=True)
    def test_pickles_are_refused_where_mlflow_refuses_them(self, converted, monkeypatch):
        monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        with pytest.raises(mlflow.exceptions.MlflowException, match="Deserializing model using pickle is disallowed"):
            mlflow.pyfunc.load_model("models:/made/1", model_config=CPU)


PAIR = SUPPORT / "pair_of_networks.py"


@pytest.fixture
def product_file(tmp_path):
    path = tmp_path / "network.onnx"
    path.write_bytes(networks.product().SerializeToString())
    return path


def test_of_several_networks_one_is_named(store, product_file):
    x = networks.rows(6)
    log(PAIR, product_file, x)
    with pytest.raises(OptionError, match=r"several networks \(self.first, self.second\).*--network self.first"):
        mlflow_trt.convert_model_version("models:/source/1", "made")
    with pytest.raises(OnnxModelError, match="first was not called"):
        mlflow_trt.convert_model_version("models:/source/1", "made", network="self.first")
    with pytest.raises(OptionError, match="there is no python_model.third"):
        mlflow_trt.convert_model_version("models:/source/1", "made", network="self.third.encoder")
    assert not store.client.search_registered_models("name = 'made'")
    environment = {"MLFLOW_TRACKING_URI": store.uri, "MLFLOW_EXPERIMENT_ID": store.experiment_id}
    code, output, problem = run(
        "convert", "models:/source/1", "--register-as", "made", "--network", "self.second", "--batch", "1:4:8",
        **environment,
    )  # fmt: skip
    assert code == 0, problem
    assert "models:/made/1" in output
    assert "python_model, of which python_model.second is the network" in output
    source, made = both()
    assert np.allclose(made.predict(x), source.predict(x), atol=1e-5)
    assert "EngineInferenceSession" in type(made.unwrap_python_model().second).__name__


def test_a_model_without_a_network_is_an_error(store):
    class Doubles(mlflow.pyfunc.PythonModel):
        def predict(self, context, model_input, params=None):
            return model_input * 2

    mlflow.pyfunc.log_model(name="source", registered_model_name="source", python_model=Doubles(), pip_requirements=[],
                            input_example=networks.rows(2))  # fmt: skip
    with pytest.raises(ArtifactError, match="Doubles has no torch.nn.Module and no onnxruntime.InferenceSession"):
        mlflow_trt.convert_model_version("models:/source/1", "made")


def test_a_model_that_answers_otherwise_is_not_registered(store, network_file):
    class Fickle(TextClassifier):
        def predict(self, context, model_input, params=None):
            answer = super().predict(context, model_input)
            is_its_own = hasattr(self.session, "disable_fallback")
            return answer if is_its_own else answer.assign(score=answer["score"] / 2)

    log(Fickle(), network_file, pd.DataFrame({"text": TEXTS}))
    with pytest.raises(AccuracyError, match=r"answers otherwise than its source: .*'score'.*Nothing was logged"):
        mlflow_trt.convert_model_version("models:/source/1", "made")
    assert not store.client.search_registered_models("name = 'made'")


class TestDifferences:
    frame = pd.DataFrame({"label": ["a", "b"], "score": [0.9, 0.51]}, index=[3, 5])

    def found(self, answer, expected):
        return " ".join(answers.differences(answer, expected, 0.01))

    def test_what_is_equal_has_none(self):
        nested = [{"entity": "X", "score": 0.5, "at": 3}, {"entity": "Y", "score": 0.25, "at": 9}]
        for one in (self.frame, "text", 3, None, 0.5, networks.rows(3), nested, {"a": [1.0, 2.0]}, self.frame["score"]):
            assert not self.found(one, one)

    def test_numbers_within_the_tolerance(self):
        assert not self.found(self.frame.assign(score=[0.901, 0.512]), self.frame)
        assert "column 'score', row 0" in self.found(self.frame.assign(score=[0.8, 0.51]), self.frame)
        assert "[1] is 3.0" in self.found([1.0, 3.0], [1.0, 2.0])
        assert "relative error" in self.found(networks.rows(3), networks.rows(3, seed=1))

    def test_labels_differ_only_in_ties(self):
        assert not self.found(self.frame.assign(label=["a", "c"]), self.frame)
        other = self.frame.assign(label=["a", "c"], score=[0.9, 0.7])
        assert "'c', where the source gives 'b'" in self.found(other, self.frame)
        assert "is 'c'" in self.found(["a", "c"], ["a", "b"])

    def test_form(self):
        assert "columns" in self.found(self.frame.rename(columns={"score": "s"}), self.frame)
        assert "index" in self.found(self.frame.reset_index(drop=True), self.frame)
        assert "dtypes" in self.found(self.frame.astype({"score": "float32"}), self.frame)
        assert "2 entries" in self.found([1, 2], [1, 2, 3])
        assert "is a list" in self.found([1], (1,))
        assert "float64[3, 16]" in self.found(networks.rows(3).astype(float), networks.rows(3))
        assert "keys" in self.found({"a": 1}, {"b": 1})


@pytest.mark.parametrize(
    ("answer", "expected", "tally"),
    [
        ([{"label": "a", "score": 0.75}], [{"label": "b", "score": 0.5}], answers.Tally(1, 0.5, 1, 0)),
        (np.array([1.0, 3.0]), np.array([1.0, 4.0]), answers.Tally(2, 0.25)),
        ([1.0, 3.0], [1.0, 4.0], answers.Tally(2, 0.25)),
        ([np.float32(3)], [np.float32(4)], answers.Tally(1, 0.25)),
        ({"score": np.float32(3)}, {"score": np.float32(4)}, answers.Tally(1, 0.25)),
        ({"a": [[1.0], [2.0]], "n": 3}, {"a": [[1.0], [4.0]], "n": 3}, answers.Tally(2, 0.5)),
        (np.array(["x", "y"]), np.array(["x", "y"]), answers.Tally(texts=2, equal=2)),
        (pd.Series([0.0, 0.0]), pd.Series([0.0, 0.0]), answers.Tally(2, 0.0)),
        (pd.DataFrame({"e": [[1.0, 2.0]], "t": ["x"]}), pd.DataFrame({"e": [[1.0, 4.0]], "t": ["x"]}),
         answers.Tally(2, 0.5, 1, 1)),
        ([], [], answers.Tally()),
    ],
)  # fmt: skip
def test_what_is_counted_of_answers(answer, expected, tally):
    counted = answers.Tally()
    counted.count(answer, expected)
    assert counted == tally
