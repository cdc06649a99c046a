"""mlflow-trt export-triton"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlflow_trt.cli.options import parse_settings, results_on_stdout
from mlflow_trt.cli.tables import print_json, print_line


def export_triton(
    uri: Annotated[str, typer.Argument(help="An MLflow model URI such as models:/name/version, or a folder.")],
    repository: Annotated[Path, typer.Option(help="The folder that Triton gets as --model-repository.")],
    name: Annotated[str, typer.Option(help="Name of the model there. Default: that of the registered model.")] = "",
    backend: Annotated[
        str,
        typer.Option(
            help="tensorrt: the engines. onnxruntime: the ONNX model. mlflow_trt: the MLflow model, whatever built its "
            "engines, in Triton's Python backend."
        ),
    ] = "tensorrt",
    instances: Annotated[int, typer.Option(help="Requests that may run at the same time, on each GPU.")] = 1,
    queue_delay: Annotated[int, typer.Option(help="Microseconds a request may wait for others to run with.")] = 100,
    model_config: Annotated[str, typer.Option(help="With --backend mlflow_trt: load settings as JSON.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a model into a model repository of Triton Inference Server."""
    from dataclasses import asdict

    from mlflow_trt.deploy.triton import export_triton as export

    settings = parse_settings(model_config, "--model-config")
    with results_on_stdout(as_json):
        made = export(
            uri, repository, name=name or None, backend=backend, instances=instances, queue_delay=queue_delay,
            model_config=settings,
        )  # fmt: skip
    if as_json:
        print_json({**asdict(made), "path": str(made.path)})
    else:
        print_line("\n".join([f"{made.path}: {', '.join(made.files)}", *made.remarks]))
