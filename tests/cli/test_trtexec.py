"""trtexec's options: what each becomes, and what is refused."""

from __future__ import annotations

import re
import runpy
import shlex
from typing import Any

import pytest
import typer
from repository import ROOT

from mlflow_trt import Recipe
from mlflow_trt.cli import app
from mlflow_trt.cli.recipe_options import recipe_from
from mlflow_trt.cli.trtexec import OPTIONS, translate

COMMAND: Any = typer.main.get_command(app)
CONVERT = COMMAND.commands["convert"]


def recipe_of(*arguments: str) -> Recipe:
    return recipe_from(CONVERT.make_context("convert", ["model.onnx", *arguments]).params)


class TestOptions:
    def test_the_defaults_make_the_default_recipe(self):
        assert recipe_of() == Recipe()

    def test_tf32_is_not_asked_for_and_forbidden(self):
        with pytest.raises(typer.BadParameter, match="tf32 and --no-tf32 contradict each other"):
            recipe_of("--precision", "tf32", "--no-tf32")

    @pytest.mark.parametrize(
        ("arguments", "keywords"),
        [
            (["--precision", "tf32"], {"precision": "tf32"}),
            (["--no-tf32"], {"allow_tf32": False}),
            (["--workspace", "1024"], {"workspace_bytes": 1 << 30}),
            (["--mem-pool-size", "workspace:2G"], {"workspace_bytes": 1 << 31}),
            (["--mem-pool-size", "tacticSharedMem:0.5K,tacticDRAM:3"],
             {"memory_pools": {"tactic_shared_memory": 512, "tactic_dram": 3 << 20}}),
            (["--avg-timing", "4"], {"avg_timing_iterations": 4}),
            (["--builder-optimization-level", "5"], {"optimization_level": 5}),
            (["--timing-cache-file", "t.cache"], {"timing_cache": "t.cache"}),
            (["--no-builder-cache"], {"builder_cache": False}),
            (["--tactic-sources", "JIT_CONVOLUTIONS"], {"tactic_sources": ["JIT_CONVOLUTIONS"]}),
            (["--tactic-sources=-jit_convolutions,-CUDNN"], {"tactic_sources": ["EDGE_MASK_CONVOLUTIONS"]}),
            (["--tactic-sources=-JIT_CONVOLUTIONS,-EDGE_MASK_CONVOLUTIONS"], {"tactic_sources": []}),
            (["--sparsity", "enable"], {"sparsity": True}),
            (["--sparsity", "disable"], {}),
            (["--version-compatible"], {"version_compatible": True}),
            (["--hardware-compatibility-level", "ampere+"], {"hardware_compatibility": "ampere_plus"}),
            (["--hardware-compatibility-level", "sameComputeCapability"],
             {"hardware_compatibility": "same_compute_capability"}),
            (["--refit"], {"weights": "refittable"}),
            (["--strip-weights"], {"weights": "stripped"}),
            (["--weight-streaming"], {"weight_streaming": True}),
            (["--profiling-verbosity", "detailed"], {"profiling_verbosity": "detailed"}),
            (["--target", "sm86", "--target", "sm120"], {"targets": ["sm86", "sm120"]}),
            (["--min-shapes", "x:1x3", "--opt-shapes", "x:2x3", "--max-shapes", "x:4x3",
              "--min-shapes", "x:5x3", "--opt-shapes", "x:6x3", "--max-shapes", "x:8x3"],
             {"shapes": [{"x": ((1, 3), (2, 3), (4, 3))}, {"x": ((5, 3), (6, 3), (8, 3))}]}),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )  # fmt: skip
    def test_each_reaches_the_recipe(self, arguments, keywords):
        assert recipe_of(*arguments) == Recipe(**keywords)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--fp16", "--int8"], "fp16 and int8: a graph has one precision since TensorRT 11"),
            (["--precision", "fp8", "--best"], "fp8 and best: a graph has one precision"),
            (["--mem-pool-size", "dlaSRAM:1"], "there is no pool 'dlaSRAM' \\(no DLA is supported\\)"),
            (["--mem-pool-size", "workspace"], "expected pool:size, like workspace:2G"),
            (["--workspace", "0"], "--workspace: expected more than 0"),
            (["--workspace", "nan"], "--workspace: expected more than 0"),
            (["--workspace", "1e400"], "--workspace: expected more than 0"),
            (["--mem-pool-size", "workspace:1.2.3"], "expected pool:size, like workspace:2G"),
            (["--mem-pool-size", f"workspace:{'9' * 400}"], "expected pool:size, like workspace:2G"),
            (["--mem-pool-size", "workspace:."], "expected pool:size, like workspace:2G"),
            (["--tactic-sources", "+CUDNN"], "TensorRT 11 removed CUDNN; it has EDGE_MASK_CONVOLUTIONS"),
            (["--tactic-sources", "+JIT_CONVOLUTIONS,EDGE_MASK_CONVOLUTIONS"], "give either a list, or"),
            (["--sparsity", "force"], "would overwrite the model's weights"),
            (["--sparsity", "some"], "expected enable or disable"),
            (["--min-shapes", "x:1"], "--min-shapes is given 1 times, --opt-shapes 0"),
        ],
    )
    def test_what_makes_no_sense(self, arguments, message):
        with pytest.raises(typer.BadParameter, match=message):
            recipe_of(*arguments)


