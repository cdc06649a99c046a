"""mlflow-trt doctor"""

from __future__ import annotations

import enum
from dataclasses import asdict
from typing import Annotated

import typer

from mlflow_trt.cli.options import results_on_stdout
from mlflow_trt.cli.render_measures import print_diagnosis
from mlflow_trt.cli.tables import print_json


class Need(str, enum.Enum):
    build = "build"
    run = "run"


def doctor(
    need: Annotated[
        Need, typer.Option(help="What this machine is for: `build` engines, or `run` them on its GPU.")
    ] = Need.build,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Find out what works here, by trying. Exits with 0 where this machine can do what it is for, else with 1."""
    from mlflow_trt.measure.doctor import examine

    with results_on_stdout(as_json):
        diagnosis = examine()
    if as_json:
        print_json(asdict(diagnosis))
    else:
        print_diagnosis(diagnosis)
    if not (diagnosis.can_run if need is Need.run else diagnosis.can_build):
        raise typer.Exit(1)
