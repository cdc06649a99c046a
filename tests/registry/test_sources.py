"""Models of other flavors, exported to ONNX and converted: the numbers are the source's own."""

from __future__ import annotations

import importlib
from pathlib import Path

import mlflow
import networks
import numpy as np
import pandas as pd
import pytest
from compare import relative_error
from mlflow.models import infer_signature
from mlflow.utils.file_utils import local_file_uri_to_path
from tiers import exhaustive
from tracking_server import tracking_server

import mlflow_trt
from mlflow_trt import ArtifactError, MissingDependencyError, OnnxModelError, UnsupportedModelError
from mlflow_trt.flavor.fetch import read_record
from mlflow_trt.registry.sources import exporting
from mlflow_trt.registry.sources.open import EXPORTERS, open_source

CPU = {"runtime": "onnxruntime"}
X = np.random.default_rng(0).standard_normal((60, 6)).astype(np.float32)
Y = X @ np.arange(1, 7) + np.sin(X[:, 0])


@pytest.fixture(scope="module")
def server(tmp_path_factory, empty_database):
    with tracking_server(tmp_path_factory.mktemp("server"), empty_database) as address:
        yield address


@pytest.fixture
def http(server, request):
    mlflow.set_tracking_uri(server)
    mlflow.set_experiment(request.node.name)
    return mlflow.MlflowClient()


class TestPytorch:
    @pytest.fixture(scope="module")  # as the server, which is not started where there is no torch
    def torch(self):
        return pytest.importorskip("torch", reason="needs the extra test-torch")

    @pytest.fixture
    def network(self, torch):
        torch.manual_seed(0)

        nn = torch.nn
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, 5),
        ).eval()  # fmt: skip

    images = np.random.default_rng(1).standard_normal((4, 3, 16, 16)).astype(np.float32)

    def log(self, network, torch, **more):
        with torch.no_grad():
            expected = network(torch.from_numpy(self.images)).numpy()
        signature = infer_signature(self.images, expected)
        mlflow.pytorch.log_model(
            network, name="net", registered_model_name="net", signature=signature, pip_requirements=["torch"], **more
        )
        return expected

    @pytest.mark.filterwarnings("ignore")  # torch's and MLflow's own, while they log
    @pytest.mark.parametrize("example", [images, images[:1]], ids=["several rows", "one row"])
    def test_over_http(self, example, network, torch, http):
        expected = self.log(network, torch, input_example=example)
        version = max(int(found.version) for found in http.search_model_versions("name = 'net'"))
        made = mlflow_trt.convert_model_version(f"models:/net/{version}", "net-trt", alias="challenger")
        assert made.tags["mlflow_trt.source"] == f"models:/net/{version}"
        record = read_record(f"models:/net-trt/{made.version}")
        assert record.lineage["flavor"] == "pytorch"
        assert record.lineage["exporter"].startswith("torch 2.")
        assert record.lineage["chain"].startswith("pytorch → ONNX (torch 2.")
        assert [spec.name for spec in record.inputs] == ["input"]
        model = mlflow.pyfunc.load_model("models:/net-trt@challenger", model_config=CPU)
        (output,) = model.predict(self.images[: len(example)]).values()
        assert relative_error({"y": output}, {"y": expected[: len(example)]}) < 1e-5

    @pytest.mark.filterwarnings("ignore")
    def test_a_signature_is_enough(self, network, torch, store):
        expected = self.log(network, torch, serialization_format="pickle")
        mlflow_trt.convert_model_version("models:/net/1", "net-trt", batch=(1, 2, 4))
        again = mlflow_trt.convert_model_version("models:/net/1", "net-trt", batch=(1, 2, 4))
        assert str(again.version) == "1"
        model = mlflow.pyfunc.load_model("models:/net-trt/1", model_config=CPU)
        assert relative_error({"y": next(iter(model.predict(self.images).values()))}, {"y": expected}) < 1e-5

    @pytest.mark.filterwarnings("ignore")
    def test_neither_is_an_error(self, network, store):
        mlflow.pytorch.log_model(network, name="net", registered_model_name="net", serialization_format="pickle",
                                 pip_requirements=["torch"])  # fmt: skip
        with pytest.raises(OnnxModelError, match="log it again with input_example="):
            mlflow_trt.convert_model_version("models:/net/1", "net-trt")
        assert not store.client.search_registered_models("name = 'net-trt'")

    @pytest.mark.filterwarnings("ignore")
    def test_the_onnx_names_no_file_of_this_machine(self, network, torch, store):
        self.log(network, torch, serialization_format="pickle")
        with open_source("models:/net/1") as source:
            assert b".py" not in source.path.read_bytes()


