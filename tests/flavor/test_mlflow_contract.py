"""What MLflow's own tests of `mlflow.onnx` ask of a flavor, case by case, asked of this one.

The same is asked of `mlflow.onnx` wherever both are meant to do the same, so that what MLflow changes shows here. What
is meant to be different says so in its name.
"""

from __future__ import annotations

from pathlib import Path

import mlflow
import mlflow.onnx  # itself, and not MLflow's stand-in that loads it
import networks
import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import Model, infer_signature
from mlflow.pyfunc import scoring_server
from mlflow.types import Schema, TensorSpec
from onnx import helper
from packaging.version import Version
from scoring_client import scored
from tiers import exhaustive

import mlflow_trt
from mlflow_trt import OnnxModelError, RecipeError, UnsupportedModelError

COLUMNS = ["sepal length", "sepal width", "petal length", "petal width"]
FLAVORS = pytest.mark.parametrize("flavor", [mlflow.onnx, mlflow_trt], ids=["mlflow.onnx", "mlflow_trt"])


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """As on a machine without a GPU whose operator says so, without a word of it where models are saved or loaded."""
    monkeypatch.setenv("MLFLOW_PYFUNC_INFERENCE_CONFIG", '{"runtime": "onnxruntime"}')


@pytest.fixture(scope="module")
def flowers():
    return pd.DataFrame(np.random.default_rng(0).uniform(0, 8, (150, 4)), columns=COLUMNS)


def regressor() -> onnx.ModelProto:
    """4 numbers in, [rows, 1] out, by two layers."""
    random = np.random.default_rng(1)
    first, second = (random.standard_normal(shape).astype(np.float32) for shape in ((4, 3), (3, 1)))
    return networks.model(
        [
            helper.make_node("MatMul", ["input", "first"], ["hidden"]),
            helper.make_node("Relu", ["hidden"], ["active"]),
            helper.make_node("MatMul", ["active", "second"], ["output"]),
        ],
        [networks.value("input", networks.FLOAT, ["batch", 4])],
        [networks.value("output", networks.FLOAT, ["batch", 1])],
        [networks.constant("first", first), networks.constant("second", second)],
    )


def two_tensors() -> onnx.ModelProto:
    """[rows, 2] and [rows, 2] in, [rows, 1] out."""
    weights = np.random.default_rng(2).standard_normal((4, 1)).astype(np.float32)
    return networks.model(
        [
            helper.make_node("Concat", ["sepal", "petal"], ["all"], axis=1),
            helper.make_node("MatMul", ["all", "weights"], ["target"]),
        ],
        [networks.value(name, networks.FLOAT, ["batch", 2]) for name in ("sepal", "petal")],
        [networks.value("target", networks.FLOAT, ["batch", 1])],
        [networks.constant("weights", weights)],
    )


def two_columns(dtype: int = networks.FLOAT) -> onnx.ModelProto:
    """Two vectors of ten in, their product out, as TensorFlow exports names and fixed shapes."""
    return networks.model(
        [helper.make_node("Mul", ["first:0", "second:0"], ["output:0"])],
        [networks.value(name, dtype, [10]) for name in ("first:0", "second:0")],
        [networks.value("output:0", dtype, [10])],
    )


