"""mlflow-trt import-engine"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from mlflow_trt.cli.options import combine_profiles, results_on_stdout
from mlflow_trt.cli.render import print_record
from mlflow_trt.cli.tables import print_json


def import_engine(
    plan: Annotated[Path, typer.Argument(help="The plan: what trtexec --saveEngine or Polygraphy wrote.")],
    register_as: Annotated[str, typer.Option(help="Register the result as a version of this model.")] = "",
    output: Annotated[Path | None, typer.Option(help="Write the result to this new folder instead.")] = None,
    input_: Annotated[
        list[str] | None,
        typer.Option(
            "--input", help="An input like x:float32:-1x3x224x224; repeated for each. Default: the engine is asked."
        ),
    ] = None,
    output_tensor: Annotated[
        list[str] | None, typer.Option("--output-tensor", help="An output, likewise: y:float32:-1x1000.")
    ] = None,
    min_shapes: Annotated[list[str] | None, typer.Option(help="Smallest shapes, like x:1x3x224x224.")] = None,
    opt_shapes: Annotated[list[str] | None, typer.Option(help="Usual shapes.")] = None,
    max_shapes: Annotated[list[str] | None, typer.Option(help="Largest shapes.")] = None,
    split_batches: Annotated[
        bool,
        typer.Option("--split-batches", help="Rows do not depend on each other: batches may be split and padded."),
    ] = False,
    target: Annotated[
        list[str] | None, typer.Option(help="Compute capability that it was built for, like sm86; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make an MLflow model of a plan of TensorRT or TensorRT-RTX that exists, without the ONNX model it was made of.

    It runs where the plan runs; it is never rebuilt.
    """
    if bool(register_as) == (output is not None):
        raise typer.BadParameter("give either --register-as NAME or --output DIR")
    from mlflow_trt.flavor.fetch import read_record
    from mlflow_trt.flavor.import_engine import log_engine, save_engine
    from mlflow_trt.store.record import record_to_dict

    keywords = {
        "inputs": dict(parse_tensor(text, "--input") for text in input_) if input_ else None,
        "outputs": dict(parse_tensor(text, "--output-tensor") for text in output_tensor) if output_tensor else None,
        "shapes": combine_profiles(min_shapes or (), opt_shapes or (), max_shapes or ()) or None,
        "splits_batches": split_batches,
        "targets": target or None,
    }
    with results_on_stdout(as_json):
        if output is not None:
            save_engine(plan, output, **keywords)  # type: ignore[arg-type]
            uri = str(output)
        else:
            info = log_engine(plan, registered_model_name=register_as, **keywords)  # type: ignore[arg-type]
            uri = f"models:/{register_as}/{info.registered_model_version}"
        record = read_record(uri)
    if as_json:
        print_json({"uri": uri, **record_to_dict(record)})
    else:
        print_record(uri, record)


def parse_tensor(text: str, option: str) -> tuple[str, tuple[str, tuple[int, ...]]]:
    """`x:float32:-1x3x224x224`, or `x:float32:` for a scalar; a name may contain colons."""
    found = re.fullmatch(r"(.+):(\w+):((?:-?\d+(?:x-?\d+)*)?)", text)
    if found is None:
        raise typer.BadParameter(f"{option}: {text!r}: expected name:dtype:dims, like x:float32:-1x3x224x224")
    name, dtype, dims = found.groups()
    return name, (dtype, tuple(map(int, dims.split("x"))) if dims else ())
