"""The build process: what it builds, how it fails, how it is interrupted."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import networks
import numpy as np
import pytest
import tensorrt_rtx
from helpers import PATIENCE, convert_in, needs_release, read, wait_for
from onnx import TensorProto, helper
from processes import children_of, is_running
from real_models import MAGIKA

from mlflow_trt import (
    BuildError,
    MissingDependencyError,
    OptionError,
    Recipe,
    RecipeError,
    RuntimeUnavailableError,
    UnsupportedModelError,
)
from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.backends.cuda_driver import Hardware
from mlflow_trt.convert import checks as limits
from mlflow_trt.convert.engine import builder
from mlflow_trt.convert.engine import worker as build_worker
from mlflow_trt.convert.engine.builder import build_engine
from mlflow_trt.convert.engine.timing_cache import TimingCacheFile
from mlflow_trt.convert.engine.worker import Job, _configure
from mlflow_trt.convert.onnx.model import read_onnx, sha256_of
from mlflow_trt.core.types import Distribution, HardwareCompatibility, Interface, ProfilingVerbosity


def build(model, folder, progress=None, **recipe):
    return convert_in(folder, read(model, folder), Recipe(**recipe), progress=progress)


def test_a_plan_is_raw_and_names_its_version(tmp_path):
    conversion = build(networks.product(), tmp_path)
    plan = conversion.plan.read_bytes()
    assert plan[:4] == b"vtrt"
    version = tuple(map(int, conversion.engine.version.split(".")))
    assert tuple(plan[24:27]) == version[:3]
    assert conversion.engine.compute_capabilities == ()
    assert conversion.engine.target == "sm80plus"


def test_builds_for_targets(tmp_path):
    engine = build(networks.product(), tmp_path, targets=["sm86", "sm120"]).engine
    assert engine.compute_capabilities == ("sm86", "sm120")
    assert engine.target == "sm86-sm120"


JOB = Job(
    model="",
    plan="",
    distribution="tensorrt_rtx",
    tf32=False,
    profiles=[],
    workspace_bytes=None,
    optimization_level=None,
    avg_timing_iterations=None,
    timing_cache=None,
    builder_cache=True,
    memory_pools={},
    sparsity=False,
    weights="included",
    weight_streaming=False,
    profiling_verbosity="layer_names_only",
    tactic_sources=None,
    version_compatible=False,
    hardware_compatibility="none",
    plugins=[],
    targets=[],
    inputs=[],
    outputs=[],
)


class TestOptions:
    """What the options make of TensorRT's own builder configuration."""

    @pytest.fixture
    def configured(self):
        tensorrt = trt.load()
        builder = tensorrt.builder()

        def configure(**options):
            config = builder.create_builder_config()
            _configure(tensorrt, config, replace(JOB, **options))
            return config

        return configure

    def test_defaults_are_tensorrts_but_for_tf32(self, configured):
        flags = trt.load().builder_flag
        config, default = configured(), cast(Any, trt.load().builder().create_builder_config())
        assert default.get_flag(flags.TF32)
        assert not config.get_flag(flags.TF32)
        assert config.flags == default.flags & ~(1 << int(flags.TF32))
        for name in (
            "builder_optimization_level",
            "profiling_verbosity",
            "avg_timing_iterations",
            "num_compute_capabilities",
        ):
            assert getattr(config, name) == getattr(default, name)
        assert config.get_tactic_sources() == default.get_tactic_sources()

    def test_each_option_is_set(self, configured):
        tensorrt = trt.load()
        config = configured(
            tf32=True,
            workspace_bytes=1 << 26,
            optimization_level=1,
            avg_timing_iterations=2,
            tactic_sources=["JIT_CONVOLUTIONS"],
            version_compatible=True,
            hardware_compatibility="ampere_plus",
            targets=["sm86", "sm120"],
            builder_cache=False,
            memory_pools={"tactic_dram": 1 << 28},
            sparsity=True,
            weights="stripped",
            weight_streaming=True,
            profiling_verbosity="detailed",
        )
        for flag in ("DISABLE_TIMING_CACHE", "SPARSE_WEIGHTS", "STRIP_PLAN", "WEIGHT_STREAMING"):
            assert config.get_flag(getattr(tensorrt.builder_flag, flag)), flag
        assert configured(weights="refittable").get_flag(tensorrt.builder_flag.REFIT)
        assert config.get_memory_pool_limit(tensorrt.memory_pool("tactic_dram")) == 1 << 28
        assert config.profiling_verbosity == tensorrt.profiling_verbosity(ProfilingVerbosity.DETAILED)
        assert config.get_flag(tensorrt.builder_flag.TF32)
        assert config.get_flag(tensorrt.builder_flag.VERSION_COMPATIBLE)
        assert config.get_memory_pool_limit(tensorrt.memory_pool("workspace")) == 1 << 26
        assert config.builder_optimization_level == 1
        assert config.avg_timing_iterations == 2
        assert config.get_tactic_sources() == tensorrt.tactic_sources(["JIT_CONVOLUTIONS"]) != 0
        # TensorRT-RTX accepts the level and ignores it.
        assert tensorrt.hardware_compatibility(HardwareCompatibility.AMPERE_PLUS).name == "AMPERE_PLUS"
        assert config.num_compute_capabilities == 2

    def test_the_recipe_becomes_the_job(self, tmp_path):
        recipe = Recipe(
            precision="tf32", workspace_bytes=7, optimization_level=1, avg_timing_iterations=2, timing_cache="t",
            tactic_sources=["JIT_CONVOLUTIONS"], version_compatible=True, hardware_compatibility="ampere_plus",
            targets=["sm86"], builder_cache=True, memory_pools={"tactic_dram": 8}, sparsity=True, weights="stripped",
            profiling_verbosity="none",
        )  # fmt: skip
        job = builder._job(tmp_path / "m", tmp_path / "p", recipe, [], Interface((), ()), Distribution.TENSORRT)
        assert job == replace(
            JOB, model=str(tmp_path / "m"), plan=str(tmp_path / "p"), distribution="tensorrt", tf32=True,
            workspace_bytes=7, optimization_level=1, avg_timing_iterations=2, timing_cache="t",
            tactic_sources=["JIT_CONVOLUTIONS"], version_compatible=True, hardware_compatibility="ampere_plus",
            targets=["sm86"], memory_pools={"tactic_dram": 8}, sparsity=True, weights="stripped",
            profiling_verbosity="none",
        )  # fmt: skip
        assert not builder._job(tmp_path, tmp_path, Recipe(), [], Interface((), ()), Distribution.TENSORRT).tf32

    @pytest.mark.parametrize(
        "options",
        [
            {"sparsity": True},
            {"weight_streaming": True},
            {"profiling_verbosity": "detailed"},
            {"builder_cache": False},
            {"memory_pools": {"tactic_dram": 1 << 30, "tactic_shared_memory": 1 << 16}},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_tensorrt_rtx_builds_with_each(self, options, tmp_path):
        assert build(networks.product(), tmp_path, batch=(1, 4, 8), **options).engine.size > 0

    @pytest.mark.parametrize("weights", ["stripped", "refittable"])
    def test_without_a_gpu_tensorrt_rtx_cannot_leave_weights_out(self, weights, tmp_path, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        with pytest.raises(RecipeError, match=f"builds {weights} engines only where there is a GPU") as caught:
            build(networks.product(), tmp_path, batch=(1, 4, 8), weights=weights)
        assert caught.value.option == "weights"


@pytest.mark.parametrize(
    ("recipe", "rows"),
    [
        ({"batch": (1, 4, 8)}, -1),
        ({"batch": 4}, 4),
        ({"shapes": [{"x": ((4, 16),) * 3}, {"x": ((8, 16),) * 3}]}, -1),
        ({"shapes": [{"x": ((8, 16),) * 3}, {"x": ((8, 16),) * 3}]}, 8),
    ],
)
def test_the_shapes_of_the_network_are_told(recipe, rows, tmp_path):
    assert build(networks.product(), tmp_path, **recipe).shapes == {"x": (rows, 16), "y": (rows, 8)}


def test_a_static_dimension_makes_another_engine(tmp_path):
    (tmp_path / "a").mkdir()
    static = build(MAGIKA, tmp_path / "a", batch=8)
    (tmp_path / "b").mkdir()
    dynamic = build(MAGIKA, tmp_path / "b", batch=(1, 8, 8))
    assert static.engine.size < dynamic.engine.size


@pytest.mark.slow
def test_reports_progress(tmp_path):
    seen = []
    build(MAGIKA, tmp_path, progress=seen.append, **MAGIKA.recipe)
    assert all(0 <= event.fraction <= 1 and event.phase for event in seen)
    assert seen[-1].fraction > seen[0].fraction


def test_builds_from_external_data(tmp_path):
    (tmp_path / "net").mkdir()
    networks.external(tmp_path / "net" / "net.onnx")
    path = tmp_path / "net" / "net.onnx"
    conversion = convert_in(tmp_path, read_onnx(path, tmp_path))
    assert conversion.engine.size > 0


needs_attention = pytest.mark.skipif(
    not hasattr(tensorrt_rtx, "IAttentionBoundaryLayer"), reason="needs a later TensorRT-RTX"
)


@needs_attention
@pytest.mark.parametrize("heads", [{"q_num_heads": 4, "kv_num_heads": 4}, {"q_num_heads": 4, "kv_num_heads": 2}])
def test_attention_is_built_of_parts_where_there_is_no_fused_kernel(heads, tmp_path):
    shapes = {"q": 32, "k": 8 * heads["kv_num_heads"], "v": 8 * heads["kv_num_heads"]}
    model = networks.model(
        [helper.make_node("Attention", ["q", "k", "v"], ["y"], **heads)],
        [networks.value(name, networks.FLOAT, ["batch", 16, width]) for name, width in shapes.items()],
        [networks.value("y", networks.FLOAT, ["batch", 16, 32])],
    )
    model.opset_import[0].version = 23
    conversion = build(model, tmp_path, batch=(1, 2, 4))
    assert tuple(conversion.shapes["y"]) == (-1, 16, 32)


class TestFailures:
    def test_a_node_that_the_parser_refuses_is_named(self, tmp_path):
        model = networks.model(
            [helper.make_node("NonZero", ["x"], ["y"], name="where_set")],
            [networks.value("x", networks.FLOAT, ["rows", 16])],
            [networks.value("y", networks.INT64, [2, "count"])],
        )
        with pytest.raises(UnsupportedModelError, match=r"cannot run 1 node\(s\), where_set \(NonZero\): ") as caught:
            build(model, tmp_path, shapes={"x": ((1, 16), (4, 16), (8, 16))})
        assert caught.value.nodes == ("where_set (NonZero)",)
        assert caught.value.get_http_status_code() == 400

    @pytest.mark.parametrize("operator", ["QLinearMatMul", "MatMulInteger"])
    def test_what_was_quantized_for_cpus_is_called_that(self, operator, tmp_path):
        scales = [networks.constant("scale", np.float32(0.1)), networks.constant("zero", np.int8(0))]
        weights = networks.constant("w", np.eye(16, dtype=np.int8))
        scaled = ["q", "scale", "zero", "w", "scale", "zero", "scale", "zero"]
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node(operator, scaled if operator == "QLinearMatMul" else ["q", "w"], ["p"], name="product"),
            helper.make_node("Cast", ["p"], ["y"], to=networks.FLOAT),
        ]
        x, y = (networks.value(name, networks.FLOAT, [4, 16]) for name in "xy")
        with pytest.raises(UnsupportedModelError, match=r"product .* convert the float model") as caught:
            build(networks.model(nodes, [x], [y], [*scales, weights]), tmp_path)
        assert caught.value.nodes == (f"product ({operator})",)

    @needs_attention
    def test_a_reason_of_the_parser_is_one_line_without_the_missing_gpu(self, tmp_path, monkeypatch):
        """It quotes what was logged meanwhile, in lines of their own."""
        monkeypatch.setattr(builder, "probe", lambda: Hardware(problem="no NVIDIA driver"))
        shape = ["batch", 2, 8, 16]
        tensors = [networks.value(name, networks.FLOAT, shape) for name in ("q", "k", "v")]
        attention = helper.make_node("Attention", ["q", "k", "v", "mask"], ["y"], name="attend", is_causal=1)
        model = networks.model(
            [attention], [*tensors, networks.value("mask", networks.FLOAT, [8, 8])],
            [networks.value("y", networks.FLOAT, shape)],
        )  # fmt: skip
        model.opset_import[0].version = 23
        with pytest.raises(UnsupportedModelError, match=r"attend \(Attention\): .*setMask") as caught:
            build(model, tmp_path)
        assert "\n" not in caught.value.message
        assert "CUDA driver" not in caught.value.message

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    @pytest.mark.parametrize("name", ["suppress", ""], ids=["by its name", "without one"])
    def test_a_node_without_a_kernel_is_named(self, name, precision, tmp_path):
        model = networks.model(
            [
                helper.make_node("Relu", ["boxes"], ["positive"], name="sup"),  # the layer's name begins with it, too
                helper.make_node("NonMaxSuppression", ["positive", "scores", "most"], ["y"], name=name),
            ],
            [
                networks.value("boxes", networks.FLOAT, [1, 8, 4]),
                networks.value("scores", networks.FLOAT, [1, 2, 8]),
            ],
            [networks.value("y", networks.INT64, ["found", 3])],
            [networks.constant("most", np.array([3]))],
        )
        with pytest.raises(
            UnsupportedModelError, match=rf"no kernel for {name or 'unnamed'} \(NonMaxSuppression\); export"
        ) as caught:
            build(model, tmp_path, precision=precision)
        assert caught.value.nodes == (f"{name or 'unnamed'} (NonMaxSuppression)",)

    @pytest.mark.parametrize(("driver", "is_told"), [(None, False), ("13.0", True)])
    def test_that_there_is_no_gpu_is_told_where_there_is_one(self, driver, is_told, monkeypatch):
        """TensorRT-RTX complains of it after whatever went wrong, also where it needs none."""
        reason = "[tacticSupply.cpp] Error Code 2: nms_0 has no runners that implement it"
        noise = "[checkMacros.cpp] Error Code 1: (cudaError 35: CUDA driver version is insufficient for CUDA runtime)"
        monkeypatch.setattr(builder, "probe", lambda: Hardware(problem="no NVIDIA driver", driver=driver))
        outcome = {"event": "failed", "kind": "build", "message": "TensorRT built no engine", "log": [reason, noise]}
        with pytest.raises(BuildError) as caught:
            builder._raise(trt.load(), outcome, [noise])
        assert (noise in caught.value.log, noise in caught.value.message) == (is_told, is_told)
        assert (reason in caught.value.message) != is_told
        assert reason in caught.value.log

    def test_a_custom_operator_is_called_that(self, tmp_path):
        model = networks.model(
            [helper.make_node("Frobnicate", ["x"], ["y"], name="twist", domain="acme")],
            [networks.value("x", networks.FLOAT, [2, 8])],
            [networks.value("y", networks.FLOAT, [2, 8])],
        )
        model.opset_import.append(helper.make_opsetid("acme", 1))
        with pytest.raises(UnsupportedModelError, match=r"twist \(Frobnicate\).* custom operators") as caught:
            build(model, tmp_path)
        assert caught.value.nodes == ("twist (Frobnicate)",)

    def test_what_onnxruntime_optimized_is_to_be_converted_from_before(self, tmp_path):
        model = networks.product()
        model.graph.node[0].op_type, model.graph.node[0].domain = "FusedMatMul", "com.microsoft"
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        with pytest.raises(UnsupportedModelError, match=r"product \(FusedMatMul\).*before ONNX Runtime optimized it"):
            build(model, tmp_path, batch=(1, 4, 8))

    @pytest.mark.parametrize("operator", ["DFT", "BitShift"])
    def test_an_operator_of_onnx_is_no_custom_operator(self, operator, tmp_path):
        """Of DFT, TensorRT says that there is no such plugin, and of BitShift nothing."""
        if operator == "DFT":
            kind, shape, inputs, attributes = networks.FLOAT, [2, 8, 1], ["x", "", "axis"], {}
            outputs, constants = [2, 8, 2], [networks.constant("axis", np.int64(1))]
        else:
            kind, shape, inputs, attributes = TensorProto.UINT8, [2, 8], ["x", "one"], {"direction": "LEFT"}
            outputs, constants = shape, [networks.constant("one", np.uint8(1))]
        model = networks.model(
            [helper.make_node(operator, inputs, ["y"], name="shift", **attributes)],
            [networks.value("x", kind, shape)],
            [networks.value("y", kind, outputs)],
            constants,
        )
        model.opset_import[0].version = 20
        with pytest.raises(
            UnsupportedModelError, match=rf"shift \({operator}\).*other operators.*mlflow\.onnx"
        ) as caught:
            build(model, tmp_path)
        assert "plugins=" not in caught.value.message
        assert (f"TensorRT has no {operator}" in caught.value.message) is (operator == "DFT")

    def test_a_node_that_the_parser_takes_and_ignores_is_named(self, tmp_path):
        shape = ["batch", 2, 8, 16]
        tensors = [networks.value(name, networks.FLOAT, shape) for name in ("q", "k", "v")]
        inputs = ["q", "k", "v", "", "", "", "lengths"]
        attention = helper.make_node("Attention", inputs, ["y"], name="decode", is_causal=1)
        model = networks.model(
            [attention],
            [*tensors, networks.value("lengths", networks.INT64, ["batch"])],
            [networks.value("y", networks.FLOAT, shape)],
        )
        model.opset_import[0].version = 24
        with pytest.raises(
            UnsupportedModelError, match=r"ignores nonpad_kv_seqlen, .* at decode \(Attention\)"
        ) as caught:
            build(model, tmp_path)
        assert caught.value.nodes == ("decode (Attention)",)
        del model.graph.node[0].input[3:]
        del model.graph.input[3]
        limits.check_nodes(model)
        # Without a fused kernel for these sizes, which nothing is built with unless it may be several kernels.
        assert build(model, tmp_path, batch=(1, 2, 4)).shapes["y"] == (-1, 2, 8, 16)

    @pytest.mark.parametrize(("operator", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
    def test_batches_before_the_sequence_are_refused(self, operator, gates, tmp_path):
        def recurrent(**layout):
            return networks.model(
                [helper.make_node(operator, ["x", "w", "r"], ["y"], name="recur", hidden_size=5, **layout)],
                [networks.value("x", networks.FLOAT, [3, 2, 4])],
                [networks.value("y", networks.FLOAT, [None, None, None, 5])],
                [
                    networks.constant("w", np.ones((1, gates * 5, 4), np.float32)),
                    networks.constant("r", np.ones((1, gates * 5, 5), np.float32)),
                ],
            )

        with pytest.raises(UnsupportedModelError, match=rf"ignores layout=1, .* at recur \({operator}\).*layout=0"):
            build(recurrent(layout=1), tmp_path)
        for layout in ({}, {"layout": 0}):
            assert build(recurrent(**layout), tmp_path).shapes == {"x": (3, 2, 4), "y": (3, 1, 2, 5)}

    @needs_release("onnx", "1.23")
    def test_the_other_order_of_space_to_depth_is_refused(self, tmp_path):
        def to_depth(opset, **mode):
            model = networks.model(
                [helper.make_node("SpaceToDepth", ["x"], ["y"], name="fold", blocksize=2, **mode)],
                [networks.value("x", networks.FLOAT, [1, 3, 4, 6])],
                [networks.value("y", networks.FLOAT, [1, 12, 2, 3])],
            )
            model.opset_import[0].version = opset
            return model

        with pytest.raises(
            UnsupportedModelError, match=r"ignores mode=CRD, at fold \(SpaceToDepth\).*Reshape"
        ) as caught:
            build(to_depth(28, mode="CRD"), tmp_path)
        assert caught.value.nodes == ("fold (SpaceToDepth)",)
        assert build(to_depth(28, mode="DCR"), tmp_path).engine.size > 0
        assert build(to_depth(17), tmp_path).engine.size > 0

    def test_a_cache_that_is_updated_in_place_is_refused(self, tmp_path):
        names, shape = ("past", "new", "present"), ([2, 8, 4], [2, 1, 4], [2, 8, 4])
        past, new, present = (networks.value(n, networks.FLOAT, s) for n, s in zip(names, shape, strict=True))
        scatter = helper.make_node("TensorScatter", ["past", "new"], ["present"], name="append", axis=1)
        model = networks.model([scatter], [past, new], [present])
        model.opset_import[0].version = 24
        with pytest.raises(UnsupportedModelError, match=r"the cache of append \(TensorScatter\).*without a cache"):
            build(model, tmp_path)

    def test_means_that_a_model_brings_in_16_bits_are_named(self, tmp_path):
        model = networks.model(
            [
                helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
                helper.make_node("Mean", ["half", "half"], ["mean"], name="middle"),
                helper.make_node("Cast", ["mean"], ["y"], to=networks.FLOAT),
            ],
            [networks.value("x", networks.FLOAT, ["batch", 4])],
            [networks.value("y", networks.FLOAT, ["batch", 4])],
        )
        with pytest.raises(UnsupportedModelError, match=r"misreads a constant of means .* middle \(Mean\)"):
            build(model, tmp_path)
        assert build(networks.mean(2), tmp_path).engine.size > 0

    def test_what_the_libraries_print_is_in_the_error_and_not_on_the_terminal(self, tmp_path, capfd):
        with pytest.raises(UnsupportedModelError, match="INT16"):
            build(networks.through_int16(), tmp_path, precision="tf32")
        captured = capfd.readouterr()
        assert captured.out == captured.err == ""

    def test_the_last_error_of_the_log_is_quoted(self, tmp_path):
        model = networks.model(
            [helper.make_node("Concat", ["a", "b"], ["y"], axis=0)],
            [networks.value("a", networks.FLOAT, ["n", 4]), networks.value("b", networks.FLOAT, ["n", 5])],
            [networks.value("y", networks.FLOAT, ["m", None])],
        )
        with pytest.raises(BuildError, match="TensorRT-RTX .* (built no engine|cannot run)") as caught:
            build(model, tmp_path, batch=2)
        assert caught.value.log

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            ({"x": ((1, 16), (4, 16), (8, 16))}, "input 'shape' is a shape tensor.*Give its smallest"),
            ({"x": ((1, 16), (4, 16), (8, 16)), "shape": ((0, 0), (8, 8), (-1, -1))}, "expected min <= opt <= max"),
        ],
    )
    def test_shape_tensors_need_values(self, shapes, message, tmp_path):
        with pytest.raises(RecipeError, match=message):
            build(networks.reshaped(), tmp_path, shapes=shapes)

    def test_other_inputs_need_none(self, tmp_path):
        model = networks.model(
            [helper.make_node("Add", ["k", "k"], ["y"])],
            [networks.value("k", networks.INT64, [2])],
            [networks.value("y", networks.INT64, [2])],
        )
        with pytest.raises(RecipeError, match="refuses the shapes of input 'k': no shape is computed from its values"):
            build(model, tmp_path, shapes={"k": ((1, 1), (2, 2), (3, 3))})

    @pytest.mark.parametrize(
        ("recipe", "message"),
        [
            ({"targets": ["sm70"]}, "cannot build for sm70; its targets are sm75, sm80"),
            ({"hardware_compatibility": "ampere_plus"}, "no hardware compatibility levels"),
            ({"version_compatible": True}, "no version-compatible engines"),
        ],
    )
    def test_what_tensorrt_rtx_does_not_have(self, recipe, message, tmp_path):
        with pytest.raises(RecipeError, match=message):
            build(networks.product(), tmp_path, **recipe)

    def test_a_timing_cache_is_left_alone_by_tensorrt_rtx(self, tmp_path, messages):
        limits._log_once.cache_clear()
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            build(networks.product(), tmp_path / folder, timing_cache=str(tmp_path / "timing.cache"))
        assert messages.text.count("TensorRT-RTX has no timing cache") == 1
        assert not (tmp_path / "timing.cache").exists()

    def test_a_process_that_dies_is_an_error(self, tmp_path, monkeypatch):
        monkeypatch.setattr(builder, "_WORKER", "import os; print('last words', file=os.sys.stderr); os.abort()")
        with pytest.raises(
            BuildError, match=r"by SIGABRT without building an engine. Try .*mlflow.onnx.* Its last words: last words"
        ):
            build(networks.product(), tmp_path)

    def test_a_process_that_never_starts_is_an_error(self, tmp_path, monkeypatch):
        monkeypatch.setattr(builder, "_WORKER", "import no_such_module")
        with pytest.raises(BuildError, match="no_such_module"):
            build(networks.product(), tmp_path)

    def test_whatever_is_printed_when_python_starts_does_no_harm(self, tmp_path, monkeypatch):
        monkeypatch.setattr(builder, "_WORKER", "print('hello', flush=True)\n" + builder._WORKER)
        assert build(networks.product(), tmp_path).engine.size > 0

    def test_files_in_the_current_folder_are_not_imported(self, tmp_path, monkeypatch):
        for name in ("json", "onnx", "tensorrt_rtx"):
            (tmp_path / f"{name}.py").write_text("raise SystemExit('this file was executed')")
        (tmp_path / "tensorrt").mkdir()
        monkeypatch.chdir(tmp_path)
        assert build(networks.product(), tmp_path).engine.size > 0

    def test_a_folder_that_is_called_tensorrt_is_no_tensorrt(self, tmp_path, monkeypatch):
        (tmp_path / "tensorrt").mkdir()
        monkeypatch.syspath_prepend(tmp_path)
        assert trt.installed() == (Distribution.TENSORRT_RTX,)

    def test_a_tensorrt_that_cannot_be_imported(self, tmp_path, monkeypatch):
        (tmp_path / "tensorrt.py").write_text("raise AttributeError('half installed')")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(RuntimeUnavailableError, match=r"half installed.*MLFLOW_TRT_DISTRIBUTION=tensorrt_rtx"):
            trt.load()

    def test_any_failure_in_the_process_is_told_with_its_kind(self, tmp_path):
        source = read(networks.product(batch=2), tmp_path)
        names = {"inputs": [["x", "float32"]], "outputs": [["y", "float32"]]}
        job = replace(JOB, model=str(source.path), plan="/proc/no/engine.plan", **names)
        with builder._worker(job, None) as worker:
            outcome = builder._follow(worker, None)
        assert outcome["event"] == "failed"
        assert "FileNotFoundError" in outcome["message"]

    @pytest.mark.parametrize(
        ("inputs", "outputs", "said"),
        [
            ([["__x", "float32"]], [["y", "float32"]], "inputs x: float32, and the model __x: float32"),
            ([["x", "float32"]], [["y", "float16"]], "outputs y: float32, and the model y: float16"),
        ],
    )
    def test_a_network_of_other_inputs_or_outputs_is_refused(self, inputs, outputs, said, tmp_path):
        source = read(networks.product(batch=2), tmp_path)
        job = replace(JOB, model=str(source.path), plan=str(tmp_path / "p"), inputs=inputs, outputs=outputs)
        with builder._worker(job, None) as worker:
            outcome = builder._follow(worker, None)
        assert outcome["kind"] == "interface"
        with pytest.raises(UnsupportedModelError, match=said):
            builder._raise(trt.load(), outcome, [])
        assert not (tmp_path / "p").exists()

    def test_the_tensorrt_distribution_needs_a_gpu_to_build(self, monkeypatch):
        """TensorRT-RTX's module stands in: what is looked at ends before the two differ."""
        monkeypatch.setattr(build_worker, "probe", lambda: Hardware(problem="no NVIDIA driver"))
        stand_in = trt.TensorRT(Distribution.TENSORRT, trt.load()._module)
        with pytest.raises(build_worker.BuildFailure) as caught:
            build_worker.build(stand_in, JOB, None)
        assert caught.value.event["kind"] == "no_gpu"
        with pytest.raises(RuntimeUnavailableError, match=r"no NVIDIA driver. TensorRT-RTX builds without one"):
            builder._raise(stand_in, caught.value.event, [])

    def test_a_distribution_that_is_not_installed_is_named(self, tmp_path):
        with pytest.raises(MissingDependencyError, match="TensorRT is not installed: `pip install tensorrt`"):
            trt.load(Distribution.TENSORRT)

    def test_no_tensorrt_at_all(self, monkeypatch):
        monkeypatch.setattr(trt, "installed", lambda: ())
        with pytest.raises(MissingDependencyError, match=r"TensorRT is not installed. .*mlflow-trt\[rtx\]"):
            trt.load()

    def test_the_distribution_that_the_environment_asks_for(self, monkeypatch):
        monkeypatch.setenv(trt.DISTRIBUTION_VARIABLE, "tensorrt")
        with pytest.raises(MissingDependencyError, match="tensorrt is not installed"):
            trt.load()
        monkeypatch.setenv(trt.DISTRIBUTION_VARIABLE, "tensorflow")
        with pytest.raises(OptionError, match="expected one of tensorrt, tensorrt_rtx"):
            trt.load()


@contextlib.contextmanager
def building(folder):
    """A process in the middle of building rec, and the build process that it started."""
    program = textwrap.dedent(f"""
        import signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which the tests' own background may ignore
        sys.path[:0] = {sys.path!r}
        from pathlib import Path
        from helpers import convert_in, read
        from real_models import REC
        from mlflow_trt import Recipe
        folder = Path({str(folder)!r})
        def show(event):
            print("building", flush=True)
        convert_in(folder, read(REC, folder), Recipe(**REC.recipe), progress=show)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "building\n"
        (worker,) = children_of(process.pid, running="engine.worker")
        yield process, worker
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
class TestInterruption:
    def test_a_callback_that_raises_ends_the_build(self, tmp_path):
        before = set(children_of(os.getpid()))

        def cancel(event):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build(MAGIKA, tmp_path, progress=cancel, **MAGIKA.recipe)
        assert set(children_of(os.getpid())) == before
        assert not (tmp_path / "engine.plan").exists()

    @pytest.mark.exhaustive
    def test_ctrl_c_ends_both_processes(self, tmp_path):
        with building(tmp_path) as (process, worker):
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=PATIENCE)
            assert process.returncode != 0
            assert "KeyboardInterrupt" in errors
            assert not is_running(worker)
            assert not (tmp_path / "engine.plan").exists()

    @pytest.mark.exhaustive
    def test_the_build_process_ends_with_the_one_that_asked(self, tmp_path):
        with building(tmp_path) as (process, worker):
            process.kill()
            process.wait()
            wait_for(lambda: not is_running(worker))
            assert not (tmp_path / "engine.plan").exists()  # it ended before it was done


def test_the_engine_is_the_file_that_its_record_describes(tmp_path):
    source = read(networks.product(batch=2), tmp_path)
    plan = tmp_path / "deep" / "engine.plan"
    record = build_engine(source.path, plan, Recipe(), [], interface=Interface(source.inputs, source.outputs)).engine
    assert record.file == "engine.plan"
    assert record.sha256 == sha256_of(plan)
    assert list(plan.parent.iterdir()) == [plan]


def _waits_for_a_lock(path: Path) -> bool:
    """Whether anybody waits for the lock of a file, as the kernel lists it: `1: -> FLOCK ADVISORY WRITE 7 fe:00:42`."""
    inode = f":{path.stat().st_ino}"
    lines = (line.split() for line in Path("/proc/locks").read_text().splitlines())
    return any(line[1] == "->" and line[6].endswith(inode) for line in lines)


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
class TestTimingCache:
    """TensorRT-RTX ignores timing caches but has their API: enough to see that the file is shared soundly."""

    def test_is_made_merged_and_named_by_its_digest(self, tmp_path):
        tensorrt = trt.load()
        file = TimingCacheFile(tmp_path / "new" / "t.cache")
        for _ in range(2):
            config = tensorrt.builder().create_builder_config()
            file.attach(tensorrt, config)
            digest = file.merge(tensorrt, config)
            assert digest == hashlib.sha256((tmp_path / "new" / "t.cache").read_bytes()).hexdigest()
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["t.cache", "t.cache.lock"]

    def test_who_writes_waits_for_who_does(self, tmp_path):
        tensorrt = trt.load()
        config = tensorrt.builder().create_builder_config()
        file = TimingCacheFile(tmp_path / "t.cache")
        file.attach(tensorrt, config)
        with (tmp_path / "t.cache.lock").open("w") as lock, concurrent.futures.ThreadPoolExecutor() as pool:
            fcntl.flock(lock, fcntl.LOCK_EX)
            merging = pool.submit(file.merge, tensorrt, config)
            wait_for(lambda: _waits_for_a_lock(tmp_path / "t.cache.lock"))
            assert not merging.done()
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert len(merging.result(timeout=PATIENCE)) == 64