def classifier(*, zipmap: bool) -> onnx.ModelProto:
    """What skl2onnx makes of a LogisticRegression: labels, and probabilities, which are dicts by default."""
    random = np.random.default_rng(5)
    nodes = [
        helper.make_node("LinearClassifier", ["input"], ["label", "scores"], name="scores", domain="ai.onnx.ml",
                         classlabels_ints=[0, 1, 2], coefficients=random.standard_normal(12), multi_class=1,
                         intercepts=random.standard_normal(3), post_transform="SOFTMAX"),
        helper.make_node("Normalizer", ["scores"], ["probabilities"], name="normal", domain="ai.onnx.ml", norm="L1"),
    ]  # fmt: skip
    probabilities = networks.value("probabilities", networks.FLOAT, ["batch", 3])
    if zipmap:
        nodes.append(helper.make_node("ZipMap", ["probabilities"], ["dicts"], domain="ai.onnx.ml",
                                      classlabels_int64s=[0, 1, 2]))  # fmt: skip
        scores = helper.make_tensor_type_proto(networks.FLOAT, [])
        dicts = helper.make_sequence_type_proto(helper.make_map_type_proto(networks.INT64, scores))
        probabilities = helper.make_value_info("dicts", dicts)
    model = networks.model(
        nodes,
        [networks.value("input", networks.FLOAT, ["batch", 4])],
        [networks.value("label", networks.INT64, ["batch"]), probabilities],
    )
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 1))
    return model


def heavy() -> onnx.ModelProto:
    """With a weight that is large enough for an external file: 32 kB."""
    weights = np.random.default_rng(3).standard_normal((4, 2048)).astype(np.float32)
    return networks.model(
        [helper.make_node("MatMul", ["input", "weights"], ["output"])],
        [networks.value("input", networks.FLOAT, ["batch", 4])],
        [networks.value("output", networks.FLOAT, ["batch", 2048])],
        [networks.constant("weights", weights)],
    )


def computed(model: onnx.ModelProto, **feeds: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def environment() -> dict[str, object]:
    return {"name": "own", "dependencies": ["python=3.12", {"pip": ["mlflow", "onnx", "pytest"]}]}


@pytest.fixture
def conda_file(tmp_path) -> str:
    path = tmp_path / "conda_env.yml"
    path.write_text(yaml.safe_dump(environment()))
    return str(path)


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "model")


ENVIRONMENTS = {"conda_env", "pip_requirements", "extra_pip_requirements"}


def without_inference(flavor, keywords):
    """`mlflow.onnx` would run the model in another process, which takes seconds, to infer requirements."""
    if flavor is mlflow.onnx and not ENVIRONMENTS & set(keywords):
        return {**keywords, "pip_requirements": flavor.get_default_pip_requirements()}
    return keywords


def save(flavor, model, path, **keywords) -> None:
    flavor.save_model(model, path, **without_inference(flavor, keywords))


def log(flavor, model=None, **keywords) -> str:
    model = regressor() if model is None else model
    with mlflow.start_run():
        return flavor.log_model(model, name="model", **without_inference(flavor, keywords)).model_uri


def local(uri: str) -> Path:
    return Path(mlflow.artifacts.download_artifacts(uri))


def requirements(folder: Path) -> set[str]:
    """What both files of requirements say."""
    lines = set((folder / "requirements.txt").read_text().splitlines())
    (pip,) = (part["pip"] for part in yaml.safe_load((folder / "conda.yaml").read_text())["dependencies"]
              if isinstance(part, dict))  # fmt: skip
    assert set(pip) == lines
    return lines


