"""mlflow-trt benchmark"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlflow_trt.cli.options import parse_batches, results_on_stdout
from mlflow_trt.cli.render_measures import print_benchmark
from mlflow_trt.cli.tables import print_json


def benchmark(
    uri: Annotated[str, typer.Argument(help="An MLflow model URI such as models:/name/version, or a folder.")],
    batch: Annotated[str, typer.Option(help="Batch sizes to measure, like 1:8:32:128.")] = "1:8:32",
    data: Annotated[
        Path | None, typer.Option(help="An .npz or .npy file of inputs; else the model's example, or noise.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long each row of the table is measured.")] = 2.0,
    no_source: Annotated[
        bool, typer.Option("--no-source", help="Do not measure the source model on ONNX Runtime.")
    ] = False,
    device: Annotated[int, typer.Option(help="CUDA device ordinal.")] = 0,
    layers: Annotated[bool, typer.Option("--layers", help="Time each layer too, for the report. Needs a GPU.")] = False,
    log: Annotated[bool, typer.Option("--log", help="Log metrics and pictures to a run of MLflow.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write the numbers and pictures to this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure latency and throughput: the engine alone, the copies, the whole predict, and ONNX Runtime.

    Exits with 1 where nothing could be measured.
    """
    from mlflow_trt.core.progress import show_progress
    from mlflow_trt.measure import benchmark as benchmarks
    from mlflow_trt.measure.layers import read_layers
    from mlflow_trt.measure.publish import check_can_log, log_report, write_report

    with results_on_stdout(as_json), show_progress(f"Measuring {uri}") as progress:
        check_can_log(wanted=log)
        result = benchmarks.benchmark(
            uri,
            parse_batches(batch),
            data=data,
            seconds=seconds,
            against_source=not no_source,
            device=device,
            progress=progress,
        )
        found = read_layers(uri, data=data, device=device) if layers else None
        run_id = log_report(result, [uri], found) if log else None
        if report is not None:
            write_report(result, uri, report, found)
    if as_json:
        print_json({"uri": uri, "run_id": run_id, **result.to_dict()})
    else:
        print_benchmark(uri, result, run_id)
    if not result.measurements:
        raise typer.Exit(1)
