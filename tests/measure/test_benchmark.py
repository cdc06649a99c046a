"""What can be measured without a GPU, and how numbers become tables, metrics and pictures."""

from __future__ import annotations

import json

import mlflow
import networks
import numpy as np
import pytest
from command_line import run
from onnx import helper
from PIL import Image

import mlflow_trt
from mlflow_trt import InputShapeError, OptionError
from mlflow_trt.measure.benchmark import Benchmark, Measurement, benchmark
from mlflow_trt.measure.inputs import example_feeds, given_feeds, sample
from mlflow_trt.measure.plots import draw_benchmark, draw_layers
from mlflow_trt.measure.publish import log_report, write_report
from mlflow_trt.runtime.latency import Latency, measure, measure_in_turns, turns
from mlflow_trt.runtime.onnxruntime_session import OnnxRuntimeSession
from mlflow_trt.store.folder import read_folder

pytestmark = pytest.mark.slow

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def folder(tmp_path):
    mlflow_trt.save_model(networks.product(), tmp_path / "model", batch=(1, 4, 8))
    return tmp_path / "model"


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_latency_is_of_the_runs_themselves():
    latency = Latency.of(list(range(1, 101)))
    assert (latency.runs, latency.mean, latency.p50) == (100, 50.5, 50.5)
    assert latency.p90 == pytest.approx(90.1)
    assert latency.p99 == pytest.approx(99.01)


def test_measures_after_a_warm_up():
    calls = []
    latency = measure(lambda: calls.append(None), 0.01)
    assert len(calls) > latency.runs >= 10


def test_two_of_a_kind_come_out_alike_on_a_machine_that_slows_down():
    """One after the other, the second would be seven times slower; and a stall at times moves no median."""
    now = 0.0
    calls = []

    def call(which):
        def one():
            nonlocal now
            calls.append(which)
            slow = 7 if len(calls) > 1000 else 1
            now += 0.001 * slow * (50 if len(calls) % 17 == 0 else 1)

        return one

    first, second = measure_in_turns([call("a"), call("b")], 4.0, clock=lambda: now)
    assert first.p50 == pytest.approx(second.p50)
    assert (first.p10, second.p10) == (pytest.approx(1), pytest.approx(1))
    assert first.mean > 1.5 * first.p50


def test_turns_go_back_and_forth():
    order = list(turns(3))
    assert order[:6] == [0, 1, 2, 2, 1, 0]
    assert [order.count(number) for number in range(3)] == [10, 10, 10]


def test_without_a_gpu_onnx_runtime_is_measured(folder, no_gpu, messages):
    steps = []
    result = benchmark(str(folder), [1, 4], seconds=0.05, progress=steps.append)
    assert [(row.runtime, row.part, row.batch) for row in result.measurements] == [
        ("ONNX Runtime CPU", "predict", 1),
        ("ONNX Runtime CPU", "predict", 4),
    ]
    (problem,) = result.problems
    assert "does not run on TensorRT here: TensorRT needs an NVIDIA GPU" in problem
    assert "runtime=" not in problem  # which is for those who load a model
    assert problem in messages.text
    assert [step.phase for step in steps] == ["batch 1 on ONNX Runtime CPU", "batch 4 on ONNX Runtime CPU"]
    row = result.measurements[1]
    assert row.throughput == pytest.approx(4 / row.latency.p50 * 1e3)


def test_an_input_example_that_is_damaged_leaves_no_session_open(tmp_path, no_gpu, monkeypatch):
    mlflow_trt.save_model(networks.product(), tmp_path / "m", batch=(1, 4, 8), input_example={"x": networks.rows(2)})
    (tmp_path / "m" / "input_example.json").write_text("{")
    closed = []
    close = OnnxRuntimeSession.close
    monkeypatch.setattr(OnnxRuntimeSession, "close", lambda self: (closed.append(self), close(self)))
    with pytest.raises(ValueError, match="Expecting property name"):
        benchmark(str(tmp_path / "m"), [1], seconds=0.01)
    assert closed


def test_a_model_without_a_batch_axis_has_one_size(tmp_path, no_gpu):
    mlflow_trt.save_model(networks.product(batch=3), tmp_path / "model")
    result = benchmark(str(tmp_path / "model"), [1, 8, 32], seconds=0.02)
    assert [row.batch for row in result.measurements] == [3]