class TestSaveAndLoad:
    def test_a_saved_model_loads(self, path, flowers):
        mlflow_trt.save_model(regressor(), path)
        x = flowers.to_numpy(np.float32)
        with mlflow_trt.load_model(path) as session:
            assert np.allclose(session.run({"input": x})["output"], computed(regressor(), input=x), rtol=1e-5)

    def test_mlflow_onnx_loads_what_was_saved_and_what_was_logged(self, path, store):
        mlflow_trt.save_model(regressor(), path)
        assert mlflow.onnx.load_model(path) == regressor()
        assert mlflow.onnx.load_model(log(mlflow_trt)) == regressor()

    @FLAVORS
    @pytest.mark.parametrize("external", [True, False])
    def test_external_data_as_asked(self, flavor, external, store):
        uri = log(flavor, heavy(), save_as_external_data=external)
        folder = local(uri)
        assert ((folder / "model.onnx").stat().st_size < 32_000) == external
        (stored,) = mlflow.onnx.load_model(uri).graph.initializer
        assert np.array_equal(
            onnx.numpy_helper.to_array(stored), onnx.numpy_helper.to_array(heavy().graph.initializer[0])
        )

    def test_different_external_data_is_left_where_it_was(self, path):
        """`mlflow.onnx` moves it out where nothing is asked for."""
        mlflow_trt.save_model(heavy(), path)
        assert (Path(path) / "model.onnx").read_bytes() == heavy().SerializeToString()

    def test_different_the_callers_model_is_not_touched(self, path):
        """`mlflow.onnx` empties it where it moves its weights out."""
        model = heavy()
        mlflow_trt.save_model(model, path, save_as_external_data=True)
        assert model == heavy()

    def test_different_a_model_is_checked_once(self, path):
        """`mlflow.onnx` asks onnx.checker at each load; here when it is logged, and the sha256 at each load."""
        invalid = regressor()
        invalid.graph.node[0].input[0] = "nowhere"
        with pytest.raises(OnnxModelError, match="is no valid ONNX model"):
            mlflow_trt.save_model(invalid, path)
        mlflow_trt.save_model(regressor(), path)
        (Path(path) / "model.onnx").write_bytes(invalid.SerializeToString())
        with pytest.raises(mlflow_trt.IntegrityError):
            mlflow_trt.load_model(path)

    @pytest.mark.parametrize(
        ("file", "content", "error", "message"),
        [
            ("model.onnx", "damaged", mlflow_trt.IntegrityError, "is not the file that was logged"),
            ("model.onnx.data", "damaged", mlflow_trt.IntegrityError, "is not the file that was logged"),
            ("model.onnx.data", None, mlflow_trt.ArtifactError, "is missing; download the model again"),
            ("MLmodel", None, mlflow_trt.ArtifactError, "has no MLmodel; download the model again"),
            ("MLmodel", "flavors: {}", mlflow_trt.ArtifactError, "not python_function"),
            ("MLmodel", "flavors: {", mlflow_trt.ArtifactError, "is damaged"),
        ],
    )
    def test_a_model_that_is_damaged_is_not_loaded(self, file, content, error, message, path):
        mlflow_trt.save_model(heavy(), path, save_as_external_data=True)
        damaged = Path(path) / file
        damaged.unlink() if content is None else damaged.write_text(content)
        with pytest.raises(error, match=message):
            mlflow_trt.load_model(path)

    def test_different_what_is_loaded_is_no_proto(self, path):
        """A session; who asks it for the graph is told where that is."""
        mlflow_trt.save_model(regressor(), path)
        with mlflow_trt.load_model(path) as session:
            for name, advice in (("graph", "; mlflow.onnx.load_model returns the onnx.ModelProto"), ("grapf", "$")):
                with pytest.raises(AttributeError, match=f"no attribute '{name}'{advice}"):
                    getattr(session, name)
        assert mlflow.onnx.load_model(path).graph == regressor().graph

    @FLAVORS
    @pytest.mark.parametrize("in_a_run", [False, True])
    def test_logging_starts_no_run(self, flavor, in_a_run, store):
        if in_a_run:
            with mlflow.start_run() as run:
                info = flavor.log_model(regressor(), name="model", **without_inference(flavor, {}))
            assert mlflow.get_logged_model(info.model_id).source_run_id == run.info.run_id
        else:
            info = flavor.log_model(regressor(), name="model", **without_inference(flavor, {}))
            assert mlflow.active_run() is None
        assert mlflow.pyfunc.load_model(info.model_uri).metadata.model_id == info.model_id

    @FLAVORS
    def test_it_is_registered_by_name(self, flavor, store, conda_file):
        flavor.log_model(regressor(), name="model", conda_env=conda_file, registered_model_name="ads")
        version = store.client.get_model_version("ads", "1")
        assert version.status == "READY"
        assert mlflow.pyfunc.load_model("models:/ads/1").metadata.model_id in version.source

    @FLAVORS
    def test_it_is_not_registered_without_one(self, flavor, store, conda_file):
        flavor.log_model(regressor(), name="model", conda_env=conda_file)
        assert store.client.search_registered_models() == []

    @FLAVORS
    def test_metadata(self, flavor, store, path):
        save(flavor, regressor(), path, metadata={"key": "value"})
        for uri in (path, log(flavor, metadata={"key": "value"})):
            assert mlflow.pyfunc.load_model(uri).metadata.metadata == {"key": "value"}

    @FLAVORS
    def test_code_paths(self, flavor, store, tmp_path, monkeypatch):
        monkeypatch.setattr("sys.path", [*__import__("sys").path])
        (tmp_path / "module_of_contract.py").write_text("ANSWER = 42\n")
        uri = log(flavor, code_paths=[str(tmp_path / "module_of_contract.py")])
        flavors = Model.load(uri).flavors
        own = flavors["onnx" if flavor is mlflow.onnx else mlflow_trt.FLAVOR_NAME]
        assert own["code"] == flavors["python_function"]["code"] == flavors["onnx"]["code"]
        assert (local(uri) / own["code"] / "module_of_contract.py").read_text() == "ANSWER = 42\n"
        before = {*__import__("sys").path}
        flavor.load_model(uri)
        assert any((Path(entry) / "module_of_contract.py").is_file() for entry in {*__import__("sys").path} - before)


