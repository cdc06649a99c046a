"""Plugins of TensorRT: which libraries are loaded, by whose word, and what the record says of them.

TensorRT-RTX, the only TensorRT that can be had without NVIDIA's own index, has the registry that plugins are loaded
into, and no layer that runs one. So a real library, compiled here, is loaded and found, and engines of it are refused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlflow
import networks
import onnx
import pytest
import yaml
from command_line import run
from helpers import read
from onnx import helper
from repository import SUPPORT

import mlflow_trt
from mlflow_trt import OptionError, Recipe, RecipeError, RuntimeUnavailableError, UnsupportedModelError
from mlflow_trt.convert.engine import builder
from mlflow_trt.core.types import Distribution, EngineRecord, Interface, PluginLibrary
from mlflow_trt.store.folder import read_folder
from mlflow_trt.store.plugins import check_plugins

ROWS = {"x": networks.rows(8)}
ENGINE = EngineRecord(
    file="engine.plan", sha256="0" * 64, size=1, distribution=Distribution.TENSORRT, version="11.4.0.106"
)
LOAD = """
import sys
from mlflow_trt.backends.tensorrt import PluginError, import_distribution
from mlflow_trt.core.types import Distribution
rtx = import_distribution(Distribution.TENSORRT_RTX)
for path in sys.argv[1:]:
    try:
        rtx.load_plugins([path])
    except PluginError as error:
        print(error)