class TestLines:
    @pytest.mark.parametrize(
        ("line", "command"),
        [
            ("trtexec --onnx=a.onnx", "--onnx a.onnx --precision tf32"),
            ("/usr/src/tensorrt/bin/trtexec --onnx=a.onnx --noTF32 --saveEngine=a.plan",
             "--onnx a.onnx --no-tf32 --save-engine a.plan"),
            ("--onnx=a.onnx --fp16 --buildOnly --verbose", "--onnx a.onnx --fp16 --build-only"),
            ("trtexec --onnx=a.onnx --best --optShapes=x:8x3",
             "--onnx a.onnx --best --min-shapes x:8x3 --opt-shapes x:8x3 --max-shapes x:8x3"),
            ("trtexec --onnx=a.onnx --int8 --minShapes=x:1x3 --optShapes=x:8x3 --maxShapes=x:9x3 --shapes=x:4x3",
             "--onnx a.onnx --int8 --min-shapes x:1x3 --opt-shapes x:8x3 --max-shapes x:9x3"),
            ("trtexec --onnx=a.onnx --fp16 --shapes=x:4x3",
             "--onnx a.onnx --fp16 --min-shapes x:4x3 --opt-shapes x:4x3 --max-shapes x:4x3"),
            ("trtexec --onnx=a.onnx --fp16 --profile=0 --minShapes=x:1 --optShapes=x:2 --maxShapes=x:3 "
             "--profile=1 --minShapes=x:4 --optShapes=x:5 --maxShapes=x:6",
             "--onnx a.onnx --fp16 --min-shapes x:1 --opt-shapes x:2 --max-shapes x:3 "
             "--min-shapes x:4 --opt-shapes x:5 --max-shapes x:6"),
            ("trtexec --onnx='my model.onnx' --fp16 --memPoolSize=workspace:1024",
             "--onnx 'my model.onnx' --fp16 --mem-pool-size workspace:1024"),
        ],
    )  # fmt: skip
    def test_become_a_line_of_ours(self, line, command):
        assert translate(line).command == f"mlflow-trt convert {command}"
        taken, given = (
            {**CONVERT.make_context("convert", arguments).params, "from_trtexec": ""}
            for arguments in (["--from-trtexec", line], shlex.split(command))
        )
        assert taken == given

    def test_what_is_given_beside_a_line_comes_first(self):
        arguments = ["--from-trtexec", "trtexec --onnx=a.onnx --avgTiming=4 --refit", "--avg-timing", "8"]
        assert recipe_from(CONVERT.make_context("convert", arguments).params) == Recipe(
            precision="tf32", avg_timing_iterations=8, weights="refittable"
        )

    def test_what_is_left_out_is_said(self):
        remarks = translate("trtexec --onnx=a --minTiming=2 --useCudaGraph --warmUp=100").remarks
        assert remarks == [
            "--minTiming is left out: TensorRT removed it; --avg-timing is what is left",
            "--useCudaGraph is left out: it is about running the engine; see mlflow-trt benchmark",
            "--warmUp is left out: it is about running the engine; see mlflow-trt benchmark",
        ]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("trtexec --onnx=a --calib=a.cache", "TensorRT 11 removed calibration caches"),
            ("trtexec --onnx=a --useDLACore=0", "DLA is not supported"),
            ("trtexec --onnx=a --maxTiming=3", "--maxTiming has no counterpart: mlflow-trt does not know it"),
            ("trtexec --onnx", "--onnx wants a value: --onnx=..."),
            ("trtexec a.onnx", "a.onnx has no counterpart"),
            ("trtexec --onnx='a.onnx", "cannot be read: No closing quotation"),
            ("trtexec --onnx=a --profile=4294967296", "--profile=4294967296: expected a number below 256"),
            (f"trtexec --onnx=a --profile={'9' * 5000}", "expected a number below 256"),
            ("trtexec --onnx=a --profile=-1", "expected a number below 256"),
        ],
    )
    def test_what_has_no_counterpart_is_refused(self, line, message):
        with pytest.raises(typer.BadParameter, match=re.escape(message)):
            translate(line)


class TestDocumentation:
    def test_every_option_of_the_table_exists(self):
        ours = {name for parameter in CONVERT.params for name in parameter.opts}
        for option in OPTIONS:
            assert option.becomes in ours | {"dropped", "refused", "benchmark"}, option.name
            assert option.word or option.becomes not in ("dropped", "refused"), option.name

    def test_the_options_of_the_page_are_those_of_the_command(self):
        text = (ROOT / "docs" / "trtexec.md").read_text()
        rows = re.findall(r"^\| `(--\w+)(?:=\.\.\.)?` \| (?:`(--[\w-]+)`|dropped|refused) \|", text, re.MULTILINE)
        assert len(rows) == sum(option.becomes != "benchmark" for option in OPTIONS)
        ours = {name for parameter in CONVERT.params for name in parameter.opts}
        assert {becomes for _, becomes in rows if becomes} <= ours

    def test_the_page_is_up_to_date(self):
        generator = runpy.run_path(str(ROOT / "docs" / "generate_cli_page.py"))
        assert (ROOT / "docs" / "trtexec.md").read_text() == generator["trtexec_page"](), "run `make docs`"

    @pytest.mark.parametrize(
        "option",
        ["--onnx", "--save-engine", "--build-only", "--min-shapes", "--opt-shapes", "--max-shapes", "--workspace",
         "--mem-pool-size", "--avg-timing", "--builder-optimization-level", "--timing-cache-file",
         "--no-builder-cache", "--tactic-sources", "--no-tf32", "--sparsity", "--version-compatible",
         "--hardware-compatibility-level", "--strip-weights", "--refit", "--weight-streaming", "--profiling-verbosity",
         "--fp16", "--int8", "--best"],
    )  # fmt: skip
    def test_what_users_of_trtexec_look_for_is_there(self, option):
        assert option in {name for parameter in CONVERT.params for name in parameter.opts}
        assert option in {row.becomes for row in OPTIONS}
