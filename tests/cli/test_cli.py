"""The commands, each as a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import mlflow
import networks
import pytest
import typer
from command_line import run
from real_models import MAGIKA, nested_if
from tiers import exhaustive

import mlflow_trt
from mlflow_trt.backends.cuda_driver import Hardware
from mlflow_trt.cli.options import combine_shapes, parse_batch, parse_shapes
from mlflow_trt.measure import doctor
from mlflow_trt.measure.doctor import Check
from mlflow_trt.runtime import native

pytestmark = pytest.mark.slow


@pytest.fixture
def tracking(store):
    return {"MLFLOW_TRACKING_URI": store.uri, "MLFLOW_EXPERIMENT_ID": store.experiment_id}


@pytest.fixture
def onnx_file(tmp_path):
    path = tmp_path / "product.onnx"
    path.write_bytes(networks.product().SerializeToString())
    return path


class TestConvert:
    def test_a_file_to_a_registered_model(self, tracking, store):
        code, output, _ = run("convert", MAGIKA.path(), "--register-as", "magika-trt", "--batch", "1:8:32", **tracking)
        assert code == 0
        assert "models:/magika-trt/1" in output
        assert "1x2048  8x2048  32x2048" in output
        model = mlflow.pyfunc.load_model("models:/magika-trt/1", model_config={"runtime": "onnxruntime"})
        assert model.predict(MAGIKA.feeds(3))["target_label"].shape == (3, 214)

    @pytest.mark.exhaustive
    def test_sigterm_leaves_nothing_behind(self, tracking, store, onnx_file):
        program = f"""
import os, signal, sys
import mlflow_trt.registry.convert_version
mlflow_trt.registry.convert_version.set_alias = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
sys.argv = ["mlflow-trt", "convert", {str(onnx_file)!r}, "--register-as", "p-trt", "--alias", "champion"]
from mlflow_trt.cli import main
main()
"""
        environment = {**os.environ, **tracking}
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=False)
        assert result.returncode == 143, result.stderr
        assert store.is_untouched()

    def test_an_alias_to_a_registered_model(self, tracking, store):
        mlflow.onnx.log_model(networks.product(), name="p", registered_model_name="p", pip_requirements=["onnx"])
        store.client.set_registered_model_alias("p", "champion", "1")
        code, output, errors = run(
            "convert", "models:/p@champion", "--register-as", "p-trt", "--target", "sm86", "--target", "sm120",
            "--json", **tracking,
        )  # fmt: skip
        assert code == 0
        result = json.loads(output)
        assert result["uri"] == "models:/p-trt/1"
        assert result["lineage"]["source"] == "models:/p/1"
        assert result["engines"][0]["compute_capabilities"] == ["sm86", "sm120"]
        assert "axis 0 of input 'x' is taken as the batch axis" in errors

    def test_to_a_folder(self, onnx_file, tmp_path):
        code, output, _ = run(
            "convert", onnx_file, "--output", tmp_path / "model", "--precision", "tf32",
            "--min-shapes", "x:1x16", "--opt-shapes", "x:4x16", "--max-shapes", "x:8x16",
        )  # fmt: skip
        assert code == 0
        assert "tf32" in output
        with mlflow_trt.load_model(str(tmp_path / "model"), runtime="onnxruntime") as session:
            assert session.run({"x": networks.rows(2)})["y"].shape == (2, 8)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["{folder}/no.onnx"], "Error: {folder}/no.onnx does not exist; expected an ONNX file"),
            (["{folder}/text.onnx"], "Error: {folder}/text.onnx is no ONNX model"),
            (["{folder}/product.onnx", "--precision", "fp13"], "Error: unknown precision 'fp13'; choose one of fp32"),
            (["{folder}/product.onnx", "--batch", "8:4:2"], "Error: --batch is 8:4:2; expected 1 <= min"),
            (["{folder}/product.onnx", "--target", "sm70"], "cannot build for sm70"),
            (["{nested}", "--min-shapes", "input:1x512,state:2x1x128", "--opt-shapes", "input:1x512,state:2x1x128",
              "--max-shapes", "input:1x512,state:2x1x128"], "at If_0 (If): TensorRT cannot run nested If"),
            (["models:/nothing/1"],
             "Error: Model Version (name=nothing, version=1) not found. That was looked up in {store}; MLFLOW_TRACK"),
        ],
    )  # fmt: skip
    def test_errors_are_a_line_or_two(self, arguments, message, onnx_file, tracking, store, tmp_path):
        (tmp_path / "text.onnx").write_text("This is not an ONNX model at all.")
        names = {"folder": str(tmp_path), "nested": str(nested_if()), "store": store.uri}
        arguments = [argument.format(**names) for argument in arguments]
        code, output, errors = run("convert", *arguments, "--register-as", "product", "--json", **tracking)
        assert code == 1
        assert output == ""
        assert message.format(**names) in errors
        assert "Traceback" not in errors
        assert store.is_untouched()

    @pytest.mark.parametrize("name", ["a%20b", *exhaustive("models:", "x[/red]")])
    def test_to_a_folder_of_an_odd_name(self, name, onnx_file, tmp_path):
        code, output, errors = run("convert", onnx_file, "--output", tmp_path / name)
        assert code == 0, errors
        assert name in output
        assert (tmp_path / name / "MLmodel").exists()

    @pytest.mark.parametrize("arguments", [[], ["--register-as", "a", "--output", "b"]])
    def test_one_destination(self, arguments, onnx_file):
        code, _, errors = run("convert", onnx_file, *arguments)
        assert code == 2
        assert "give either --register-as NAME or --output DIR" in errors

    def test_what_the_libraries_print_stays_out_of_json(self, tmp_path):
        (tmp_path / "int16.onnx").write_bytes(networks.through_int16().SerializeToString())
        code, output, errors = run("convert", tmp_path / "int16.onnx", "--output", tmp_path / "model", "--json")
        assert (code, output) == (1, "")
        assert "INT16" in errors
        assert not (tmp_path / "model").exists()


class TestInspect:
    def test_shows_the_record(self, cls_folder):
        code, output, _ = run("inspect", cls_folder)
        assert code == 0
        for part in ("fp32", "typed/fp32.onnx", "1x3x48x192", "8x3x48x192", "TensorRT-RTX", "sm80plus", "declared"):
            assert part in output

    def test_json_is_the_record(self, magika_folder):
        code, output, _ = run("inspect", magika_folder, "--json")
        assert code == 0
        content = (magika_folder / "mlflow_trt.json").read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        assert json.loads(output) == {"uri": str(magika_folder), "digest": digest, **json.loads(content)}

    def test_a_registered_model(self, tracking, store, onnx_file):
        mlflow_trt.log_model(onnx_file, name="product", registered_model_name="product")
        store.client.set_registered_model_alias("product", "best", "1")
        for uri in ("models:/product/1", "models:/product@best", f"models:/{store.logged_models()[0].model_id}"):
            code, output, _ = run("inspect", uri, **tracking)
            assert code == 0
            assert uri in output

    @pytest.mark.exhaustive
    def test_needs_no_tensorrt(self, magika_folder):
        program = f"""
