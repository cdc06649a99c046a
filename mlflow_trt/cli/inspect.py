"""mlflow-trt inspect"""

from __future__ import annotations

from typing import Annotated

import typer

from mlflow_trt.cli.options import results_on_stdout
from mlflow_trt.cli.render import print_json, print_record


def inspect(
    uri: Annotated[str, typer.Argument(help="An MLflow model URI such as models:/name/version, or a folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole record as JSON.")] = False,
) -> None:
    """Show a model's recipe, profiles, engines and digests. Needs neither a GPU nor TensorRT."""
    from mlflow_trt.artifact import record_to_dict
    from mlflow_trt.flavor import read_record

    with results_on_stdout(as_json):
        record = read_record(uri)
    if as_json:
        print_json({"uri": uri, **record_to_dict(record)})
    else:
        print_record(uri, record)
