"""mlflow-trt add-engine"""

from __future__ import annotations

from typing import Annotated

import typer

from mlflow_trt.cli.options import results_on_stdout
from mlflow_trt.cli.render import print_record
from mlflow_trt.cli.tables import print_json


def add_engine(
    uri: Annotated[str, typer.Argument(help="A registered version: models:/name/version or models:/name@alias.")],
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Compute capability to build for, like sm120, with TensorRT-RTX. Default: the GPU of this machine."
        ),
    ] = None,
    register_as: Annotated[str, typer.Option(help="Register it under this name instead of the model's own.")] = "",
    alias: Annotated[str, typer.Option(help="Set this alias on the version, after everything else succeeded.")] = "",
    store_kernels: Annotated[
        bool,
        typer.Option(
            "--store-kernels",
            help="Compile the kernels of TensorRT-RTX on this machine's GPU, and store them with the engine.",
        ),
    ] = False,
    dynamic_plugins: Annotated[
        list[str] | None,
        typer.Option(help="A library with plugins that the model's engines need; may be repeated. Not TensorRT-RTX."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make a new version of a model that has an engine for this machine, or other GPUs, too."""
    from mlflow_trt.flavor.fetch import read_record
    from mlflow_trt.registry.add_engine import extended_version
    from mlflow_trt.store.record import record_to_dict

    extended = extended_version(
        uri,
        targets=target or (),
        registered_model_name=register_as or None,
        alias=alias or None,
        store_kernels=store_kernels,
        plugins=dynamic_plugins or (),
    )
    with results_on_stdout(as_json), extended as version:
        made = f"models:/{version.name}/{version.version}"
        record = read_record(made)
    if as_json:
        print_json({"uri": made, **record_to_dict(record)})
    else:
        print_record(made, record)
