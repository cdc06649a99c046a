"""Every TensorRT name that the code touches exists in every supported release.

The `tensorrt` distribution needs a GPU to be of use, but its bindings can be imported without its libraries: empty
ones that define the few functions that the bindings link to are enough to look at the API.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.backends import tensorrt_api as trt_api
from mlflow_trt.backends import tensorrt_callbacks as trt_callbacks

# distribution on PyPI, module, shared libraries that its extension asks for
TENSORRT_10 = ("tensorrt_bindings", ("libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10"))
TENSORRT_11 = ("tensorrt_bindings", ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11"))
RTX = ("tensorrt_rtx_bindings", ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"))
RELEASES = {
    "tensorrt-cu12-bindings==10.12.0.36": TENSORRT_10,
    "tensorrt-cu13-bindings==10.13.2.6": TENSORRT_10,
    "tensorrt-cu13-bindings==10.16.1.11": TENSORRT_10,
    "tensorrt-cu13-bindings==11.4.0.106": TENSORRT_11,
    "tensorrt-rtx-cu13-bindings==1.6.1.120": RTX,
    "tensorrt-rtx-cu13-bindings==1.7.1.116": RTX,
}
FUNCTIONS = [
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getNvOnnxParserVersion",
    "initLibNvInferPlugins",
    "getPluginRegistry",
    "getBuilderPluginRegistry",
    "getLogger",
    "getInferLibVersion",
]

LIST_NAMES = """
import importlib, json, sys
sys.path[:0] = [sys.argv[1]]
module = importlib.import_module(sys.argv[2])
found = {}
for name in dir(module):
    value = getattr(module, name)
    if isinstance(value, type):
        found[name] = {member: None for member in dir(value)}
        for inner in dir(value):
            if isinstance(getattr(value, inner), type) and not inner.startswith("_"):
                found[inner] = {member: None for member in dir(getattr(value, inner))}
        found[name]["__doc__"] = value.__doc__
    else:
        found[name] = {}
found["__version__"] = module.__version__
json.dump(found, sys.stdout)
"""


def names_of(requirement: str) -> dict[str, Any]:
    """What the bindings of a release define, looked up once and kept in the user's cache directory."""
    module, libraries = RELEASES[requirement]
    cache = platformdirs.user_cache_path("mlflow-trt-tests") / f"{requirement}-{sys.implementation.cache_tag}"
    names = cache / "names.json"
    if not names.exists():
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("looking at bindings without their libraries needs a C compiler, cc")
        shutil.rmtree(cache, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--target", cache, requirement], check=True, capture_output=True)
        source = cache / "empty.c"
        source.write_text("\n".join(f"void *{function}(void) {{ return 0; }}" for function in FUNCTIONS))
        for library in libraries:
            command = [compiler, "-shared", "-fPIC", "-o", str(cache / library), str(source), f"-Wl,-soname,{library}"]
            subprocess.run(command, check=True)
        # Isolated, so that the libraries of an installed TensorRT stay out of it.
        listed = subprocess.run(
            [sys.executable, "-I", "-S", "-c", LIST_NAMES, cache, module],
            env={**os.environ, "LD_LIBRARY_PATH": str(cache)},
            capture_output=True,
            check=True,
        )
        names.write_bytes(listed.stdout)
    found: dict[str, Any] = json.loads(names.read_text())
    return found


def protocols(*, rtx: bool) -> dict[str, set[str]]:
    """The classes and members that trt_api declares, under TensorRT's names."""
    wanted: dict[str, set[str]] = {}
    for name, protocol in vars(trt_api).items():
        if not inspect.isclass(protocol) or protocol.__module__ != trt_api.__name__ or name == "Enumerator":
            continue
        if name.startswith("Rtx") and not rtx:
            continue
        members = {*vars(protocol), *inspect.get_annotations(protocol)}
        public = {member for member in members if not member.startswith("_")}
        wanted.setdefault(name.removeprefix("Rtx"), set()).update(public)
    return wanted


def module_names(*, rtx: bool) -> set[str]:
    """The classes that trt.py and trt_callbacks.py take from the module."""
    only_rtx = {"ComputeCapability", "EngineValidity", "EngineInvalidityDiagnostics",
                "DynamicShapesKernelSpecializationStrategy", "CudaGraphStrategy"}  # fmt: skip
    found = set()
    for file in (trt.__file__, trt_callbacks.__file__):
        for node in ast.walk(ast.parse(Path(file).read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("module", "self._module"):
                found.add(node.attr)
    return found if rtx else found - only_rtx


@pytest.mark.parametrize("requirement", RELEASES)
def test_every_name_exists(requirement):
    found = names_of(requirement)
    rtx = "rtx" in requirement
    assert found["__version__"] == requirement.partition("==")[2]
    for name, members in protocols(rtx=rtx).items():
        assert not members - set(found[name]), f"{name} lacks {members - set(found[name])}"
    assert module_names(rtx=rtx) <= set(found)
    assert set(trt._DTYPES) <= set(found["DataType"])
    assert "reallocate_output_async" in found["IOutputAllocator"]["__doc__"]
    assert {"EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"} <= set(found["TacticSource"])


def test_a_name_that_does_not_exist_is_found():
    """The check can fail: TensorRT 10 has no compute capabilities to choose."""
    found = names_of("tensorrt-cu13-bindings==10.13.2.6")
    assert "num_compute_capabilities" in protocols(rtx=True)["IBuilderConfig"]
    assert "num_compute_capabilities" not in found["IBuilderConfig"]
    assert not module_names(rtx=True) <= set(found)