def test_a_size_that_is_refused_is_a_problem_and_the_others_go_on(tmp_path, no_gpu):
    in_pairs = [helper.make_node("Reshape", ["x", "pairs"], ["y"], name="pairs")]
    x, y = networks.value("x", networks.FLOAT, ["n", 16]), networks.value("y", networks.FLOAT, [None, 2, 16])
    model = networks.model(in_pairs, [x], [y], [networks.constant("pairs", np.int64([-1, 2, 16]))])
    mlflow_trt.save_model(model, tmp_path / "model", shapes={"x": ((2, 16), (2, 16), (8, 16))}, verify=False)
    result = benchmark(str(tmp_path / "model"), [1, 2], seconds=0.02)
    assert [row.batch for row in result.measurements] == [2]
    assert "batch 1: ONNX Runtime" in result.problems[1]


@pytest.mark.parametrize(("batches", "seconds"), [([], 1), ([0], 1), ([1], 0)])
def test_what_makes_no_sense(batches, seconds, folder):
    with pytest.raises(OptionError, match="expected"):
        benchmark(str(folder), batches, seconds=seconds)


class TestInputs:
    def test_are_made_up(self, folder):
        record = read_folder(folder).record
        feeds = sample(5, record.inputs, record.profiles, record.batch_axis)
        assert feeds["x"].shape == (5, 16)
        assert feeds["x"].dtype == np.float32
        assert feeds["x"].std() > 0.5

    def test_are_repeated_or_cut(self, folder):
        record = read_folder(folder).record
        given = {"x": networks.rows(3)}
        feeds = sample(7, record.inputs, record.profiles, record.batch_axis, given)
        assert np.array_equal(feeds["x"], given["x"][[0, 1, 2, 0, 1, 2, 0]])
        assert np.array_equal(sample(2, record.inputs, (), record.batch_axis, given)["x"], given["x"][:2])

    def test_shape_tensors_get_their_usual_values(self, tmp_path):
        shapes = {"x": ((2, 16), (4, 16), (8, 16)), "shape": ((2, 1), (16, 4), (64, 16))}
        mlflow_trt.save_model(networks.reshaped(), tmp_path / "model", shapes=shapes)
        record = read_folder(tmp_path / "model").record
        feeds = sample(4, record.inputs, record.profiles, record.batch_axis)
        assert feeds["shape"].tolist() == [16, 4]

    def test_scalars_stay_scalars(self, tmp_path):
        mlflow_trt.save_model(networks.every_dtype(), tmp_path / "model", batch=4)
        record = read_folder(tmp_path / "model").record
        feeds = sample(4, record.inputs, record.profiles, record.batch_axis)
        assert feeds["scale"].shape == ()
        assert feeds["i32"].dtype == np.int32
        assert set(np.unique(feeds["u8"])) <= {0, 1}

    def test_an_array_is_that_of_the_only_input(self, folder):
        record = read_folder(folder).record
        given = networks.rows(2)
        assert np.array_equal(given_feeds(given, record.inputs, record.batch_axis)["x"], given)

    def test_rows_of_different_numbers_are_refused(self, tmp_path):
        mlflow_trt.save_model(networks.ranks(), tmp_path / "model", batch=(1, 4, 8))
        record = read_folder(tmp_path / "model").record
        feeds = networks.ranks_feeds(4)
        last = record.batch_axis.inputs[-1]
        with pytest.raises(InputShapeError, match="the given data: input .* 3 "):
            given_feeds({**feeds, last: feeds[last][:3]}, record.inputs, record.batch_axis)

    def test_an_example_that_does_not_fit_gives_way_to_noise(self, folder, messages):
        record = read_folder(folder).record
        assert example_feeds({"z": networks.rows(2)}, record.inputs, record.batch_axis) is None
        assert "generated noise, since the model cannot take the input example: input 'x' is missing" in messages.text
        assert example_feeds("text", record.inputs, record.batch_axis) is None


def made_up() -> Benchmark:
    rows = []
    for part, base in (("engine alone", 0.8), ("copies", 0.1), ("predict", 1.2)):
        for batch in (1, 8, 32, 128):
            ms = base + 0.05 * batch
            latency = Latency(runs=100, mean=ms, p10=0.95 * ms, p50=ms, p90=1.1 * ms, p99=1.4 * ms)
            rows.append(Measurement(model="m", runtime="TensorRT", part=part, batch=batch, latency=latency))
    return Benchmark(measurements=tuple(rows))


