"""The wheel and the sdist that users get: what is in them, what PyPI shows, and that they work by themselves."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
import yaml
from installed import install
from onnx.reference import ReferenceEvaluator
from packaging.version import Version
from repository import ROOT, SUPPORT

import mlflow_trt
from mlflow_trt.client import AsyncClient, Client
from mlflow_trt.runtime import native

PROGRAM = SUPPORT / "user_program.py"
REPOSITORY = "https://github.com/mlflow-trt/mlflow-trt"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel is built from the sdist, as `python -m build` does, so that what the sdist lacks is missed here."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def metadata(built) -> Message:
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        return Parser().parsestr(wheel.read(name).decode())


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The Python of an environment with the wheel, what it asks for, and nothing else."""
    folder = tmp_path_factory.mktemp("empty") / "environment"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    if problem := install(f"{built[0]}[rtx,client]", python=python):
        pytest.skip(f"what the wheel needs cannot be installed here: {problem}")
    return python


def run(*command: str | Path, folder: Path, installed: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder without the repository, with that environment's Python as the one that is active."""
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    environment["PATH"] = os.pathsep.join([str(installed.parent), environment["PATH"]])
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "mlflow_trt").rglob("*.py")}
    assert modules <= names
    assert {"mlflow_trt/py.typed", "mlflow_trt/_native.pyi"} <= names
    assert not [name for name in names if name.endswith((".c", ".h"))]
    assert {name.split("/")[0] for name in names} == {"mlflow_trt", f"mlflow_trt-{mlflow_trt.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.skipif(native.extension is None, reason=native.why_not)
def test_one_wheel_serves_every_python(built):
    """The extension uses nothing but the stable ABI."""
    assert "-cp310-abi3-linux_" in built[0].name
    with zipfile.ZipFile(built[0]) as wheel:
        assert "mlflow_trt/_native.abi3.so" in wheel.namelist()


def test_without_a_compiler_the_package_is_built_all_the_same(built, tmp_path):
    with tarfile.open(built[1]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    environment = os.environ | {"CC": "no-compiler-of-this-name"}
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "out", folder]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    (found,) = (tmp_path / "out").glob("*.whl")
    with zipfile.ZipFile(found) as wheel:
        names = wheel.namelist()
    assert "mlflow_trt/runtime/native.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_the_sdist_holds_what_the_tests_need(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"Makefile", "LICENSE", "README.md", "CHANGELOG.md", "docs/quickstart.md", "examples/quickstart.py"} <= names
    assert {"tests/conftest.py", "tests/gpu/test_session.py", "tests/mypy.ini", "tests/support/plugin"} <= names | {
        str(Path(name).parent) for name in names
    }
    assert {"setup.py", "native/module.c", "native/module.h", "native/tests/test_copying.c"} <= names
    assert {"pyproject.toml", ".ci/run", ".github/workflows/release.yml", "mkdocs.yml"} <= names
    assert not [name for name in names if name.endswith(".so")]
    assert not [name for name in names if "__pycache__" in name or name.startswith((".venv", "dist", "quickstart"))]


def test_what_pypi_shows(metadata):
    """The description is the README, with links that work there: to the files of this very release."""
    description = metadata.get_payload()
    assert description.startswith("# mlflow-trt")
    targets = re.findall(r'\]\(([^)\s]+)|^\[[^\]]+\]: +(\S+)|(?:href|src|srcset)="([^"]+)"', description, re.MULTILINE)
    links = ["".join(groups) for groups in targets]
    tag = f"v{mlflow_trt.__version__}/"
    pages, raw = f"{REPOSITORY}/blob/{tag}", f"{REPOSITORY.replace('github', 'raw.githubusercontent')}/{tag}"
    files = {link.removeprefix(pages).removeprefix(raw).partition("#")[0] for link in links if tag in link}
    assert {"docs/quickstart.md", "CHANGELOG.md", "SECURITY.md", "docs/pictures/way.svg"} <= files
    assert f"]({raw}docs/pictures/way.svg)" in description
    assert [name for name in files if not (ROOT / name).is_file()] == []
    assert [link for link in links if not re.match(r"https?://|#", link)] == []
    urls = dict(value.split(", ") for value in metadata.get_all("Project-URL", []))
    assert set(urls) == {"Documentation", "Source", "Issues", "Changelog"}
    assert all(url.startswith(REPOSITORY) for url in urls.values())


def test_each_python_that_is_named_is_tested(metadata):
    named = re.findall(r":: (3\.\d+)$", "\n".join(metadata.get_all("Classifier", [])), re.MULTILINE)
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]
    ones = [step["with"]["python-version"] for step in jobs["all"]["steps"] if "python-version" in step.get("with", {})]
    assert len(ones) == 1
    may_fail = re.findall(r"'(3\.\d+)'", jobs["python"]["continue-on-error"])
    assert sorted(named) == sorted({*ones, *jobs["python"]["strategy"]["matrix"]["python"]} - set(may_fail))
    assert metadata["Requires-Python"] == f">={min(named, key=Version)}"


