"""mlflow-trt compare"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlflow_trt.cli.options import exit_code, parse_batches, results_on_stdout
from mlflow_trt.cli.render_measures import print_side_by_side
from mlflow_trt.cli.tables import print_json


def compare(
    reference: Annotated[str, typer.Argument(help="The model to compare with: an MLflow model URI or a folder.")],
    subject: Annotated[str, typer.Argument(help="The model to compare, usually one that was made of it.")],
    data: Annotated[
        Path | None, typer.Option(help="An .npz or .npy file of inputs; else the model's example, or noise.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes to measure, like 1:8:32.")] = "1:8",
    seconds: Annotated[float, typer.Option(help="How long each row of the table is measured.")] = 1.0,
    device: Annotated[int, typer.Option(help="CUDA device ordinal.")] = 0,
    log: Annotated[bool, typer.Option("--log", help="Log metrics and pictures to a run of MLflow.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write the numbers and pictures to this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compare two models, accuracy and speed, side by side.

    Exits with 1 where their outputs are too far apart, or hardly vary and so prove nothing; with 3 where nothing was
    compared, since both would be the same file on the same runtime. Without a GPU the typed model is compared.
    """
    from mlflow_trt.core.progress import show_progress
    from mlflow_trt.measure.publish import check_can_log, log_report, write_report
    from mlflow_trt.measure.side_by_side import compare_models

    title = f"{subject} and {reference}"
    with results_on_stdout(as_json), show_progress(f"Comparing {title}") as progress:
        check_can_log(wanted=log)
        sizes = parse_batches(batch)
        result = compare_models(
            reference, subject, batches=sizes, data=data, seconds=seconds, device=device, progress=progress
        )
        run_id = log_report(result.benchmark, [reference, subject], comparison=result.comparison) if log else None
        if report is not None:
            write_report(result.benchmark, title, report, comparison=result.comparison)
    if as_json:
        print_json({**result.to_dict(), "run_id": run_id})
    else:
        print_side_by_side(result, run_id)
    raise typer.Exit(exit_code(result.comparison.verdict))
