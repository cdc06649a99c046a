"""What the documentation says is so: its code runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import mlflow
import networks
import numpy as np
import pytest
import typer
from onnx import helper

import mlflow_trt
from examples.serving import served
from mlflow_trt.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
COMMAND: Any = typer.main.get_command(app)
COMMANDS = COMMAND.commands


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def image_model():
    weights = np.random.default_rng(0).standard_normal((5, 3, 3, 3)).astype(np.float32)
    return networks.model(
        [
            helper.make_node("Conv", ["images", "w"], ["features"], pads=[1, 1, 1, 1]),
            helper.make_node("ReduceMean", ["features"], ["scores"], axes=[2, 3], keepdims=0),
        ],
        [networks.value("images", networks.FLOAT, ["batch", 3, 16, 16])],
        [networks.value("scores", networks.FLOAT, ["batch", 5])],
        [networks.constant("w", weights)],
    )


@pytest.fixture
def in_folder(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The machine that runs the tests may have no GPU; the documentation assumes one.
    monkeypatch.setenv("MLFLOW_PYFUNC_INFERENCE_CONFIG", '{"runtime": "auto"}')
    return tmp_path


def test_the_code_of_the_api_page_runs(in_folder):
    (in_folder / "model.onnx").write_bytes(image_model().SerializeToString())
    names: dict[str, Any] = {}
    (code,) = blocks("docs/api.md", "python")
    exec(code, names)
    assert str(names["accuracy"].verdict) == "passed"
    assert names["times"].measurements[0].latency.p50 > 0
    assert names["version"].tags["mlflow_trt.target"] == "sm86, sm120"


def test_the_code_in_the_readme_runs(in_folder):
    (in_folder / "model.onnx").write_bytes(image_model().SerializeToString())
    names: dict[str, Any] = {"images": np.random.default_rng(1).standard_normal((70, 3, 16, 16)).astype(np.float32)}
    code = blocks("README.md", "python")
    assert len(code) == 2
    for block in code:
        exec(block, names)
    assert names["scores"].shape == (70, 5)
    assert names["model"].get_raw_model().runtime == "onnxruntime"


def test_the_code_in_the_guide_runs(in_folder, capsys):
    (in_folder / "text.onnx").write_bytes(networks.transformer().SerializeToString())
    mlflow.onnx.log_model(networks.transformer(), name="text", registered_model_name="text", pip_requirements=["onnx"])
    mlflow.MlflowClient().set_registered_model_alias("text", "champion", "1")
    names: dict[str, Any] = {"shapes": {"input_ids": ((-1, 4), (-1, 24), (-1, 48))}}
    code = blocks("docs/guide.md", "python")
    assert len(code) == 6
    for block in code:
        exec(block, names)
    assert names["version"].tags["mlflow_trt.source"] == "models:/text/1"
    assert [version.name for version in names["made_of_it"]] == ["text-trt"]
    assert names["source"].name == "text"
    assert "ONNX Runtime" in capsys.readouterr().out


def test_the_code_in_the_page_about_precision_runs(store, in_folder):
    (in_folder / "model.onnx").write_bytes(image_model().SerializeToString())
    np.savez("inputs.npz", images=np.random.default_rng(1).standard_normal((8, 3, 16, 16)).astype(np.float32))
    (code,) = blocks("docs/precision.md", "python")
    exec(code, {})
    (logged,) = store.logged_models()
    assert logged.tags["mlflow_trt.precision"] == "fp16"


def test_the_client_in_the_page_about_deploying_runs(in_folder):
    mlflow_trt.save_model(image_model(), "model", batch=(1, 4, 8), verify=False)
    (code,) = blocks("docs/deploy.md", "python")
    with served("model", mlflow.get_tracking_uri(), {"runtime": "onnxruntime"}) as address:
        names: dict[str, Any] = {"address": address}
        exec(code, names)
    assert names["scores"].shape == (4, 5)


def test_the_page_of_the_command_line_is_up_to_date():
    generator = runpy.run_path(str(ROOT / "docs" / "generate_cli_page.py"))
    assert (ROOT / "docs" / "cli.md").read_text() == generator["page"](), "run `make docs`"


def commands():
    """Every `mlflow-trt ...` in a block of code or between backticks, with a command after it."""
    for page in PAGES:
        for text in re.findall(r"(?:^|`)(mlflow-trt [a-z][^`#\n]*)", page.read_text(), re.MULTILINE):
            yield pytest.param(text.strip(), id=f"{page.name}: {text.strip()[:50]}")


@pytest.mark.parametrize("text", list(commands()))
def test_commands_and_options_exist(text):
    _, name, *arguments = shlex.split(text)
    command = COMMANDS[name]
    if hasattr(command, "commands"):  # a group of commands, such as cache
        command = command.commands[arguments[0]]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("--")} <= options


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_guide_names_every_error():
    text = (ROOT / "docs" / "guide.md").read_text()
    assert {name for name in mlflow_trt.__all__ if name.endswith("Error")} <= set(re.findall(r"`(\w+Error)`", text))


def test_the_table_of_load_settings_is_complete():
    from mlflow_trt import LoadSettings

    text = (ROOT / "README.md").read_text()
    for name, default in LoadSettings().to_dict().items():
        assert re.search(rf"^\| `{name}` \| `{re.escape(str(default))}` \|", text, re.MULTILINE), name
