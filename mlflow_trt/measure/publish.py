"""Put a benchmark where people look for it: metrics, the numbers and pictures in a run of MLflow, or in a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelInput
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from mlflow_trt.core.accuracy import Comparison
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.scratch import scratch_folder
from mlflow_trt.flavor.tags import BENCHMARK_OF_TAG, PREFIX
from mlflow_trt.flavor.tracking import check_server
from mlflow_trt.measure.benchmark import Benchmark
from mlflow_trt.measure.layers import LayerReport, page
from mlflow_trt.measure.plots import draw_benchmark, draw_layers

_log = get_logger(__name__)
_DIGITS = 6
"""Of times in MLflow's tables, which show all that a number has; benchmark.json has them whole."""


def write_report(
    benchmark: Benchmark,
    title: str,
    folder: Path,
    layers: LayerReport | None = None,
    comparison: Comparison | None = None,
) -> list[Path]:
    """Write benchmark.json and the pictures, with layers.json, layers.html and a picture of them, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "benchmark.json"]
    accuracy = {} if comparison is None else {"accuracy": comparison.to_dict()}
    files[0].write_text(json.dumps({"of": title, **accuracy, **benchmark.to_dict()}, indent=2) + "\n")
    files += draw_benchmark(benchmark, title, folder)
    if layers is not None:
        files += [folder / "layers.json", folder / "layers.html"]
        files[-2].write_text(json.dumps(layers.to_dict(), indent=2) + "\n")
        files[-1].write_text(page(layers))
        files += draw_layers(layers.milliseconds, f"{title}, batch {layers.rows}", folder)  # none without times
    return files


def check_can_log(*, wanted: bool) -> None:
    """Raise ServerUnavailableError where a report is to be logged and MLflow's server is gone: before the measuring."""
    if wanted:
        check_server()


def log_report(
    benchmark: Benchmark,
    models: Sequence[str],
    layers: LayerReport | None = None,
    comparison: Comparison | None = None,
) -> str:
    """Log it to a new run of the current experiment, linked to the logged models, and return the run's id.

    `models` are the URIs: of the one that was measured, or of the reference and the subject of a comparison. The steps
    of metrics are the batch sizes.
    """
    title = " and ".join(reversed(models))
    ids = {uri: _model_id(uri) for uri in models}
    with scratch_folder() as workdir:
        write_report(benchmark, title, workdir, layers, comparison)
        with mlflow.start_run(
            run_name=_run_name(models),
            nested=mlflow.active_run() is not None,
            description=_description(benchmark, comparison),
        ) as run:
            mlflow.set_tags({BENCHMARK_OF_TAG: title, **_tags(benchmark, comparison)})
            mlflow.log_params({**benchmark.settings, "model": models[-1]})
            known = [LoggedModelInput(model_id) for model_id in dict.fromkeys(ids.values()) if model_id is not None]
            if known:
                MlflowClient().log_inputs(run.info.run_id, models=known)
            for model, name, value, step in benchmark.metrics():
                mlflow.log_metric(name, float(f"{value:.{_DIGITS}g}"), step=step, model_id=ids.get(model))
            _log_accuracy(comparison, ids[models[-1]])
            mlflow.log_artifacts(str(workdir))
    return str(run.info.run_id)


def _run_name(models: Sequence[str]) -> str:
    """Like `benchmark resnet50-trt v3`, or `compare resnet50-trt v3 with resnet50 v1`."""
    reference, subject = _short_name(models[0]), _short_name(models[-1])
    return f"benchmark {subject}" if len(models) == 1 else f"compare {subject} with {reference}"


def _short_name(uri: str) -> str:
    registered = re.fullmatch(r"models:/([^/@]+)[/@](.+)", uri)
    if registered is None:
        return uri.rstrip("/").rpartition("/")[2] or uri
    return f"{registered[1]} {'v' if registered[2].isdigit() else '@'}{registered[2]}"


def _description(benchmark: Benchmark, comparison: Comparison | None) -> str:
    """In Markdown: the verdict, a table of the medians, and what was not measured."""
    times: dict[str, dict[int, str]] = {}
    for row in benchmark.measurements:
        times.setdefault(benchmark.label(row), {})[row.batch] = f"{row.latency.p50:.3g}"
    table = [
        f"| Batch size | {' | '.join(f'{label}, median ms' for label in times)} |",
        f"| ---: {'| ---: ' * len(times)}|",
        *(
            f"| {batch} | {' | '.join(column.get(batch, '') for column in times.values())} |"
            for batch in sorted({row.batch for row in benchmark.measurements})
        ),
    ]
    parts = (
        "" if comparison is None else _verdict(comparison),
        "\n".join(table) if times else "",
        *(f"Not measured: {problem}" for problem in benchmark.problems),
    )
    return "\n\n".join(filter(None, parts))


def _verdict(comparison: Comparison) -> str:
    error = f"relative error {comparison.relative_error:.2g}" if comparison.outputs else comparison.reason
    return f"**{comparison.verdict}**: {error}"


def _tags(benchmark: Benchmark, comparison: Comparison | None) -> dict[str, str]:
    tags = {f"{PREFIX}{name}": value for name, value in benchmark.machine.items()}
    tags[f"{PREFIX}runtime"] = "; ".join(benchmark.runtimes)
    if comparison is not None:
        tags[f"{PREFIX}verdict"] = str(comparison.verdict)
    return {key: value for key, value in tags.items() if value}


def _model_id(uri: str) -> str | None:
    """The logged model behind a URI or a folder; None where the tracking server has none."""
    try:
        model_id = Model.load(uri).model_id
        return None if model_id is None else str(MlflowClient().get_logged_model(model_id).model_id)
    except (MlflowException, OSError) as error:
        _log.debug("%s is not linked to the run: %s", uri, error)
        return None


def _log_accuracy(comparison: Comparison | None, model_id: str | None) -> None:
    if comparison is None:
        return
    parts = comparison.metric_parts
    for output in comparison.outputs:
        for name in ("relative_error", "max_abs_error", "cosine_similarity", "median_row_error", "worst_row_error"):
            if (error := getattr(output, name)) is not None:
                mlflow.log_metric(f"accuracy/{parts[output.name]}/{name}", error, model_id=model_id)
