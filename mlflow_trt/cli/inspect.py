"""mlflow-trt inspect"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlflow_trt.cli.options import results_on_stdout
from mlflow_trt.cli.render import print_record
from mlflow_trt.cli.render_measures import print_layers
from mlflow_trt.cli.tables import print_json

if TYPE_CHECKING:
    from mlflow_trt.store.record import Record


def inspect(
    uri: Annotated[str, typer.Argument(help="An MLflow model URI such as models:/name/version, or a folder.")],
    layers: Annotated[
        bool,
        typer.Option("--layers", help="Show the layers, of the engine and with times; without a GPU of its network."),
    ] = False,
    html: Annotated[Path | None, typer.Option(help="With --layers: write them to this HTML page.")] = None,
    commands: Annotated[
        bool, typer.Option("--commands", help="Show how to run the engines in trtexec, Polygraphy and Nsight Systems.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole record, or the layers, as JSON.")] = False,
) -> None:
    """Show a model's recipe, profiles, engines and digests, which needs neither a GPU nor TensorRT; or its layers."""
    if layers or html is not None:
        _layers(uri, html, as_json=as_json)
        return
    from mlflow_trt.flavor.fetch import read_record_and_digest
    from mlflow_trt.store.record import record_to_dict

    with results_on_stdout(as_json):
        record, digest = read_record_and_digest(uri)
    if commands:
        _commands(uri, record, as_json=as_json)
    elif as_json:
        print_json({"uri": uri, "digest": digest, **record_to_dict(record)})
    else:
        print_record(uri, record, digest)


def _commands(uri: str, record: Record, *, as_json: bool) -> None:
    from mlflow_trt.deploy.run_elsewhere import commands_for
    from mlflow_trt.flavor.fetch import local_path

    folder = local_path(uri)
    found = {
        engine.file: commands_for(record, engine, str(folder / engine.file) if folder.is_dir() else engine.file)
        for engine in record.engines
    }
    if as_json:
        print_json({file: {one.tool: one.command for one in commands} for file, commands in found.items()})
        return
    if not folder.is_dir():
        typer.echo(f"mlflow artifacts download --artifact-uri {uri} --dst-path .\n")
    for file, commands in found.items():
        typer.echo(f"{file}\n" + "".join(f"  {command.command}\n" for command in commands))


def _layers(uri: str, html: Path | None, *, as_json: bool) -> None:
    from mlflow_trt.measure.layers import page, read_layers

    with results_on_stdout(as_json):
        report = read_layers(uri)
        if html is not None:
            html.write_text(page(report))
    if as_json:
        print_json(report.to_dict())
    else:
        print_layers(report)
