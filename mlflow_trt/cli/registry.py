"""mlflow-trt registry"""

from __future__ import annotations

from typing import Annotated

import typer

from mlflow_trt.cli.command import Command
from mlflow_trt.cli.options import results_on_stdout
from mlflow_trt.cli.render import print_findings
from mlflow_trt.cli.tables import print_json

registry = typer.Typer(help="What is in MLflow's registry.", no_args_is_help=True)


@registry.callback()
def _group() -> None:
    """What is in MLflow's registry."""


@registry.command(cls=Command)
def check(
    uri: Annotated[str, typer.Argument(help="A registered model: models:/name.")],
    mend: Annotated[
        bool, typer.Option("--mend", help="Mend what can be mended without losing anything that can be loaded.")
    ] = False,
    minutes: Annotated[
        float,
        typer.Option(help="What is unfinished and younger than this is taken for a conversion that is still at work."),
    ] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Find what killed conversions left: half-made versions, logged models, runs. Exits with 1 if something remains."""
    from mlflow_trt.registry.check import check_registered_model

    with results_on_stdout(as_json):
        findings = check_registered_model(uri, mend=mend, minutes=minutes)
    if as_json:
        print_json([finding.to_dict() for finding in findings])
    else:
        print_findings(uri, findings)
    if not all(finding.is_mended for finding in findings):
        raise typer.Exit(1)