import sys
for package in ("tensorrt_rtx", "tensorrt", "pycuda", "cuda", "onnxruntime"):
    sys.modules[package] = None
sys.argv = ["mlflow-trt", "inspect", {str(magika_folder)!r}]
from mlflow_trt.cli import main
main()
"""
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert "target_label" in result.stdout

    def test_other_models_are_refused(self, tmp_path):
        mlflow.onnx.save_model(networks.product(), tmp_path / "onnx", pip_requirements=["onnx"])
        code, _, errors = run("inspect", tmp_path / "onnx")
        assert code == 1
        assert "is not a model that mlflow-trt logged. Convert an ONNX model with mlflow_trt.log_model" in errors

    def test_of_a_run_and_by_a_file_uri(self, tracking, store, onnx_file, magika_folder):
        with mlflow.start_run() as active:
            mlflow_trt.log_model(onnx_file, name="product")
        for uri in (f"runs:/{active.info.run_id}/product", magika_folder.as_uri()):
            code, output, errors = run("inspect", uri, "--json", **tracking)
            assert code == 0, errors
            assert json.loads(output)["uri"] == uri


class TestDoctor:
    def test_says_what_works_here(self):
        code, output, _ = run("doctor", "--json")
        diagnosis = json.loads(output)
        assert code == 0
        assert diagnosis["can_build"]
        assert diagnosis["can_run_on_cpu"]
        checks = {check["name"]: check for check in diagnosis["checks"]}
        assert checks["TensorRT-RTX"]["ok"]
        assert checks["can build"]["detail"].startswith("TensorRT-RTX")
        assert {"Python", "mlflow", "onnx", "ONNX Runtime", "driver", "CUDA calls", "cache"} <= set(checks)
        assert checks["extension"]["detail"] == native.description()

    def test_a_machine_without_a_gpu_cannot_run_engines(self):
        code, output, _ = run("doctor", "--need", "run", CUDA_VISIBLE_DEVICES="")
        assert code == 1
        assert "can run on TensorRT" in output

    @pytest.mark.parametrize(("cuda", "is_ok"), [("12.9", False), ("13.0", True), ("14.1", True)])
    def test_a_driver_that_is_older_than_the_cuda_of_tensorrt_is_named(self, cuda, is_ok, monkeypatch):
        monkeypatch.setattr(doctor.hardware, "probe", lambda: Hardware(driver="5", cuda=cuda))
        monkeypatch.setattr(
            doctor, "_package", lambda name: Check(name=name, ok=name.endswith("_cu13_bindings"), detail="")
        )
        (check,) = doctor._hardware()
        assert check.ok == is_ok
        assert ("which is too old: the TensorRT installed here is for CUDA 13" in check.detail) != is_ok

    @pytest.mark.exhaustive
    def test_without_tensorrt_nothing_is_usable(self):
        program = """
