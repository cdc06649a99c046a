"""Plans that exist already, as MLflow models. Without a GPU nothing can be asked of them: their tensors are given."""

from __future__ import annotations

import json

import mlflow
import networks
import pytest
from command_line import run
from mlflow.models import Model

import mlflow_trt
from mlflow_trt import ArtifactError, EngineMismatchError, OptionError, RuntimeUnavailableError
from mlflow_trt.core.plan_header import read_plan_header
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.types import Distribution
from mlflow_trt.flavor.describe import describe
from mlflow_trt.flavor.fetch import read_record
from mlflow_trt.store import load
from mlflow_trt.store.folder import read_folder

TENSORS = {
    "inputs": {"x": ("float32", (-1, 16))},
    "outputs": {"y": ("float32", (-1, 8))},
    "shapes": {"x": ((1, 16), (4, 16), (8, 16))},
}
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """What a builder of TensorRT-RTX wrote, as trtexec would."""
    folder = tmp_path_factory.mktemp("plan")
    mlflow_trt.save_model(networks.product(), folder / "model", batch=(1, 4, 8), verify=False)
    (built,) = (folder / "model" / "engines").iterdir()
    return built.rename(folder / "product.plan")


def test_a_plan_tells_who_built_it(plan):
    from importlib.metadata import version

    assert read_plan_header(plan.read_bytes()) == (Distribution.TENSORRT_RTX, version("tensorrt-rtx"))
    header = b"ftrt" + bytes(20) + bytes([10, 16, 1, 11])
    assert read_plan_header(header) == (Distribution.TENSORRT, "10.16.1.11")


@pytest.mark.parametrize("content", [b"", b"ftrt", b"ONNX" + bytes(100)])
def test_what_is_no_plan_is_refused(content, tmp_path):
    (tmp_path / "p.plan").write_bytes(content)
    with pytest.raises(OptionError, match="no plan of TensorRT"):
        mlflow_trt.save_engine(tmp_path / "p.plan", tmp_path / "m", **TENSORS)
    assert not (tmp_path / "m").exists()


def test_the_folder_holds_the_plan_and_is_marked(plan, tmp_path):
    mlflow_trt.save_engine(plan, tmp_path / "m", **TENSORS, splits_batches=True)
    folder = read_folder(tmp_path / "m")
    record = folder.record
    assert record.is_engine_only
    assert folder.read_plan(record.engines[0]) == plan.read_bytes()
    assert (record.format, record.batch_axis.splits, str(record.profiles[0])) == (2, True, "x 1x16:4x16:8x16")
    assert "without its source model: it cannot be rebuilt" in record.remarks[0]
    model = Model.load(str(tmp_path / "m"))
    assert set(model.flavors) == {"python_function", "mlflow_trt"}
    assert model.flavors["mlflow_trt"]["precision"] == "unknown"
    assert model.signature.outputs.input_names() == ["y"]
    assert describe(record) == "imported engine, batch 1:4:8, sm80plus, from product.plan, error not measured"


def test_a_version_is_registered_and_can_be_loaded_where_the_plan_runs(plan, store, monkeypatch):
    info = mlflow_trt.log_engine(plan, name="p", registered_model_name="p-plan", **TENSORS, tags={"team": "a"})
    assert info.registered_model_version == 1
    version = store.client.get_model_version("p-plan", "1")
    assert version.tags["mlflow_trt.source"] == "product.plan"
    assert version.tags["team"] == "a"
    assert read_record("models:/p-plan/1").is_engine_only
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(RuntimeUnavailableError, match="TensorRT needs an NVIDIA GPU"):
        mlflow.pyfunc.load_model("models:/p-plan/1")


def test_what_needs_the_source_says_that_there_is_none(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    mlflow_trt.save_engine(plan, tmp_path / "m", **TENSORS)
    uri = str(tmp_path / "m")
    for ask in (
        lambda: mlflow_trt.load_model(uri, runtime="onnxruntime"),
        lambda: mlflow_trt.verify_model(uri, networks.rows(8)),
        lambda: mlflow_trt.benchmark(uri, [1], seconds=0.02),
        lambda: mlflow_trt.compare_models(uri, uri, seconds=0.02),
    ):
        with pytest.raises(ArtifactError, match="imported as a plan and holds no ONNX model"):
            ask()
    with pytest.raises(EngineMismatchError, match="without the ONNX model to rebuild it from"):
        load._check_rebuild(read_record(uri), LoadSettings(), "No stored engine fits", [])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"outputs": None}, "give both of inputs and outputs"),
        ({"inputs": {"x": ("complex64", (-1, 16))}}, "expected one of bfloat16"),
        ({"inputs": {"x": "float32"}}, "expected a dtype and a shape"),
        ({"inputs": {}}, "inputs names no tensor"),
        ({"shapes": None}, "the sizes of input 'x' vary"),
        ({"shapes": {"z": ((1, 16),) * 3}}, "lacks the input 'x'"),
        ({"shapes": {"x": ((1, 17),) * 3}}, "which is x: float32"),
        ({"outputs": {"y": ("float32", (8,))}, "splits_batches": True}, "the outputs y have none"),
    ],
)
def test_what_makes_no_sense_is_refused(changed, words, plan, tmp_path):
    with pytest.raises(OptionError, match=words):
        mlflow_trt.save_engine(plan, tmp_path / "m", **{**TENSORS, **changed})
    assert not (tmp_path / "m").exists()


def test_without_a_gpu_the_tensors_have_to_be_given(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(RuntimeUnavailableError, match="Give inputs= and outputs="):
        mlflow_trt.save_engine(plan, tmp_path / "m")


def test_the_command(plan, tmp_path):
    tensors = ["--input", "x:float32:-1x16", "--output-tensor", "y:float32:-1x8"]
    shapes = ["--min-shapes", "x:1x16", "--opt-shapes", "x:4x16", "--max-shapes", "x:8x16"]
    code, output, errors = run("import-engine", plan, *tensors, *shapes, "--split-batches", "--output", tmp_path / "m",
                               "--json", **NO_GPU)  # fmt: skip
    assert code == 0, errors
    assert json.loads(output)["format"] == 2
    code, output, errors = run("inspect", tmp_path / "m", COLUMNS="80")
    assert code == 0, errors
    assert "precision" not in output
    assert "other sizes are split and padded" in " ".join(output.split())
    code, _, errors = run("import-engine", plan, "--output", tmp_path / "n", **NO_GPU)
    assert code == 1
    assert "Give --input and --output-tensor, and --min-shapes, --opt-shapes and --max-shapes" in errors
    code, _, errors = run("import-engine", plan, "--input", "x", "--output", tmp_path / "n")
    assert code == 2
    assert "--input: 'x': expected name:dtype:dims" in " ".join(errors.replace("│", " ").split())
