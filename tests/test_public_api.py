"""The public names, and what importing them costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlflow_trt
from mlflow_trt import errors

PACKAGE = Path(mlflow_trt.__file__).parent

NAMES = {
    "FLAVOR_NAME",
    "AccuracyError",
    "ArtifactError",
    "BuildError",
    "EngineMismatchError",
    "ExecutionError",
    "FormatError",
    "InputDtypeError",
    "InputError",
    "InputShapeError",
    "IntegrityError",
    "LoadSettings",
    "MissingDependencyError",
    "MlflowTrtError",
    "OnnxModelError",
    "OutOfMemoryError",
    "Precision",
    "Recipe",
    "RecipeError",
    "RuntimeUnavailableError",
    "SelfTestError",
    "ServerError",
    "ServerTimeoutError",
    "ServerUnavailableError",
    "Session",
    "SessionClosedError",
    "Tolerance",
    "UnsupportedModelError",
    "__version__",
    "_load_pyfunc",
    "convert_model_version",
    "get_default_pip_requirements",
    "load_model",
    "log_model",
    "save_model",
}


def test_the_public_names():
    assert set(mlflow_trt.__all__) == NAMES
    assert all(getattr(mlflow_trt, name) is not None for name in NAMES)
    assert set(dir(mlflow_trt)) == NAMES
    with pytest.raises(AttributeError, match="has no attribute 'tensorrt'"):
        mlflow_trt.tensorrt  # noqa: B018  # the access is the test


def test_every_error_is_public():
    assert {name for name in vars(errors) if name.endswith("Error")} <= NAMES


@pytest.mark.parametrize(
    ("statement", "banned"),
    [
        ("import mlflow_trt", {"mlflow", "onnx", "numpy", "pandas"}),
        # The process that builds engines starts with every build.
        ("import mlflow_trt.convert.build_worker", {"mlflow", "onnx", "numpy", "pandas", "pydantic"}),
        ("import mlflow_trt.client", {"mlflow", "onnx", "pandas", "pyarrow", "pydantic"}),
        ("import mlflow_trt.flavor, mlflow_trt.pyfunc, mlflow_trt.registry", set()),
    ],
)
def test_importing_loads_neither_tensorrt_nor_cuda_nor_onnxruntime_nor_the_cli(statement, banned):
    banned = banned | {"tensorrt", "tensorrt_rtx", "pycuda", "onnxruntime", "mlflow_trt.cli"}
    program = f"{statement}; import sys; print(sorted({banned!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# A module may import its own storey and those below it; see the table in CONTRIBUTING.md.
BASE = {
    "_logging",
    "_version",
    "comparison",
    "dtypes",
    "errors",
    "files",
    "fitting",
    "hardware",
    "inputs",
    "onnx_runtime",
    "selection",
    "server",
    "settings",
    "spec",
    "tags",
    "trt",
    "trt_api",
    "trt_callbacks",
    "wire",
}
CONVERT = BASE | {"convert"}
RUNTIME = BASE | {"runtime"}
ALLOWED = {
    **dict.fromkeys(BASE, BASE),
    "convert": CONVERT,
    "runtime": RUNTIME,
    "cache": CONVERT,
    "golden": CONVERT,
    "artifact": CONVERT | {"golden"},
    "self_test": BASE | {"artifact", "cache", "runtime"},
    "kernel_file": BASE | {"cache"},
    "own_gpu": BASE | {"cache"},
    "loading": CONVERT | RUNTIME | {"artifact", "cache", "kernel_file", "own_gpu", "self_test"},
    "kernels": CONVERT | RUNTIME | {"artifact", "loading"},
    "verify": CONVERT | RUNTIME | {"golden", "loading"},
    "measuring": CONVERT | RUNTIME | {"verify"},
    "trial": CONVERT | {"verify"},
    "best": CONVERT | {"measuring", "trial", "verify"},
    "making": CONVERT | {"best", "kernels", "progress", "sample_data", "signatures", "verify"},
    "metrics": BASE,
    "fetching": BASE | {"artifact"},
    "verify_model": CONVERT | RUNTIME | {"artifact", "fetching", "loading", "sample_data", "verify"},
    "report": BASE | {"artifact"},
    "sample_data": CONVERT | {"pyfunc"},
    "progress": CONVERT,
    "signatures": BASE,
    "doctor": CONVERT | RUNTIME | {"cache"},
    "packaging": CONVERT | {"artifact", "kernels", "making", "report", "selection_plot", "signatures", "verify"},
    "registration": BASE,
    "lineage": CONVERT | {"cache", "registration"},
    "sources": CONVERT | {"fetching", "sources"},
    "flavor": CONVERT
    | RUNTIME
    | {"artifact", "fetching", "loading", "making", "metrics", "packaging", "progress", "registration", "verify"},
    "pyfunc": BASE | RUNTIME | {"artifact", "loading", "progress"},
    "registry": CONVERT | {"best", "flavor", "kernels", "lineage", "packaging", "registration", "sources"},
    "planning": CONVERT | {"lineage", "registry", "packaging", "sample_data", "signatures", "sources"},
    "convert_all": CONVERT | {"lineage", "packaging", "planning", "registration", "registry"},
    "add_engine": CONVERT
    | {
        "artifact",
        "fetching",
        "kernels",
        "lineage",
        "loading",
        "packaging",
        "progress",
        "registration",
        "registry",
        "sources",
    },
    "model_inputs": BASE,
    "compare": CONVERT | {"benchmark", "comparison"},
    "benchmark": CONVERT | RUNTIME | {"artifact", "fetching", "loading", "model_inputs", "sources"},
    "layers": CONVERT | RUNTIME | {"benchmark"},
    "figures": BASE,
    "plots": BASE | {"benchmark", "figures"},
    "selection_plot": BASE | {"figures"},
    "reporting": BASE | {"benchmark", "comparison", "layers", "plots"},
    "export": BASE | {"fetching", "packaging"},
    "triton_config": BASE | {"artifact"},
    "triton": BASE | {"artifact", "fetching", "packaging", "triton_config"},
    "dockerfile": BASE | {"fetching", "packaging"},
    "spark_rows": BASE | RUNTIME,
    "spark": BASE | RUNTIME | {"fetching", "sources", "spark_rows"},
    "client": BASE,
    "cli": BASE
    | {
        "add_engine",
        "artifact",
        "benchmark",
        "verify_model",
        "cli",
        "compare",
        "comparison",
        "convert",
        "convert_all",
        "dockerfile",
        "doctor",
        "export",
        "fetching",
    }
    | {"flavor", "layers", "planning", "progress", "registry", "reporting", "sample_data", "triton"},
    "__main__": {"cli"},
}
MODULES = sorted(
    path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__"
)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_one_way(module):
    storey = module.parts[0].removesuffix(".py")
    imported = set()
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mlflow_trt"):
            parts = node.module.split(".")
            imported |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    assert imported <= ALLOWED[storey], f"{module} imports {imported - ALLOWED[storey]}"