class TestSklearn:
    def log(self, estimator, target, **more):
        pytest.importorskip("skl2onnx")
        estimator.fit(X, target)
        mlflow.sklearn.log_model(
            estimator, name="m", registered_model_name="m", pip_requirements=["scikit-learn"],
            serialization_format="cloudpickle", **more,
        )  # fmt: skip
        return estimator

    @pytest.mark.filterwarnings("ignore")
    def test_a_pipeline_of_numbers(self, store):
        from sklearn.neural_network import MLPRegressor
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        frame = pd.DataFrame(X.astype(np.float64), columns=list("abcdef"))
        regressor = make_pipeline(StandardScaler(), MLPRegressor(hidden_layer_sizes=(16,), max_iter=300))
        estimator = self.log(regressor, Y, signature=infer_signature(frame, Y))
        mlflow_trt.convert_model_version("models:/m/1", "m-trt", batch=(1, 8, 64))
        record = read_record("models:/m-trt/1")
        assert record.lineage["exporter"].startswith("sklearn 1.")
        assert "skl2onnx" in record.lineage["chain"]
        model = mlflow.pyfunc.load_model("models:/m-trt/1", model_config=CPU)
        predicted = model.predict(frame)
        assert list(predicted.columns) == ["variable"]
        values = predicted["variable"].to_numpy()
        assert relative_error({"y": values}, {"y": estimator.predict(X).astype(np.float32)}) < 1e-4

    @pytest.mark.filterwarnings("ignore")
    def test_a_classifier_gives_probabilities(self, store, messages):
        from sklearn.linear_model import LogisticRegression

        estimator = self.log(LogisticRegression(), np.where(Y > 0, "up", "down"))
        mlflow_trt.convert_model_version("models:/m/1", "m-trt", batch=(1, 8, 64))
        assert "the probabilities of the classes down, up; the labels are left out" in messages.text
        assert "down, up" in read_record("models:/m-trt/1").lineage["left_out"]
        model = mlflow.pyfunc.load_model("models:/m-trt/1", model_config=CPU)
        expected = estimator.predict_proba(X).astype(np.float32)
        assert relative_error(model.predict(X), {"probabilities": expected}) < 1e-4

    @pytest.mark.filterwarnings("ignore")
    def test_a_classifier_as_a_whole_gives_labels(self, store):
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        frame = pd.DataFrame(X.astype(np.float64), columns=list("abcdef"))
        labels = np.where(Y > 4, "up", np.where(Y < -4, "down", "level"))
        estimator = make_pipeline(StandardScaler(), LogisticRegression())
        self.log(estimator, labels, signature=infer_signature(frame, labels), input_example=frame.iloc[:20])
        mlflow_trt.convert_model_version("models:/m/1", "m-trt", batch=(1, 8, 64), whole=True)
        model = mlflow.pyfunc.load_model("models:/m-trt/1", model_config=CPU)
        assert (model.predict(frame) == estimator.predict(X)).all()
        assert len(set(model.predict(frame))) == 3
        assert model.metadata.signature == mlflow.pyfunc.load_model("models:/m/1").metadata.signature
        probabilities = model.get_raw_model().predict_proba(frame)
        assert relative_error({"p": probabilities}, {"p": estimator.predict_proba(frame.to_numpy())}) < 1e-4

    @pytest.mark.exhaustive
    @pytest.mark.filterwarnings("ignore")
    def test_a_regressor_as_a_whole(self, store):
        from sklearn.linear_model import Ridge

        estimator = self.log(Ridge(), Y, input_example=X[:20])
        mlflow_trt.convert_model_version("models:/m/1", "m-trt", batch=(1, 8, 64), whole=True)
        answer = mlflow.pyfunc.load_model("models:/m-trt/1", model_config=CPU).predict(X)
        assert relative_error({"y": answer}, {"y": estimator.predict(X)}) < 1e-4

    @pytest.mark.filterwarnings("ignore")
    def test_what_tensorrt_cannot_run_is_named(self, store):
        from sklearn.ensemble import RandomForestRegressor

        self.log(RandomForestRegressor(3), Y)
        with pytest.raises(UnsupportedModelError, match="TreeEnsembleRegressor"):
            mlflow_trt.convert_model_version("models:/m/1", "m-trt", batch=4)
        assert not store.client.search_registered_models("name = 'm-trt'")

    @pytest.mark.exhaustive
    @pytest.mark.filterwarnings("ignore")
    def test_support_vectors_are_named(self, store):
        from sklearn.svm import SVC

        self.log(SVC(), np.where(Y > 0, "up", "down"))
        with pytest.raises(UnsupportedModelError, match="SVC"):
            mlflow_trt.convert_model_version("models:/m/1", "m-trt")

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("example", [False, *exhaustive(True)], ids=["signature", "example"])
    def test_text_is_named(self, example, store):
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        texts = np.array(["warm sun", "cold rain"] * 5)
        pipeline = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts, [0, 1] * 5)
        more = {"input_example": texts} if example else {"signature": infer_signature(texts)}
        mlflow.sklearn.log_model(pipeline, name="m", registered_model_name="m", pip_requirements=["scikit-learn"],
                                 serialization_format="cloudpickle", **more)  # fmt: skip
        with pytest.raises(UnsupportedModelError, match="TfidfVectorizer, LogisticRegression does not take rows of"):
            mlflow_trt.convert_model_version("models:/m/1", "m-trt")
        assert not store.client.search_registered_models("name = 'm-trt'")


