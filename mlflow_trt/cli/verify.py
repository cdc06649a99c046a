"""mlflow-trt verify"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlflow_trt.cli.options import exit_code, results_on_stdout
from mlflow_trt.cli.render_measures import print_verdict
from mlflow_trt.cli.tables import print_json


def verify(
    uri: Annotated[str, typer.Argument(help="An MLflow model URI such as models:/name/version, or a folder.")],
    data: Annotated[Path | None, typer.Option(help="An .npz or .npy file of inputs; else the golden sample.")] = None,
    relative_error: Annotated[
        float | None,
        typer.Option(
            help="What is tolerated, and in proportion of single rows. Default: what the model was logged with."
        ),
    ] = None,
    device: Annotated[int, typer.Option(help="CUDA device ordinal.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Compare a model's engine, or without a GPU its typed model, with its source model.

    Exits with 1 where it fails or proves nothing; with 3 where nothing was compared: without a GPU, the typed model of
    fp32 is often the source model itself.
    """
    from mlflow_trt.measure.verify_logged import verify_model

    with results_on_stdout(as_json):
        comparison = verify_model(uri, data, relative_error=relative_error, device=device)
    if as_json:
        print_json({"uri": uri, **comparison.to_dict()})
    else:
        print_verdict(comparison)
    raise typer.Exit(exit_code(comparison.verdict))
