"""mlflow-trt serve"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mlflow_trt.cli.options import parse_settings
from mlflow_trt.core.printable import printable

_MIB = 1 << 20


def _seconds(value: float) -> float:
    if not 0 < value < float("inf"):
        raise typer.BadParameter(f"{value:g}: expected a number of seconds above 0")
    return value


def serve(
    models: Annotated[
        list[str], typer.Argument(help="MLflow model URIs such as models:/name/3 or models:/name@alias, or NAME=URI.")
    ],
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.")] = 8080,
    reuse_port: Annotated[
        bool, typer.Option("--reuse-port", help="Let several servers share the port, such as one for each GPU.")
    ] = False,
    front_ends: Annotated[
        int, typer.Option(help="Processes that speak HTTP for the one that has the GPU; 0: it does so itself.")
    ] = 0,
    device: Annotated[str, typer.Option(help="A CUDA device ordinal, several like 0,1, all, or own.")] = "",
    model_config: Annotated[str, typer.Option(help='Load settings as JSON, like \'{"runtime": "auto"}\'.')] = "",
    follow_aliases: Annotated[float, typer.Option(help="Seconds between two looks where aliases lead; 0: never.")] = 0,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests at once before the server answers 429.")] = 1024,
    max_body_mib: Annotated[
        int, typer.Option(min=1, help="The largest body; a larger one is answered with 413.")
    ] = 256,
    max_unpacked_mib: Annotated[
        int,
        typer.Option(min=1, help="The largest table that parquet may unpack to; a larger one is answered with 413."),
    ] = 512,
    max_pending_mib: Annotated[
        int, typer.Option(min=1, help="All bodies at once, before the server answers 429.")
    ] = 2048,
    timeout: Annotated[
        float, typer.Option(callback=_seconds, help="Seconds for a request before the server answers 504.")
    ] = 60,
    drain_seconds: Annotated[
        float, typer.Option(help="When asked to end: seconds to go on while saying that it is not ready.")
    ] = 0,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with API keys, one a line: requests have to bring one.")
    ] = None,
    shared_memory_prefix: Annotated[
        str | None, typer.Option(help="Let clients register shared memory whose name begins so. Default: none.")
    ] = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="Print a line of JSON for each request.")] = False,
    tracing: Annotated[bool, typer.Option("--tracing", help="By OpenTelemetry's ASGI instrumentation.")] = False,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="The key for HTTPS.")] = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="The certificate for HTTPS.")] = None,
    ssl_keyfile_password: Annotated[
        str | None, typer.Option(help="The password of the key.", envvar="MLFLOW_TRT_SSL_KEYFILE_PASSWORD")
    ] = None,
    ssl_ca_certs: Annotated[
        Path | None, typer.Option(help="Ask clients for a certificate that one of these signed.")
    ] = None,
) -> None:
    """Serve models over HTTP: the Open Inference Protocol (V2), and MLflow's /invocations beside it."""
    settings = parse_settings(model_config, "--model-config") or {}
    if device:
        settings["device"] = _parse_device(device)

    from mlflow_trt.deploy.serve.limits import Limits
    from mlflow_trt.deploy.serve.server import ServeOptions
    from mlflow_trt.deploy.serve.server import serve as run

    options = ServeOptions(
        host=host,
        port=port,
        reuse_port=reuse_port,
        front_ends=front_ends,
        settings=settings,
        follow_aliases=follow_aliases,
        limits=Limits(
            requests=max_requests,
            body_bytes=max_body_mib * _MIB,
            unpacked_bytes=max_unpacked_mib * _MIB,
            pending_bytes=max_pending_mib * _MIB,
            seconds=timeout,
        ),
        drain_seconds=drain_seconds,
        api_key_file=api_key_file,
        shared_memory_prefix=shared_memory_prefix,
        access_log=access_log,
        tracing=tracing,
        ssl_keyfile=ssl_keyfile,
        ssl_certfile=ssl_certfile,
        ssl_keyfile_password=ssl_keyfile_password,
        ssl_ca_certs=ssl_ca_certs,
    )
    if not run(models, options, lambda text: typer.echo(printable(text), err=True)):
        raise typer.Exit(1)


def _parse_device(text: str) -> Any:
    """`own`, `all`, `1` or `0,1`."""
    if text in {"own", "all"}:
        return text
    try:
        return json.loads(f"[{text}]" if "," in text else text)
    except ValueError:
        raise typer.BadParameter(f"--device: {text!r}: expected a number, several like 0,1, all, or own") from None