class TestSignatures:
    @FLAVORS
    @pytest.mark.filterwarnings("ignore:Operation with range is deprecated")  # MLflow's use of pandas
    @pytest.mark.parametrize("with_example", [False, True])
    def test_what_is_given_is_kept(self, flavor, with_example, path, flowers, conda_file):
        signature = infer_signature(flowers, flowers.iloc[:, 0])
        example = flowers.head(3) if with_example else None
        save(flavor, regressor(), path, conda_env=conda_file, signature=signature, input_example=example)
        model = Model.load(path)
        assert model.signature == signature
        if with_example:
            assert model.load_input_example(path).equals(example)
        else:
            assert model.saved_input_example_info is None

    def test_different_without_one_the_outputs_are_described(self, path):
        """`mlflow.onnx` writes none, and then neither Unity Catalog nor Spark's default type has what it needs."""
        mlflow_trt.save_model(regressor(), path)
        signature = Model.load(path).signature
        assert signature.inputs is None
        assert signature.outputs.input_names() == ["output"]
        mlflow_trt.save_model(regressor(), f"{path}-2", signature=False)
        assert Model.load(f"{path}-2").signature is None


class TestPredict:
    @FLAVORS
    @pytest.mark.parametrize("logged", [False, True])
    def test_a_dataframe(self, flavor, logged, path, store, flowers):
        uri = log(flavor) if logged else path
        if not logged:
            save(flavor, regressor(), path)
        answer = mlflow.pyfunc.load_model(uri).predict(flowers)
        assert list(answer.columns) == ["output"]
        expected = computed(regressor(), input=flowers.to_numpy(np.float32))
        assert np.allclose(answer.to_numpy(), expected, rtol=1e-5, atol=1e-5)

    @FLAVORS
    @pytest.mark.parametrize("form", [lambda x: x, lambda x: {"input": x}], ids=["array", "dict"])
    def test_arrays_of_float64_are_computed_in_the_models_float32(self, flavor, form, path, flowers):
        save(flavor, regressor(), path)
        answer = mlflow.pyfunc.load_model(path).predict(form(flowers.to_numpy()))
        assert list(answer) == ["output"]
        expected = computed(regressor(), input=flowers.to_numpy(np.float32))
        assert np.allclose(answer["output"], expected, rtol=1e-5, atol=1e-5)

    @FLAVORS
    def test_over_http(self, flavor, path, flowers, monkeypatch):
        save(flavor, regressor(), path)
        body = {"dataframe_split": flowers.to_dict(orient="split")}
        response = scored(mlflow.pyfunc.load_model(path), monkeypatch, body)
        found = [row["output"] for row in response["predictions"]]
        expected = computed(regressor(), input=flowers.to_numpy(np.float32)).reshape(-1)
        assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert scoring_server.CONTENT_TYPE_JSON == "application/json"

    @FLAVORS
    def test_several_tensors(self, flavor, path, flowers):
        save(flavor, two_tensors(), path)
        model = mlflow.pyfunc.load_model(path)
        x = flowers.to_numpy()
        answer = model.predict({"sepal": x[:, :2], "petal": x[:, 2:].astype(np.float32)})["target"]
        parts = {"sepal": x[:, :2].astype(np.float32), "petal": x[:, 2:].astype(np.float32)}
        assert np.allclose(answer, computed(two_tensors(), **parts), rtol=1e-5, atol=1e-5)
        with pytest.raises(MlflowException, match="Unable to map numpy array input to the expected model input."):
            model.predict(x)

    @FLAVORS
    @pytest.mark.parametrize("external", [True, False])
    @pytest.mark.parametrize("dtype", [networks.FLOAT, onnx.TensorProto.DOUBLE], ids=["float32", "float64"])
    def test_columns_for_several_inputs(self, flavor, dtype, external, path, monkeypatch):
        save(flavor, two_columns(dtype), path, save_as_external_data=external)
        frame = pd.DataFrame(np.random.default_rng(4).random((10, 2)), columns=["first:0", "second:0"])
        expected = (frame["first:0"] * frame["second:0"]).to_numpy().reshape(-1, 1)
        model = mlflow.pyfunc.load_model(path)
        answer = model.predict(frame)
        assert answer["output:0"].dtype == helper.tensor_dtype_to_np_dtype(dtype)
        assert np.allclose(answer.to_numpy(), expected, rtol=1e-5, atol=1e-5)
        response = scored(model, monkeypatch, {"dataframe_split": frame.to_dict(orient="split")})
        assert np.allclose([row["output:0"] for row in response["predictions"]], expected.reshape(-1), rtol=1e-5)

    def test_different_integers_that_float32_holds_are_computed(self, path):
        """`mlflow.onnx` refuses them; what float32 cannot hold is refused by both."""
        mlflow_trt.save_model(two_columns(), path)
        model = mlflow.pyfunc.load_model(path)
        frame = pd.DataFrame({"first:0": np.arange(10), "second:0": np.arange(10)}, dtype=np.int32)
        assert model.predict(frame)["output:0"].tolist() == [float(n * n) for n in range(10)]
        with pytest.raises(mlflow_trt.InputDtypeError, match="row 0"):
            model.predict(frame + 2**24 + 1)

    def test_a_column_that_holds_no_numbers_is_named(self, path, flowers):
        mlflow_trt.save_model(regressor(), path)
        model = mlflow.pyfunc.load_model(path)
        for values in (pd.Timestamp("2026-11-26"), pd.Timedelta("1s"), 1j):
            with pytest.raises(mlflow_trt.InputDtypeError, match="column 'petal length', row 0: .* is of dtype"):
                model.predict(flowers.assign(**{"petal length": values}))
        with pytest.raises(mlflow_trt.InputShapeError, match="the cells of column 3 are numbers"):
            model.predict(flowers.iloc[3])

    @FLAVORS
    def test_another_type_of_input_is_refused(self, flavor, path):
        save(flavor, two_columns(), path)
        model = mlflow.pyfunc.load_model(path)
        # ONNX Runtime 1.21 does not say which input it is.
        with pytest.raises(Exception, match="first:0" if flavor is mlflow_trt else "first:0|input data type"):
            model.predict(pd.DataFrame({"first:0": list("abcdefghij"), "second:0": list("abcdefghij")}))

    @pytest.mark.parametrize("answer", ["dicts", "a tensor"])
    def test_different_what_scikit_learn_makes_is_refused_when_it_is_logged(self, answer, path):
        """TensorRT has none of its operators; what to do instead is told at once, whatever comes out."""
        with pytest.raises(
            UnsupportedModelError, match="needs LinearClassifier, Normalizer.* with --whole for"
        ) as told:
            mlflow_trt.save_model(classifier(zipmap=answer == "dicts"), path)
        assert told.value.nodes[:2] == ("scores (LinearClassifier)", "normal (Normalizer)")
        assert ("ZipMap" in str(told.value)) == (answer == "dicts")
        assert not Path(path).exists()

    def test_different_sequences_are_refused_when_it_is_logged(self, path):
        sequence = helper.make_sequence_type_proto(helper.make_tensor_type_proto(networks.FLOAT, ["batch", 4]))
        model = networks.model(
            [helper.make_node("SequenceConstruct", ["input"], ["listed"])],
            [networks.value("input", networks.FLOAT, ["batch", 4])],
            [helper.make_value_info("listed", sequence)],
        )
        with pytest.raises(OnnxModelError, match="a sequence; TensorRT has only tensors; .* log the model with mlflow"):
            mlflow_trt.save_model(model, path)
        assert not Path(path).exists()

    @FLAVORS
    def test_batches_that_the_exporter_named_apart(self, flavor, path, flowers):
        """As torch.onnx.export does for `dynamic_axes={"sepal": [0], "petal": [0]}`: here the user says it is one."""
        model = two_tensors()
        for value in model.graph.input:
            value.type.tensor_type.shape.dim[0].dim_param = f"{value.name}_dynamic_axes_1"
        model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "Gemm_dim_0"
        if flavor is mlflow_trt:
            with pytest.raises(RecipeError, match=r"axis 0 \(petal_dyn.*or batch=\(min, opt, max\) if all of them are"):
                mlflow_trt.save_model(model, path)
        save(flavor, model, path, **({"batch": (1, 8, 64)} if flavor is mlflow_trt else {}))
        x = flowers.to_numpy(np.float32)
        parts = {"sepal": x[:, :2], "petal": x[:, 2:]}
        answer = mlflow.pyfunc.load_model(path).predict(parts)["target"]
        assert np.allclose(answer, computed(model, **parts), rtol=1e-5, atol=1e-5)


