"""mlflow-trt convert"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mlflow_trt.cli.options import combine_shapes, parse_batch, results_on_stdout
from mlflow_trt.cli.render import print_json, print_record


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="An ONNX file, or the MLflow URI of a model of flavor onnx: models:/name/version, "
            "models:/name@alias, runs:/..."
        ),
    ],
    register_as: Annotated[str, typer.Option(help="Register the result as a version of this model.")] = "",
    output: Annotated[Path | None, typer.Option(help="Write the result to this new folder instead.")] = None,
    precision: Annotated[str, typer.Option(help="fp32 or tf32.")] = "fp32",
    batch: Annotated[str, typer.Option(help="Rows along axis 0: 64, or min:opt:max like 1:8:64.")] = "",
    min_shapes: Annotated[str, typer.Option(help="Smallest shapes, like x:1x3x224x224,y:1x16.")] = "",
    opt_shapes: Annotated[str, typer.Option(help="Usual shapes.")] = "",
    max_shapes: Annotated[str, typer.Option(help="Largest shapes.")] = "",
    target: Annotated[
        list[str] | None,
        typer.Option(help="Compute capability to build for, like sm86. TensorRT-RTX only; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Convert an ONNX model, from a file or from MLflow, into an MLflow model with a TensorRT engine."""
    if bool(register_as) == (output is not None):
        raise typer.BadParameter("give either --register-as NAME or --output DIR")
    from mlflow_trt.artifact import read_folder, record_to_dict
    from mlflow_trt.flavor import read_record, save_model
    from mlflow_trt.registry import convert_model_version
    from mlflow_trt.sources.opened import opened_source

    recipe: dict[str, Any] = {
        "precision": precision,
        "batch": parse_batch(batch) if batch else None,
        "shapes": combine_shapes(min_shapes, opt_shapes, max_shapes) or None,
        "targets": target or None,
    }
    with results_on_stdout(as_json):
        if output is None:
            version = convert_model_version(source, register_as, **recipe)
            uri = f"models:/{version.name}/{version.version}"
        else:
            with opened_source(source) as model:
                save_model(model.path, output, signature=model.signature, lineage=model.lineage, **recipe)
            uri = str(output)
        record = read_record(uri) if output is None else read_folder(output).record
    if as_json:
        print_json({"uri": uri, **record_to_dict(record)})
    else:
        print_record(uri, record)
