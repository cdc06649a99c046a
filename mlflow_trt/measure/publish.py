"""Put a benchmark where people look for it: metrics, the numbers and pictures in a run of MLflow, or in a folder."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import mlflow

from mlflow_trt.core.accuracy import Comparison
from mlflow_trt.flavor.tags import BENCHMARK_OF_TAG
from mlflow_trt.measure.benchmark import Benchmark
from mlflow_trt.measure.layers import LayerReport, page
from mlflow_trt.measure.plots import draw_benchmark, draw_layers


def write_report(benchmark: Benchmark, title: str, folder: Path, layers: LayerReport | None = None) -> list[Path]:
    """Write benchmark.json and the pictures, with layers.json, layers.html and a picture of them, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "benchmark.json"]
    files[0].write_text(json.dumps(benchmark.to_dict(), indent=2) + "\n")
    files += draw_benchmark(benchmark, title, folder)
    if layers is not None:
        files += [folder / "layers.json", folder / "layers.html"]
        files[-2].write_text(json.dumps(layers.to_dict(), indent=2) + "\n")
        files[-1].write_text(page(layers))
        files += draw_layers(layers.milliseconds, f"{title}, batch {layers.rows}", folder)
    return files


def log_report(
    benchmark: Benchmark, title: str, layers: LayerReport | None = None, comparison: Comparison | None = None
) -> str:
    """Log it to a new run of the current experiment, and return the run's id. The steps are the batch sizes."""
    with tempfile.TemporaryDirectory(prefix="mlflow-trt-") as workdir:
        write_report(benchmark, title, Path(workdir), layers)
        with mlflow.start_run(run_name=f"benchmark of {title}", nested=mlflow.active_run() is not None) as run:
            mlflow.set_tags({BENCHMARK_OF_TAG: title})
            for name, value, step in benchmark.metrics():
                mlflow.log_metric(name, value, step=step)
            parts = {} if comparison is None else comparison.metric_parts
            for output in comparison.outputs if comparison is not None else ():
                prefix = f"accuracy/{parts[output.name]}"
                mlflow.log_metric(f"{prefix}/relative_error", output.relative_error)
                mlflow.log_metric(f"{prefix}/max_abs_error", output.max_abs_error)
                mlflow.log_metric(f"{prefix}/cosine_similarity", output.cosine_similarity)
                for name in ("median_row_error", "worst_row_error"):
                    if (error := getattr(output, name)) is not None:
                        mlflow.log_metric(f"{prefix}/{name}", error)
            mlflow.log_artifacts(workdir)
    return str(run.info.run_id)
