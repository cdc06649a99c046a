"""Commands for NVIDIA's own tools."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import networks
import pytest
from command_line import run

import mlflow_trt
from mlflow_trt.core.types import Distribution
from mlflow_trt.deploy.run_elsewhere import commands_for
from mlflow_trt.flavor.fetch import read_record


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "text model"
    shapes = {"input_ids": ((-1, 4), (-1, 8), (-1, 16))}
    mlflow_trt.save_model(networks.transformer(), path, batch=(1, 2, 4), shapes=shapes, verify=False)
    return path


def test_each_tool_gets_the_plan_and_the_usual_shapes(folder):
    record = read_record(str(folder))
    (engine,) = record.engines
    trtexec, polygraphy, nsight = commands_for(record, engine, "a b.plan")
    assert shlex.split(trtexec.command) == [
        "tensorrt_rtx", "--loadEngine=a b.plan", "--shapes=input_ids:2x8,attention_mask:2x8"
    ]  # fmt: skip
    assert shlex.split(polygraphy.command) == [
        "POLYGRAPHY_USE_TENSORRT_RTX=1", "polygraphy", "run", "a b.plan", "--model-type=engine", "--trt",
        "--input-shapes", "input_ids:[2,8]", "attention_mask:[2,8]",
    ]  # fmt: skip
    assert nsight.command.endswith(trtexec.command)


def test_tensorrt_has_trtexec_and_polygraphy_as_they_are(folder):
    record = read_record(str(folder))
    engine = replace(record.engines[0], distribution=Distribution.TENSORRT)
    trtexec, polygraphy, _ = commands_for(replace(record, profiles=()), engine, "e.plan")
    assert trtexec.command == "trtexec --loadEngine=e.plan"
    assert polygraphy.command == "polygraphy run e.plan --model-type=engine --trt"


def test_the_command_names_files_that_are_there(folder):
    code, output, errors = run("inspect", folder, "--commands", "--json")
    assert code == 0, errors
    ((_, commands),) = json.loads(output).items()
    plan = shlex.split(commands["tensorrt_rtx"])[1].removeprefix("--loadEngine=")
    assert Path(plan).is_file()
    code, output, _ = run("inspect", folder, "--commands")
    assert "polygraphy run" in output
