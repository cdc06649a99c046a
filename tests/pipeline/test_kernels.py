"""Kernels stored with a model: real engines, folders and registries; what a GPU compiles is given."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import mlflow
import networks
import pytest
from command_line import run
from helpers import gpu, log_prepared, prepare, save_prepared
from mlflow.artifacts import download_artifacts
from typer.testing import CliRunner

import mlflow_trt
from mlflow_trt import (
    ArtifactError,
    ExecutionError,
    IntegrityError,
    LoadSettings,
    MissingDependencyError,
    OptionError,
    Recipe,
    RecipeError,
    RuntimeUnavailableError,
)
from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.backends.cuda_driver import Hardware
from mlflow_trt.cli import app
from mlflow_trt.convert.engine import builder
from mlflow_trt.core.types import Distribution
from mlflow_trt.deploy.engine_file import save_engine
from mlflow_trt.pipeline.compile_kernels import check_kernels
from mlflow_trt.pipeline.options import ConversionOptions
from mlflow_trt.registry.add_engine import add_engine, extended_version
from mlflow_trt.registry.convert_all import convert_all
from mlflow_trt.registry.convert_version import convert_to_version
from mlflow_trt.registry.plan import plan_conversion
from mlflow_trt.runtime.cuda import device
from mlflow_trt.store.folder import read_folder
from mlflow_trt.store.kernel_cache import KernelFile
from mlflow_trt.store.load import shipped_kernels
from mlflow_trt.store.record import RECORD_FILE


def extend_version(uri, **options):
    with extended_version(uri, **options) as version:
        return version


class Compiler:
    """Gives bytes that tell which engine they are for, or fails."""

    driver = "580.1"

    def __init__(self, target="sm86", problem=None):
        self.gpu = gpu(target)
        self.problem = problem
        self.engines: list[str] = []

    def compile_kernels(self, folder, engine):
        if self.problem is not None:
            raise self.problem
        assert len(folder.read_plan(engine)) == engine.size
        self.engines.append(engine.file)
        return self.kernels(engine)

    def kernels(self, engine) -> bytes:
        return f"kernels of {engine.sha256} for {self.gpu}".encode()


@pytest.fixture
def compiler():
    return Compiler()


@pytest.fixture
def folder(compiler, tmp_path):
    prepared = prepare(batch=(1, 4, 8), store_kernels=True, compiler=compiler)
    save_prepared(networks.product(), tmp_path / "model", prepared)
    return tmp_path / "model"


@pytest.fixture
def registered(store):
    mlflow.onnx.log_model(networks.product(), name="p", registered_model_name="p", pip_requirements=["onnx"])
    return store


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(device, "probe", lambda: Hardware(problem="no NVIDIA driver"))
    monkeypatch.setattr(device, "_devices", {})


@pytest.fixture
def nothing_is_built(monkeypatch):
    monkeypatch.setattr(builder, "_WORKER", "import os; os.abort()")


def test_they_are_stored_as_they_were_serialized(folder, compiler):
    (engine,) = read_folder(folder).record.engines
    file = f"runtime_cache/tensorrt_rtx-{engine.version}-sm80plus.kernels"
    content = compiler.kernels(engine)
    assert (folder / file).read_bytes() == content
    assert json.loads((folder / RECORD_FILE).read_text())["engines"][0]["kernels"] == {
        "file": file,
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
        "gpu": "a GPU",
        "compute_capability": "sm86",
        "version": engine.version,
        "driver": "580.1",
    }
    assert mlflow.models.Model.load(str(folder)).model_size_bytes > engine.size + len(content)
    model = mlflow.pyfunc.load_model(str(folder), model_config={"runtime": "onnxruntime"})
    assert model.predict(networks.rows(3))["y"].shape == (3, 8)


def test_none_are_stored_unasked(magika_folder):
    assert not (magika_folder / "runtime_cache").exists()
    assert read_folder(magika_folder).record.engines[0].kernels is None


def test_a_record_of_before_is_read(folder):
    record = json.loads((folder / RECORD_FILE).read_text())
    assert record["format"] == 1
    del record["engines"][0]["kernels"]
    (folder / RECORD_FILE).write_text(json.dumps(record))
    assert read_folder(folder).record.engines[0].kernels is None


def test_they_are_for_the_same_compute_capability_and_release(folder, compiler):
    model = read_folder(folder)
    (engine,) = model.record.engines
    assert shipped_kernels(model, engine, engine.version, gpu("sm86")) == (compiler.kernels(engine),)
    assert shipped_kernels(model, engine, engine.version, gpu("sm89")) == ()
    assert shipped_kernels(model, engine, "1.0.0.1", gpu("sm86")) == ()


def test_what_was_shipped_is_read_before_what_was_kept_here():
    file = KernelFile("key", shipped=[b"shipped"])
    assert file.read() == [b"shipped"]
    file.update(lambda others: b"kept" if others == [] else None)
    assert file.read() == [b"shipped", b"kept"]
    assert KernelFile("key").read() == [b"kept"]


def test_other_kernels_than_those_that_were_logged_are_never_used(folder):
    model = read_folder(folder)
    (engine,) = model.record.engines
    path = folder / engine.kernels.file
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(IntegrityError, match=r"\.kernels is not the file that was logged: its sha256 is") as caught:
        shipped_kernels(model, engine, engine.version, gpu("sm86"))
    assert caught.value.path == path
    path.unlink()
    with pytest.raises(ArtifactError, match=r"\.kernels is missing; download the model again"):
        shipped_kernels(model, engine, engine.version, gpu("sm86"))
    record = json.loads((folder / RECORD_FILE).read_text())
    record["engines"][0]["kernels"]["file"] = "../../etc/passwd"
    (folder / RECORD_FILE).write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match="outside of the model folder"):
        read_folder(folder)


class TestWhereTheyCannotBeCompiled:
    def test_there_is_no_gpu(self, no_gpu, nothing_is_built, registered, tmp_path):
        said = r"this machine cannot: .*no NVIDIA driver\. Log .*leave store_kern"
        with pytest.raises(RuntimeUnavailableError, match=said):
            mlflow_trt.save_model(networks.product(), tmp_path / "model", store_kernels=True)
        assert not (tmp_path / "model").exists()
        with pytest.raises(RuntimeUnavailableError):
            mlflow_trt.log_model(networks.product(), name="m", store_kernels=True)
        for uri in ("models:/p/1", "models:/missing/1"):  # said before anything is downloaded
            with pytest.raises(RuntimeUnavailableError):
                mlflow_trt.convert_model_version(uri, "p-trt", store_kernels=True)
        with pytest.raises(RuntimeUnavailableError):
            convert_all("", ConversionOptions(store_kernels=True))
        assert not registered.client.search_model_versions("name = 'p-trt'")

    def test_nothing_can_call_the_driver(self, no_gpu, monkeypatch):
        monkeypatch.setattr(device, "probe", lambda: Hardware(driver="580", cuda="13.0", gpus=(gpu("sm86"),)))
        for package in ("pycuda", "cuda", "cuda.bindings"):
            monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingDependencyError, match=r"store_kernels .*mlflow-trt\[cuda-core\]") as caught:
            check_kernels(Recipe(), LoadSettings())
        assert caught.value.packages == ("pycuda", "cuda-bindings")

    def test_tensorrt_is_missing(self, monkeypatch):
        monkeypatch.setattr(trt, "installed", lambda: ())
        with pytest.raises(MissingDependencyError, match=r"store_kernels .*mlflow-trt\[rtx\]"):
            check_kernels(Recipe(), LoadSettings())

    def test_the_tensorrt_distribution_has_none(self, monkeypatch):
        stand_in = trt.TensorRT(Distribution.TENSORRT, trt.load()._module)
        monkeypatch.setattr(trt, "load", lambda: stand_in)
        with pytest.raises(OptionError, match="compiles all kernels when it builds the engine; leave it out") as caught:
            check_kernels(Recipe(), LoadSettings())
        assert caught.value.option == "store_kernels"

    @pytest.mark.parametrize(
        ("target", "targets", "message"),
        [
            ("sm86", ["sm89", "sm120"], r"GPU of this machine, a GPU \(sm86\), and the targets are sm89, sm120; add"),
            ("sm75", (), r"by default engines are built for sm80 and later; give targets=\['sm75'\]"),
        ],
    )
    def test_this_gpu_is_no_target(self, target, targets, message):
        with pytest.raises(RecipeError, match=message) as caught:
            prepare(targets=targets, store_kernels=True, compiler=Compiler(target))
        assert caught.value.option == "targets"

    def test_the_engine_does_not_run(self, store, tmp_path):
        prepared = prepare(store_kernels=True, compiler=Compiler(problem=ExecutionError("no kernel image")))
        with pytest.raises(ExecutionError, match="no kernel image"):
            log_prepared(networks.product(), prepared, name="m", registered_model_name="m")
        with pytest.raises(ExecutionError, match="no kernel image"):
            save_prepared(networks.product(), tmp_path / "out" / "model", prepared)
        assert store.is_untouched()
        assert list((tmp_path / "out").iterdir()) == []


class TestTheRegistry:
    def test_with_and_without_are_two_versions(self, registered, compiler):
        def convert(prepared):
            return str(convert_to_version("models:/p/1", "p-trt", prepared).version)

        without = prepare(batch=(1, 4, 8))
        having = prepare(batch=(1, 4, 8), store_kernels=True, compiler=compiler)
        assert convert(without) == "1"
        assert convert(having) == "2"
        assert convert(without) == "1"
        assert convert(having) == "2"
        assert plan_conversion("models:/p/1", having, registered_model_name="p-trt").existing == "models:/p-trt/2"
        assert convert(prepare(batch=(1, 4, 8), store_kernels=True, compiler=Compiler("sm89"))) == "3"

    def test_another_engine_brings_its_own_and_keeps_those_of_the_first(self, registered, compiler, tmp_path):
        prepared = prepare(batch=(1, 4, 8), targets="sm86", store_kernels=True, compiler=compiler)
        convert_to_version("models:/p/1", "p-trt", prepared)
        add_engine("models:/p-trt/1", targets="sm89")
        for uri in ("models:/p-trt/2", "models:/p-trt/3"):
            made = extend_version(uri, targets="sm120", store_kernels=True, compiler=Compiler("sm120"))
            assert str(made.version) == "3"
        folder = read_folder(Path(download_artifacts("models:/p-trt/3", dst_path=str(tmp_path))))
        first, second, third = folder.record.engines
        assert folder.read_kernels(first.kernels) == compiler.kernels(first)
        assert second.kernels is None
        assert folder.read_kernels(third.kernels) == Compiler("sm120").kernels(third)

    def test_an_engine_that_is_there_gets_them(self, registered, compiler, tmp_path):
        mlflow_trt.convert_model_version("models:/p/1", "p-trt", batch=(1, 4, 8), targets="sm86")
        made = extend_version("models:/p-trt/1", targets="sm86", store_kernels=True, compiler=compiler)
        folder = read_folder(Path(download_artifacts("models:/p-trt/2", dst_path=str(tmp_path))))
        (engine,) = folder.record.engines
        assert folder.read_kernels(engine.kernels) == compiler.kernels(engine)
        assert made.tags["mlflow_trt.extends"] == folder.record.lineage["extends"] == "models:/p-trt/1"

    def test_those_of_another_kind_of_gpu_take_their_place(self, registered, compiler, tmp_path):
        prepared = prepare(batch=(1, 4, 8), targets=["sm86", "sm89"], store_kernels=True, compiler=compiler)
        convert_to_version("models:/p/1", "p-trt", prepared)
        extend_version("models:/p-trt/1", targets="sm89", store_kernels=True, compiler=Compiler("sm89"))
        folder = read_folder(Path(download_artifacts("models:/p-trt/2", dst_path=str(tmp_path))))
        (engine,) = folder.record.engines
        assert folder.read_kernels(engine.kernels) == Compiler("sm89").kernels(engine)
        assert engine.kernels.compute_capability == "sm89"

    def test_adding_them_needs_a_gpu_too(self, registered, no_gpu):
        with pytest.raises(OptionError, match="is no registered version"):
            add_engine("no-uri", store_kernels=True)
        with pytest.raises(RuntimeUnavailableError, match="store_kernels compiles on a GPU"):
            add_engine("models:/p/1", store_kernels=True)
        with pytest.raises(RecipeError, match="the targets are sm120"):
            extend_version("models:/p/1", targets="sm120", store_kernels=True, compiler=Compiler("sm86"))


def test_an_exported_engine_leaves_them_behind(folder, tmp_path):
    engine = save_engine(str(folder), tmp_path / "out" / "model.plan")
    assert hashlib.sha256((tmp_path / "out" / "model.plan").read_bytes()).hexdigest() == engine.sha256
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.plan"]


def test_the_command(compiler, tmp_path):
    source = tmp_path / "product.onnx"
    source.write_bytes(networks.product().SerializeToString())
    arguments = ["convert", str(source), "--batch", "1:4:8", "--store-kernels"]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, [*arguments, "--output", str(tmp_path / "model")], obj=ConversionOptions(compiler=compiler)
    )
    assert result.exit_code == 0, result.output
    assert "a GPU (sm86)" in result.output
    assert len(compiler.engines) == 1
    code, output, _ = run("inspect", tmp_path / "model")
    assert code == 0
    for text in ("kernels, for GPUs of the same compute capability", "runtime_cache/", "a GPU (sm86)", "580.1"):
        assert text in output
    result = CliRunner().invoke(app, [*arguments, "--save-engine", str(tmp_path / "model.plan")])
    assert result.exit_code == 2
    assert "--store-kernels stores them with a model" in result.output