print([creator.name for creator in rtx._module.get_plugin_registry().all_creators])
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    """A real plugin, `Scaled`, compiled from C++ against no more than TensorRT's binary interface."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("compiling a plugin needs a C++ compiler")
    made = tmp_path_factory.mktemp("plugin") / "libscaled.so"
    source = SUPPORT / "plugin" / "scaled.cpp"
    subprocess.run(
        [compiler, "-std=c++17", "-shared", "-fPIC", "-Wall", "-Werror", "-o", made, source, "-ldl"], check=True
    )
    return made


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def scaled() -> onnx.ModelProto:
    """A custom operator between two of ONNX."""
    model = networks.model(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Scaled", ["h"], ["s"], name="scaled", domain="test.plugins", factor=2.5),
            helper.make_node("Relu", ["s"], ["y"]),
        ],
        [networks.value("x", networks.FLOAT, [8, 16])],
        [networks.value("y", networks.FLOAT, [8, 8])],
        [networks.constant("w", networks.rows(16, 8))],
    )
    model.opset_import.append(helper.make_opsetid("test.plugins", 1))
    return model


def load_in_a_process(*paths: Path) -> str:
    done = subprocess.run([sys.executable, "-c", LOAD, *paths], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.slow
def test_a_library_is_loaded_into_the_registry_once(library, tmp_path):
    (tmp_path / "link.so").symlink_to(library)
    said = load_in_a_process(library, library, tmp_path / "link.so")
    assert said.count("Scaled") == 1


@pytest.mark.slow
def test_what_is_no_library_is_told_by_its_path(tmp_path):
    (tmp_path / "text.so").write_text("no library")
    said = load_in_a_process(tmp_path / "text.so", tmp_path / "missing.so")
    for name in ("text.so", "missing.so"):
        assert f"cannot load the plugins in {tmp_path / name}" in said


def job(folder: Path, *libraries: Path) -> builder.Job:
    source = read(scaled(), folder)
    return builder._job(
        source.path,
        folder / "engine.plan",
        Recipe(plugins=libraries),
        (),
        Interface(source.inputs, source.outputs),
        Distribution.TENSORRT_RTX,
    )


@pytest.mark.slow
def test_the_build_process_loads_the_libraries(library, tmp_path):
    """The parser finds the plugin there: then it gets beyond it, to what TensorRT-RTX lacks, and ends."""
    outcomes = []
    for libraries in ((), (library,)):
        with builder._worker(job(tmp_path, *libraries), None) as worker:
            outcomes.append(builder._follow(worker, None))
    assert "Scaled" in outcomes[0]["message"] or "Plugin not found" in outcomes[0]["message"]
    assert outcomes[1] is None or "Plugin not found" not in outcomes[1]["message"]


@pytest.mark.slow
def test_the_build_process_tells_what_it_cannot_load(tmp_path):
    (tmp_path / "text.so").write_text("no library")
    with builder._worker(job(tmp_path, tmp_path / "text.so"), None) as worker:
        outcome = builder._follow(worker, None)
    assert outcome is not None
    assert (outcome["kind"], "cannot load the plugins in" in outcome["message"]) == ("option", True)


def test_recipes_name_libraries(library, tmp_path):
    assert Recipe(plugins=library).plugins == (str(library),)
    assert Recipe(plugins=[str(library), library]).plugins == (str(library),)
    assert tuple(builder.describe_plugins([str(library)])) == (
        PluginLibrary(name="libscaled.so", sha256=digest(library)),
    )
    for wrong in ([""], ["a\0b"], [3]):
        with pytest.raises(RecipeError, match="plugins"):
            Recipe(plugins=wrong)


def test_tensorrt_rtx_has_no_plugins(library, tmp_path):
    with pytest.raises(RecipeError, match="TensorRT-RTX has no plugins") as caught:
        mlflow_trt.save_model(scaled(), tmp_path / "m", recipe=Recipe(plugins=[library]))
    assert caught.value.option == "plugins"
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_without_them_a_custom_operator_is_called_one(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"Scaled.*custom operators.*Recipe\(plugins=\[...\]\)"):
        mlflow_trt.save_model(scaled(), tmp_path / "m")


# ---- loading


@pytest.fixture
def folder(library, tmp_path) -> Path:
    """A model whose record says that its engine needs the library. What it computes is of no matter."""
    path = tmp_path / "model"
    mlflow_trt.save_model(networks.product(), path, calibration_data=ROWS)
    record = json.loads((path / "mlflow_trt.json").read_text())
    record["engines"][0]["plugins"] = [{"name": library.name, "sha256": digest(library)}]
    record["recipe"]["plugins"] = [library.name]
    (path / "mlflow_trt.json").write_text(json.dumps(record))
    return path


@pytest.mark.slow
def test_nothing_is_loaded_because_a_model_says_so(folder, library):
    assert read_folder(folder).record.engines[0].plugins == (PluginLibrary(name=library.name, sha256=digest(library)),)
    with pytest.raises(RuntimeUnavailableError, match=r"libscaled.so .*model_config=\{'plugins'"):
        mlflow_trt.load_model(str(folder))
    with mlflow_trt.load_model(str(folder), runtime="onnxruntime") as session:
        assert session.run(ROWS)["y"].shape == (8, 8)


@pytest.mark.slow
def test_a_model_cannot_name_plugins_itself(folder, library):
    mlmodel = folder / "MLmodel"
    content = yaml.safe_load(mlmodel.read_text())
    content["flavors"]["python_function"]["config"]["plugins"] = [str(library)]
    mlmodel.write_text(yaml.safe_dump(content))
    with pytest.raises(OptionError, match="nothing is loaded because a model says so"):
        mlflow.pyfunc.load_model(str(folder))
    with pytest.raises(OptionError, match="nothing is loaded because a model says so"):
        mlflow_trt.load_model(str(folder), runtime="onnxruntime")


def test_nor_are_they_logged_with_one(library, tmp_path):
    with pytest.raises(OptionError, match="whoever loads it names them"):
        mlflow_trt.save_model(networks.product(), tmp_path / "m", model_config={"plugins": [str(library)]})


@pytest.mark.parametrize("plugins", [[""], [3], 3, {"a": "b"}])
def test_what_names_no_libraries_is_refused(plugins):
    with pytest.raises(OptionError, match="plugins is"):
        mlflow_trt.LoadSettings(plugins=plugins)


def test_libraries_are_told_apart_by_what_is_in_them(library, tmp_path, messages):
    wanted = PluginLibrary(name=library.name, sha256=digest(library))
    engine = replace(ENGINE, plugins=(wanted,))
    moved = tmp_path / "renamed.so"
    shutil.copyfile(library, moved)
    assert check_plugins([engine], [str(moved)])[0].sha256 == wanted.sha256
    assert not messages.text
    again = tmp_path / library.name
    again.write_bytes(library.read_bytes() + b"\0")
    check_plugins([engine], [str(again)])
    assert f"sha256 {digest(library)}, not {digest(again)}" in messages.text
    with pytest.raises(RuntimeUnavailableError, match=r"libscaled\.so"):
        check_plugins([engine], [])
    with pytest.raises(OptionError, match="missing.so cannot be read"):
        check_plugins([engine], [str(tmp_path / "missing.so")])


@pytest.mark.slow
def test_the_command_line_hands_them_on(library, tmp_path):
    model = tmp_path / "m.onnx"
    onnx.save(networks.product(), model)
    trtexec = f"trtexec --onnx={model} --saveEngine={tmp_path / 'e'} --dynamicPlugins={library}"
    for line in (
        ("convert", model, "--output", tmp_path / "out", "--dynamic-plugins", library),
        ("convert", "--from-trtexec", trtexec),
    ):
        code, _, said = run(*line)
        assert code == 1
        assert "TensorRT-RTX has no plugins" in said