class TestEnvironments:
    @FLAVORS
    @pytest.mark.parametrize("logged", [False, True])
    def test_a_conda_file(self, flavor, logged, path, store, conda_file):
        if logged:
            folder = local(log(flavor, conda_env=conda_file))
        else:
            save(flavor, regressor(), path, conda_env=conda_file)
            folder = Path(path)
        written = folder / Model.load(str(folder)).flavors["python_function"]["env"]["conda"]
        assert str(written) != conda_file
        assert yaml.safe_load(written.read_text()) == environment()
        assert requirements(folder) == {"mlflow", "onnx", "pytest"}

    @FLAVORS
    def test_a_conda_environment_as_a_dict(self, flavor, path):
        given = dict(flavor.get_default_conda_env())
        given["dependencies"].append("pytest")
        save(flavor, regressor(), path, conda_env=given)
        assert yaml.safe_load((Path(path) / "conda.yaml").read_text()) == given

    @FLAVORS
    @pytest.mark.parametrize("option", ["pip_requirements", *exhaustive("extra_pip_requirements")])
    def test_requirements(self, flavor, option, store, tmp_path):
        (tmp_path / "more.txt").write_text("a")
        file = tmp_path / "more.txt"
        pinned = mlflow.utils.environment._generate_mlflow_version_pinning()
        defaults = {pinned} if option == "pip_requirements" else {pinned, *flavor.get_default_pip_requirements()}
        for given, more in (
            (str(file), {"a"}),
            ([f"-r {file}", "b"], {"a", "b"}),
            ([f"-c {file}", "b"], {"b", "-c constraints.txt"}),
        ):
            folder = local(log(flavor, **{option: given}))
            found = requirements(folder)
            assert found >= defaults | more
            if option == "pip_requirements":
                assert found == defaults | more
            if "-c constraints.txt" in more:
                assert (folder / "constraints.txt").read_text() == "a"

    @FLAVORS
    @pytest.mark.parametrize("logged", [False, True])
    def test_the_default(self, flavor, logged, path, store):
        if logged:
            folder = local(log(flavor))
        else:
            save(flavor, regressor(), path)
            folder = Path(path)
        assert requirements(folder) >= set(flavor.get_default_pip_requirements())

    @FLAVORS
    def test_the_file_for_virtualenv(self, flavor, path):
        save(flavor, regressor(), path)
        named = Model.load(path).flavors["python_function"]["env"]["virtualenv"]
        assert yaml.safe_load((Path(path) / named).read_text())["python"]