def test_actions_are_pinned_by_commit():
    used = [
        line
        for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))
        for line in re.findall(r"uses: (.+)", path.read_text())
    ]
    assert len(used) > 5
    assert [line for line in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}  # v[\d.]+", line)] == []


def test_the_changelog_begins_with_this_version():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(mlflow_trt.__version__)}\] - \d{{4}}-\d\d-\d\d", headings[1])


@pytest.mark.slow
class TestInAnEmptyEnvironment:
    def test_the_commands_work(self, installed, tmp_path):
        command = installed.with_name("mlflow-trt")
        version = run(command, "--version", folder=tmp_path, installed=installed)
        assert (version.stdout.strip(), version.stderr) == (mlflow_trt.__version__, "")
        doctor = run(command, "doctor", "--json", folder=tmp_path, installed=installed)
        assert doctor.returncode == 0, doctor.stderr
        diagnosis = json.loads(doctor.stdout)
        assert diagnosis["can_build"]
        assert diagnosis["can_run_on_cpu"]

    @pytest.mark.exhaustive
    def test_mlflow_finds_the_target_of_deployments_by_its_entry_point(self, installed, tmp_path):
        mlflow = installed.with_name("mlflow")
        found = run(mlflow, "deployments", "help", "-t", "mlflow-trt", folder=tmp_path, installed=installed)
        assert "mlflow deployments run-local -t mlflow-trt" in found.stdout, found.stderr
        assert "pip install 'mlflow-trt[serve]'" in found.stdout

    def test_a_program_converts_a_model_and_mlflow_finds_the_flavor(self, installed, tmp_path):
        model = networks.product()
        onnx.save(model, tmp_path / "product.onnx")
        program = shutil.copy(PROGRAM, tmp_path)
        done = run(installed, program, "product.onnx", "model", folder=tmp_path, installed=installed)
        assert done.returncode == 0, done.stderr
        log, message, agrees = done.stdout.splitlines()
        assert (log, agrees) == ("", "True")
        assert message.startswith("unknown load setting 'runtim'")
        rows = np.linspace(-1, 1, 48, dtype=np.float32).reshape(3, 16)
        (expected,) = ReferenceEvaluator(model).run(None, {"x": rows})
        np.testing.assert_allclose(np.load(tmp_path / "model.npy"), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.exhaustive
    def test_mypy_has_nothing_to_say_about_it(self, installed, tmp_path):
        mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", installed]
        done = run(*mypy, shutil.copy(PROGRAM, tmp_path), folder=tmp_path, installed=installed)
        assert done.stdout.startswith("Success"), done.stdout + done.stderr

    @pytest.mark.exhaustive
    def test_pyright_has_nothing_to_say_about_it(self, installed, tmp_path):
        (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
        shutil.copy(PROGRAM, tmp_path)
        done = run(sys.executable, "-m", "pyright", folder=tmp_path, installed=installed)
        assert "0 errors, 0 warnings" in done.stdout, done.stdout + done.stderr

    @pytest.mark.exhaustive
    def test_pyright_knows_the_type_of_everything_public(self, installed, tmp_path):
        pyright = [sys.executable, "-m", "pyright", "--verifytypes", "mlflow_trt", "--ignoreexternal", "--outputjson"]
        done = run(*pyright, folder=tmp_path, installed=installed)
        known = {item["name"]: item["isTypeKnown"] for item in json.loads(done.stdout)["typeCompleteness"]["symbols"]}
        public = [getattr(mlflow_trt, name) for name in mlflow_trt.__all__] + [Client, AsyncClient]
        names = {
            f"{item.__module__}.{item.__qualname__}"
            for item in public
            if inspect.isroutine(item) or inspect.isclass(item)
        }
        assert len(names) > 40
        assert names <= set(known)
        assert [name for name, is_known in known.items() if not is_known and _belongs_to(name, names)] == []


def _belongs_to(symbol: str, names: set[str]) -> bool:
    return symbol in names or symbol.rpartition(".")[0] in names
