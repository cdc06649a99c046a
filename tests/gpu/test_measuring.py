"""Benchmark, layers, and engines whose weights come from elsewhere, where there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import mlflow
import networks
import numpy as np
import pytest
from command_line import run
from compare import relative_error
from real_models import MAGIKA, TRANSFORMER

import mlflow_trt
from mlflow_trt import BuildError
from mlflow_trt.flavor.fetch import read_record
from mlflow_trt.measure.benchmark import benchmark
from mlflow_trt.measure.layers import page, read_layers
from mlflow_trt.measure.publish import write_report
from mlflow_trt.measure.side_by_side import compare_models
from mlflow_trt.registry.add_engine import add_engine
from mlflow_trt.store.folder import read_folder

pytestmark = pytest.mark.gpu


@pytest.mark.alone_on_gpu
@pytest.mark.parametrize("model", [MAGIKA, TRANSFORMER], ids=lambda model: model.name)
def test_the_engine_the_copies_and_the_whole_are_measured(model, tmp_path):
    mlflow_trt.save_model(model.path(), tmp_path / "model", **model.recipe)
    result = benchmark(str(tmp_path / "model"), [2, 8], data=model.feeds(8), seconds=0.3)
    assert result.problems == ()
    rows = {(row.runtime, row.part, row.batch): row for row in result.measurements}
    for batch in (2, 8):
        engine, copies, whole = (rows["TensorRT", part, batch] for part in ("engine alone", "copies", "predict"))
        assert 0 < engine.latency.p50 < whole.latency.p50
        assert 0 < copies.latency.p50 < whole.latency.p50
        assert engine.latency.p50 <= engine.latency.p90 <= engine.latency.p99
    assert any(runtime.startswith("ONNX Runtime") for runtime, _, _ in rows)
    files = write_report(result, model.name, tmp_path / "report", read_layers(str(tmp_path / "model")))
    assert {file.name for file in files} >= {"latency.png", "throughput.png", "layers.html"}


def test_measuring_leaves_the_session_as_it_was(tmp_path):
    mlflow_trt.save_model(networks.product(), tmp_path / "model", batch=(1, 4, 8))
    x = networks.rows(5)
    with mlflow_trt.load_model(str(tmp_path / "model"), warm_up="off") as session:
        before = session.run({"x": x})["y"]
        session.time_phases({"x": x}, 5)
        session.time_layers({"x": x}, 5)
        assert np.array_equal(session.run({"x": x})["y"], before)
        with pytest.raises(mlflow_trt.InputShapeError, match="in pieces of 1 to 8 rows"):
            session.time_phases({"x": networks.rows(9)}, 5)


@pytest.mark.parametrize("verbosity", ["layer_names_only", "detailed"])
def test_layers(verbosity, tmp_path):
    recipe = mlflow_trt.Recipe(batch=(2, 8, 16), profiling_verbosity=verbosity)
    mlflow_trt.save_model(MAGIKA.path(), tmp_path / "model", recipe=recipe)
    report = read_layers(str(tmp_path / "model"))
    assert report.rows == 8
    assert report.layers
    assert sum(report.milliseconds.values()) > 0
    assert report.layers[0].name in page(report) or "&" in page(report)
    code, output, errors = run("inspect", tmp_path / "model", "--layers", "--html", tmp_path / "l.html", "--json")
    assert code == 0, errors
    assert json.loads(output)["layers"]
    assert (tmp_path / "l.html").exists()


@pytest.mark.parametrize("options", [{"weights": "stripped"}, {"weights": "refittable"}, {"weight_streaming": True}],
                         ids=lambda options: str(next(iter(options.values()))))  # fmt: skip
def test_the_numbers_are_right_wherever_the_weights_come_from(options, tmp_path):
    plain = tmp_path / "plain"
    mlflow_trt.save_model(MAGIKA.path(), plain, **MAGIKA.recipe)
    recipe = mlflow_trt.Recipe(**MAGIKA.recipe, **options)
    try:
        mlflow_trt.save_model(MAGIKA.path(), tmp_path / "model", recipe=recipe)
    except BuildError as error:
        if "CUDAMod" not in " ".join(error.log):
            raise
        pytest.skip("TensorRT-RTX compiles such engines for the GPU at once, and this GPU is no target of it")
    engine = read_folder(tmp_path / "model").record.engines[0]
    assert str(engine.weights) == options.get("weights", "included")
    if options.get("weights") == "stripped":
        assert engine.size < read_folder(plain).record.engines[0].size
    feeds = MAGIKA.feeds(8)
    with mlflow_trt.load_model(str(plain), runtime="onnxruntime") as session:
        expected = session.run(feeds)
    with mlflow_trt.load_model(str(tmp_path / "model"), on_mismatch="error") as session:
        assert relative_error(session.run(feeds), expected) < MAGIKA.relative_error


def test_an_engine_for_this_machine_is_added_and_taken(store, tmp_path):
    (tmp_path / "p.onnx").write_bytes(networks.product().SerializeToString())
    mlflow_trt.convert_model_version(tmp_path / "p.onnx", "p-trt", batch=(1, 4, 8), targets="sm75")
    made = add_engine("models:/p-trt/1")
    record = read_record(f"models:/p-trt/{made.version}")
    assert len(record.engines) == 2
    assert record.engines[1].gpu is not None
    with mlflow_trt.load_model(f"models:/p-trt/{made.version}", on_mismatch="error") as session:
        assert session.run({"x": networks.rows(3)})["y"].shape == (3, 8)
    assert str(add_engine(f"models:/p-trt/{made.version}").version) == str(made.version)


def test_compares_an_engine_with_its_source(store):
    mlflow.onnx.log_model(networks.product(), name="p", registered_model_name="p", pip_requirements=["onnx"])
    mlflow_trt.convert_model_version("models:/p/1", "p-trt", batch=(1, 4, 8))
    data = {"x": networks.rows(8)}
    result = compare_models("models:/p/1", "models:/p-trt/1", data=data, batches=(1, 8), seconds=0.1)
    assert str(result.comparison.verdict) == "passed"
    assert result.benchmark.problems == ()
    assert {"TensorRT", "ONNX Runtime"} <= {row.runtime.partition(" C")[0] for row in result.benchmark.measurements}


def test_the_same_engine_on_both_sides_is_nothing_compared(tmp_path):
    mlflow_trt.save_model(networks.product(), tmp_path / "m", batch=(1, 4, 8))
    result = compare_models(str(tmp_path / "m"), str(tmp_path / "m"), batches=(1, 8), seconds=0.1)
    assert str(result.comparison.verdict) == "nothing was compared"
    assert "both are the same file" in result.comparison.reason
    assert {(row.part, row.batch) for row in result.benchmark.measurements} == {
        (part, batch) for part in ("engine alone", "copies", "predict") for batch in (1, 8)
    }


def test_a_plan_that_exists_is_asked_for_its_tensors_and_runs(tmp_path):
    shapes = {"input_ids": ((-1, 4), (-1, 8), (-1, 16))}
    mlflow_trt.save_model(networks.transformer(), tmp_path / "made", batch=(1, 2, 4), shapes=shapes)
    (plan,) = (tmp_path / "made" / "engines").iterdir()
    mlflow_trt.save_engine(plan, tmp_path / "imported", splits_batches=True)
    made, imported = (read_folder(tmp_path / name).record for name in ("made", "imported"))
    assert imported.is_engine_only
    assert imported.profiles == made.profiles
    assert [(spec.name, spec.dtype) for spec in imported.inputs] == [(spec.name, spec.dtype) for spec in made.inputs]
    feeds = networks.sentences(11, 9)
    with mlflow_trt.load_model(str(tmp_path / "made")) as session:
        expected = session.run(feeds)
    with mlflow_trt.load_model(str(tmp_path / "imported")) as session:
        found = session.run(feeds)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    model = mlflow.pyfunc.load_model(str(tmp_path / "imported"))
    assert np.array_equal(model.predict(feeds)["logits"], expected["logits"])


def test_ranges_are_marked_around_the_phases_of_a_call(tmp_path):
    mlflow_trt.save_model(networks.product(), tmp_path / "m", batch=(1, 4, 8))
    program = (
        "import sys, nvtx; ranges = []; nvtx.push_range = lambda name, domain: ranges.append(name)\n"
        "nvtx.pop_range = lambda domain: None\n"
        "import numpy, mlflow_trt\n"
        "with mlflow_trt.load_model(sys.argv[1], warm_up='on') as session:\n"
        "    session.run({'x': numpy.ones((3, 16), 'float32')}); ranges.clear()\n"
        "    session.run({'x': numpy.ones((3, 16), 'float32')})\n"
        "print(ranges)"
    )
    pytest.importorskip("nvtx", reason="needs the extra nvtx")
    environment = {**os.environ, "MLFLOW_TRT_NVTX": "1"}
    command = [sys.executable, "-c", program, str(tmp_path / "m")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert eval(result.stdout.splitlines()[-1]) == [
        "run", "check inputs", "copy in, enqueue", "copy into pinned memory", "enqueue", "finish", "wait for the GPU"
    ]  # fmt: skip
