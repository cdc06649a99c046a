"""The wheel and the sdist that users get."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mlflow_trt

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Built from the sdist, as `python -m build` does, so that what MANIFEST.in leaves out is missed here."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "mlflow_trt").rglob("*.py")}
    assert modules <= names
    assert "mlflow_trt/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"mlflow_trt", f"mlflow_trt-{mlflow_trt.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_the_tests_need(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"Makefile", "LICENSE", "README.md", "CHANGELOG.md", "docs/guide.md", "examples/quickstart.py"} <= names
    assert {"tests/conftest.py", "tests/gpu/test_session.py", "pyproject.toml", ".ci/run"} <= names


def test_the_wheel_runs(built, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, built[0]]
    subprocess.run(pip, check=True, capture_output=True)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mlflow_trt; print(mlflow_trt.__file__)"
    found = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(tmp_path))
    script = subprocess.run(
        [sys.executable, tmp_path / "bin" / "mlflow-trt", "--version"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert script.stdout.strip() == mlflow_trt.__version__
