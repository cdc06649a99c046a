"""mlflow-trt dockerfile"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from mlflow_trt.cli.options import parse_settings


def dockerfile(
    uri: Annotated[str, typer.Argument(help="An MLflow model URI such as models:/name/version, or a folder.")],
    output: Annotated[Path, typer.Option(help="The folder to write: what `docker build` gets.")],
    port: Annotated[int, typer.Option(help="What the server listens on.")] = 8080,
    server: Annotated[str, typer.Option(help="mlflow-trt, or mlflow for MLflow's own server.")] = "mlflow-trt",
    name: Annotated[str, typer.Option(help="What mlflow-trt serve calls the model.")] = "model",
    base: Annotated[str, typer.Option(help="Image to start from; {kind} is devel or runtime. Default: CUDA 13.")] = "",
    model_config: Annotated[str, typer.Option(help='Load settings as JSON, like \'{"runtime": "auto"}\'.')] = "",
    wheel: Annotated[
        list[Path] | None, typer.Option(help="A wheel to install from, such as an unpublished mlflow-trt.")
    ] = None,
) -> None:
    """Write a Dockerfile and all it needs for an image that serves a model on a GPU."""
    from mlflow_trt.deploy.dockerfile import CACHE, CUDA_IMAGE, ImageOptions, write_image_context

    settings = parse_settings(model_config, "--model-config")
    options = ImageOptions(
        port=port, server=server, name=name, base=base or CUDA_IMAGE, model_config=settings, wheels=wheel or ()
    )
    remarks = write_image_context(uri, output, options)
    serve = f"docker run --gpus all -p {port}:{port} -v NAME-cache:{CACHE} NAME"
    typer.echo("\n".join([*remarks, f"docker build --tag NAME {shlex.quote(str(output))}", serve]))