class TestTensorflow:
    images = np.random.default_rng(1).random((4, 16, 16, 3), np.float32)

    @pytest.mark.filterwarnings("ignore")
    def test_what_a_layer_captured_is_a_constant(self, store):
        tf = pytest.importorskip("tensorflow", reason="needs the extra tensorflow")
        pytest.importorskip("tf2onnx", reason="needs the extra tensorflow")
        normalization = tf.keras.layers.Normalization()
        normalization.adapt(3 * X + 5)
        network = tf.keras.Sequential([tf.keras.layers.Input((6,)), normalization, tf.keras.layers.Dense(5)])
        expected = network(X).numpy()
        mlflow.tensorflow.log_model(
            network, name="m", registered_model_name="m", signature=infer_signature(X, expected),
            pip_requirements=["tensorflow"],
        )  # fmt: skip
        mlflow_trt.convert_model_version("models:/m/1", "m-trt", batch=(1, 2, 4))
        assert len(read_record("models:/m-trt/1").inputs) == 1
        model = mlflow.pyfunc.load_model("models:/m-trt/1", model_config=CPU)
        assert relative_error({"y": next(iter(model.predict(X).values()))}, {"y": expected}) < 1e-5

    @pytest.mark.filterwarnings("ignore")  # TensorFlow's and MLflow's own
    @pytest.mark.parametrize("flavor", ["tensorflow", "keras"])
    def test_a_keras_model(self, flavor, store):
        tf = pytest.importorskip("tensorflow", reason="needs the extra tensorflow")
        pytest.importorskip("tf2onnx", reason="needs the extra tensorflow")
        tf.random.set_seed(0)
        layers = tf.keras.layers
        network = tf.keras.Sequential(
            [layers.Input((16, 16, 3)), layers.Conv2D(8, 3, padding="same", activation="relu"),
             layers.GlobalAveragePooling2D(), layers.Dense(5)]
        )  # fmt: skip
        expected = network(self.images).numpy()
        log_model = getattr(mlflow, flavor).log_model
        log_model(
            network, name="m", registered_model_name="m", signature=infer_signature(self.images, expected),
            pip_requirements=["tensorflow"],
        )  # fmt: skip
        mlflow_trt.convert_model_version("models:/m/1", "m-trt", batch=(1, 2, 4))
        record = read_record("models:/m-trt/1")
        assert record.lineage["flavor"] == flavor
        assert "tf2onnx" in record.lineage["exporter"]
        model = mlflow.pyfunc.load_model("models:/m-trt/1", model_config=CPU)
        assert relative_error({"y": next(iter(model.predict(self.images).values()))}, {"y": expected}) < 1e-5


@pytest.mark.parametrize("flavor", sorted(set(EXPORTERS.values())))
def test_what_is_missing_is_named_with_its_line(flavor, monkeypatch):
    needs = importlib.import_module(f"mlflow_trt.registry.sources.{flavor}").NEEDS
    monkeypatch.setattr(exporting, "is_installed", lambda module: False)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'mlflow-trt\[{flavor}\]'") as caught:
        needs.check("models:/m/1")
    assert caught.value.packages == tuple(needs.modules.values())


def test_other_flavors_are_named(store, tmp_path):
    mlflow.pyfunc.save_model(tmp_path / "other", loader_module="json", pip_requirements=[])
    with pytest.raises(
        ArtifactError, match="flavors python_function; expected onnx or one of pytorch, sklearn, tensorflow, keras"
    ):
        mlflow_trt.convert_model_version(str(tmp_path / "other"), "other-trt")


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_a_store_lost_is_named_with_its_model(store):
    info = mlflow.onnx.log_model(networks.product(), name="lost", pip_requirements=["onnx"])
    Path(local_file_uri_to_path(info.artifact_path), "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=f"^{info.model_uri} lacks the ONNX file model.onnx"):
        mlflow_trt.convert_model_version(info.model_uri, "lost-trt")


def test_what_cannot_be_converted_is_not_downloaded(store, tmp_path):
    info = mlflow.pyfunc.log_model(name="m", loader_module="json", pip_requirements=[], registered_model_name="other")
    folder = local_file_uri_to_path(mlflow.get_logged_model(info.model_id).artifact_location)
    (Path(folder) / "huge.bin").symlink_to(tmp_path / "nowhere")  # copying it fails
    with pytest.raises(ArtifactError, match="flavors python_function; expected"):
        mlflow_trt.convert_model_version("models:/other/1", "other-trt")