import importlib.util, sys
find = importlib.util.find_spec
hidden = ("tensorrt", "tensorrt_rtx", "onnxruntime")
importlib.util.find_spec = lambda name, *rest: None if name in hidden else find(name, *rest)
sys.argv = ["mlflow-trt", "doctor"]
from mlflow_trt.cli import main
main()
"""
        environment = {**os.environ, "COLUMNS": "200"}
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
        )
        assert result.returncode == 1
        assert "pip install 'mlflow-trt[rtx]'" in result.stdout
        assert "pip install onnxruntime" in result.stdout


class TestStart:
    def test_help_lists_the_commands(self):
        code, output, _ = run("--help")
        assert code == 0
        assert {"convert", "inspect", "doctor"} <= set(output.split())

    @pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["--version"]])
    def test_help_loads_nothing_heavy(self, arguments):
        program = f"""
import sys
sys.argv = ["mlflow-trt", *{arguments!r}]
from mlflow_trt.cli import main
try:
    main()
except SystemExit:
    pass
heavy = {{"mlflow", "onnx", "numpy", "tensorrt_rtx", "pycuda", "cuda", "onnxruntime"}}
print(",".join(sorted(heavy & set(sys.modules))))
"""
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert result.stdout.splitlines()[-1] == ""

    @pytest.mark.parametrize(
        ("words", "completed"), [("mlflow-trt con", {"convert"}), ("mlflow-trt serve --dr", {"--drain-seconds"})]
    )
    def test_a_shell_completes_commands_and_options(self, words, completed):
        asked = {"_MLFLOW_TRT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        code, output, errors = run(**asked)
        assert code == 0, errors
        assert set(output.split()) == completed

    def test_version(self):
        assert run("--version")[1].strip() == mlflow_trt.__version__

    def test_a_traceback_is_printed_where_it_is_asked_for(self, tmp_path):
        code, _, errors = run("--traceback", "inspect", tmp_path)
        assert code == 1
        assert "Traceback (most recent call last)" in errors
        assert "in read_folder" in errors
        assert "has no mlflow_trt.json" in errors.splitlines()[-1]
        assert "Traceback" not in run("inspect", tmp_path)[2]

    def test_bugs_keep_their_traceback(self):
        program = "import mlflow_trt.cli as c; c.app = lambda: 1 / 0; c.main()"
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert "ZeroDivisionError" in result.stderr


class TestOptions:
    def test_batch(self):
        assert parse_batch("64") == (64, 64, 64)
        assert parse_batch("1:8:64") == (1, 8, 64)

    def test_shapes(self):
        assert parse_shapes("a:1x3x224x224,scope/b:0:2", "--min-shapes") == {"a": (1, 3, 224, 224), "scope/b:0": (2,)}
        assert parse_shapes("'a,b':1x3,\"c,d:0\":2,it's:4", "--min-shapes") == {
            "a,b": (1, 3), "c,d:0": (2,), "it's": (4,)
        }  # fmt: skip

    @pytest.mark.parametrize("text", ["", "1:2", "a", "1:2:3:4"])
    def test_a_batch_that_is_none(self, text):
        with pytest.raises(typer.BadParameter, match="min:opt:max like 1:8:64"):
            parse_batch(text)

    @pytest.mark.parametrize("text", ["1x3", "x:1x?", ":1x3", "x:"])
    def test_shapes_that_are_none(self, text):
        with pytest.raises(typer.BadParameter, match="expected input:dims"):
            parse_shapes(text, "--min-shapes")

    def test_the_three_shape_options_name_the_same_inputs(self):
        with pytest.raises(typer.BadParameter, match="--opt-shapes does not name the input 'x'"):
            combine_shapes("x:1", "", "x:2")