class TestReports:
    @pytest.mark.exhaustive
    def test_metrics_have_the_batch_size_as_their_step(self, store):
        run_id = log_report(made_up(), ["models:/m/1"])
        history = store.client.get_metric_history(run_id, "tensorrt/engine_alone/p99_ms")
        assert {metric.step: metric.value for metric in history}[8] == pytest.approx(1.4 * 1.2)
        assert len(history) == 4
        assert {"tensorrt/copies/p50_ms", "tensorrt/predict/rows_per_second"} <= set(
            store.client.get_run(run_id).data.metrics
        )
        artifacts = {item.path for item in store.client.list_artifacts(run_id)}
        assert artifacts == {"benchmark.json", "latency.png", "throughput.png"}

    def test_a_run_tells_what_was_measured_and_where_and_is_linked_to_the_model(self, store, no_gpu):
        info = mlflow_trt.log_model(networks.product(), name="p", batch=(1, 4, 8), registered_model_name="p")
        result = benchmark("models:/p/1", [1, 4], seconds=0.05)
        run = store.client.get_run(log_report(result, ["models:/p/1"]))
        assert run.info.run_name == "benchmark p v1"
        assert run.data.params == {
            "batches": "1:4", "seconds": "0.05", "data": "the model's example, or noise", "model": "models:/p/1"
        }  # fmt: skip
        assert run.data.tags["mlflow_trt.gpu"] == "none"
        table = run.data.tags["mlflow.note.content"].splitlines()
        assert table[:2] == ["| Batch size | ONNX Runtime CPU, predict, median ms |", "| ---: | ---: |"]
        assert table[2:4] == [f"| {row.batch} | {row.latency.p50:.3g} |" for row in result.measurements]
        assert table[-1].startswith("Not measured: models:/p/1 does not run on TensorRT here")
        assert run.data.tags["mlflow_trt.onnxruntime"] in run.data.tags["mlflow_trt.runtime"]
        assert [given.model_id for given in run.inputs.model_inputs] == [info.model_id]
        logged = store.client.get_logged_model(info.model_id)
        assert "onnx_runtime_cpu/predict/p50_ms" in {metric.key for metric in logged.metrics}
        assert logged.tags["mlflow.note.content"] == "fp32, batch 1:4:8, sm80plus, error not measured"

    def test_the_report_names_its_units(self, tmp_path):
        write_report(made_up(), "models:/m/1", tmp_path)
        content = json.loads((tmp_path / "benchmark.json").read_text())
        assert content["units"]["latency"] == "ms"
        assert content["units"]["throughput"].startswith("rows per second")
        assert content["of"] == "models:/m/1"

    def test_pictures_are_of_a_size_that_reports_want(self, tmp_path):
        for path in (
            *draw_benchmark(made_up(), "models:/m/1", tmp_path),
            *draw_layers({f"layer {n}": 1 / (n + 1) for n in range(40)}, "models:/m/1", tmp_path),
        ):
            with Image.open(path) as image:
                assert image.size[0] > 1000
                assert len(image.convert("L").resize((64, 64)).getcolors()) > 5, "it is empty"
        assert draw_benchmark(Benchmark(measurements=()), "nothing", tmp_path) == []


class TestCommand:
    def test_a_table_and_what_was_not_measured(self, folder):
        code, output, _ = run("benchmark", folder, "--batch", "1,4", "--seconds", "0.05", **NO_GPU)
        assert code == 0
        assert "ONNX Runtime CPU" in output
        assert "not measured:" in output

    def test_json_a_run_and_a_folder(self, folder, store, tmp_path):
        tracking = {"MLFLOW_TRACKING_URI": store.uri, "MLFLOW_EXPERIMENT_ID": store.experiment_id}
        code, output, errors = run(
            "benchmark", folder, "--batch", "1,4", "--seconds", "0.05", "--log", "--report", tmp_path / "report",
            "--json", **NO_GPU, **tracking,
        )  # fmt: skip
        assert code == 0, errors
        result = json.loads(output)
        assert [row["batch"] for row in result["measurements"]] == [1, 4]
        metrics = mlflow.get_run(result["run_id"]).data.metrics
        assert metrics["onnx_runtime_cpu/predict/p50_ms"] > 0
        assert (tmp_path / "report" / "throughput.png").exists()