class TestOnnxRuntime:
    @FLAVORS
    def test_session_options(self, flavor, path):
        asked = {"execution_mode": "sequential", "graph_optimization_level": 99, "intra_op_num_threads": 19}
        save(flavor, regressor(), path, onnx_session_options=asked)
        options = mlflow.pyfunc.load_model(path)._model_impl.rt.get_session_options()
        assert options.execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        assert options.intra_op_num_threads == 19

    @FLAVORS
    @pytest.mark.parametrize(
        ("providers", "expected"),
        [
            (["CPUExecutionProvider"], ["CPUExecutionProvider"]),
            (["CUDAExecutionProvider", "CPUExecutionProvider"], None),
            ([("CPUExecutionProvider", {})], [("CPUExecutionProvider", {})]),
            (["NoSuchExecutionProvider"], ["CPUExecutionProvider"]),
            (None, None),
        ],
        ids=["CPU", "CUDA first", "with options", "an unknown one", "none"],
    )
    def test_providers_reach_onnx_runtime(self, flavor, providers, expected, path, monkeypatch):
        save(flavor, regressor(), path, **({} if providers is None else {"onnx_execution_providers": providers}))
        asked = providers or flavor.ONNX_EXECUTION_PROVIDERS
        expected = expected or [name for name in asked if name in onnxruntime.get_available_providers()]
        if flavor is mlflow.onnx and Version(mlflow.__version__) < Version("3.11"):
            expected = None  # it passes them where ONNX Runtime wants some
        received = []
        made = onnxruntime.InferenceSession.__init__

        def note(session, file, providers=None, sess_options=None, **more):  # keywords both, as MLflow's tests expect
            received.append(providers)
            made(session, file, providers=providers, sess_options=sess_options, **more)

        monkeypatch.setattr(onnxruntime.InferenceSession, "__init__", note)
        mlflow.pyfunc.load_model(path)
        assert received == [expected]

    def test_different_without_providers_it_is_the_cpu(self, path):
        """`mlflow.onnx` asks for CUDA first; here `runtime` says whether the GPU is to be used."""
        assert mlflow_trt.ONNX_EXECUTION_PROVIDERS == ["CPUExecutionProvider"]
        mlflow_trt.save_model(regressor(), path)
        assert mlflow.pyfunc.load_model(path).get_raw_model().device == "CPU"


class TestTensorSignatures:
    @FLAVORS
    def test_one_of_named_tensors_is_kept_and_enforced(self, flavor, path, flowers):
        signature = mlflow.models.ModelSignature(
            inputs=Schema([TensorSpec(np.dtype("float32"), (-1, 4), "input")]),
            outputs=Schema([TensorSpec(np.dtype("float32"), (-1, 1), "output")]),
        )
        save(flavor, regressor(), path, signature=signature)
        model = mlflow.pyfunc.load_model(path)
        x = flowers.to_numpy(np.float32)
        assert np.allclose(model.predict({"input": x})["output"], computed(regressor(), input=x), rtol=1e-5)
        with pytest.raises(MlflowException, match="float64"):
            model.predict({"input": flowers.to_numpy()})
