"""What reads something from outside: each takes any input, and lets through errors that are none of its typed ones.

tests/project/test_properties.py calls them with what hypothesis makes, tests/tools/fuzz.py with what atheris makes.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import tempfile
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import networks
import pandas as pd
import typer
from mlflow.exceptions import MlflowException
from mlflow.models import Model

import mlflow_trt
from mlflow_trt import MlflowTrtError, Recipe
from mlflow_trt.cli.options import combine_shapes, parse_batch, parse_numbers, parse_settings, parse_shapes
from mlflow_trt.cli.trtexec import translate
from mlflow_trt.convert.onnx.model import read_onnx
from mlflow_trt.core import wire
from mlflow_trt.core.printable import printable
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.deploy.serve.limits import Limits
from mlflow_trt.deploy.serve.mlflow_wire import invoke
from mlflow_trt.deploy.serve.model_source import ModelSource
from mlflow_trt.deploy.serve.problems import HttpError
from mlflow_trt.deploy.serve.protocol import Signature, parse_request
from mlflow_trt.deploy.serve.served_model import ServedModel
from mlflow_trt.errors import (
    ArtifactError,
    InputError,
    OnnxModelError,
    OptionError,
    RecipeError,
    ServerError,
    UnsupportedModelError,
)
from mlflow_trt.flavor.fetch import read_mlmodel
from mlflow_trt.flavor.pyfunc import PyfuncModel
from mlflow_trt.runtime.onnxruntime_session import OnnxRuntimeSession
from mlflow_trt.store.folder import read_folder
from mlflow_trt.store.golden import from_npz


@functools.cache
def folder() -> Path:
    """One for the whole run, and for one input at a time."""
    return Path(tempfile.mkdtemp(prefix="mlflow-trt-fuzz-"))


def onnx_file(data: bytes) -> None:
    path = folder() / "model.onnx"
    path.write_bytes(data)
    with contextlib.suppress(OnnxModelError, UnsupportedModelError):
        read_onnx(path, folder())


def record(data: bytes) -> None:
    (folder() / "mlflow_trt.json").write_bytes(data)
    with contextlib.suppress(ArtifactError):
        read_folder(folder())


def mlmodel(data: bytes) -> None:
    (folder() / "MLmodel").write_bytes(data)
    with contextlib.suppress(ArtifactError, MlflowException):
        read_mlmodel(str(folder()))


def golden(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        from_npz(data)


def recipe(options: Mapping[str, Any]) -> None:
    with contextlib.suppress(RecipeError):
        Recipe(**{name: value for name, value in options.items() if name in Recipe.__dataclass_fields__})


def settings(values: Mapping[str, Any]) -> None:
    with contextlib.suppress(OptionError):
        LoadSettings.of(values)


def command_line(text: str) -> None:
    """The syntaxes of the command line's own, whatever they are given."""
    for parse in (
        parse_batch,
        translate,
        lambda text: parse_numbers(text, "--batch"),
        lambda text: parse_shapes(text, "--min-shapes"),
        lambda text: parse_settings(text, "--model-config"),
        lambda text: combine_shapes(text, text, text),
    ):
        with contextlib.suppress(typer.BadParameter, MlflowTrtError):
            parse(text)
    shown = printable(text)
    shown.encode()
    assert not {unicodedata.category(one) for one in shown} & {"Cc", "Cs"} or set(shown) & set("\n\t")


@functools.cache
def served() -> ServedModel:
    """A product of float32 rows of 16, as `mlflow-trt serve` has it, on ONNX Runtime."""
    source = read_onnx(networks.product(), folder())
    session = OnnxRuntimeSession(source.path, source.inputs, source.outputs)
    return ServedModel(ModelSource(name="product", uri="product", version="1"), session, Model(), PyfuncModel(session))


def pyfunc_input(data: Any) -> None:
    with contextlib.suppress(InputError):
        served().pyfunc.predict(data)


def infer_body(data: bytes, header_length: int | None = None) -> None:
    session = served().session
    with contextlib.suppress(InputError):
        request = parse_request(
            memoryview(data), header_length, Signature(inputs=session.inputs, outputs=session.outputs)
        )
        session.run(request.feeds)


def invocations_body(data: bytes, content_type: str = wire.JSON) -> None:
    with contextlib.suppress(HttpError, MlflowException):
        invoke(served(), memoryview(data), content_type.encode(), Limits().unpacked_bytes)


def answer(data: bytes) -> None:
    """What the client makes of a server's answer."""
    with contextlib.suppress(ServerError):
        wire.decode_answer(data)
    assert isinstance(wire.error_of(400, data), InputError)
    assert isinstance(wire.error_of(500, data), ServerError)
    wire.signature_in(data)


def _of_json(target: Callable[[Any], None]) -> Callable[[bytes], None]:
    """For values, of which the fuzzer makes JSON."""

    def of_bytes(data: bytes) -> None:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(values := json.loads(data), dict):
                target(values)

    return of_bytes


BY_BYTES: dict[str, Callable[[bytes], None]] = {
    "onnx": onnx_file,
    "record": record,
    "mlmodel": mlmodel,
    "golden": golden,
    "recipe": _of_json(recipe),
    "settings": _of_json(settings),
    "command_line": lambda data: command_line(data.decode(errors="surrogateescape")),
    "pyfunc": _of_json(pyfunc_input),
    "infer": infer_body,
    "infer_binary": lambda data: infer_body(data[1:], data[0] if data else None),
    "invocations": invocations_body,
    "parquet": lambda data: invocations_body(data, wire.PARQUET),
    "answer": answer,
}


REQUEST = {
    "id": "1",
    "parameters": {"timeout": 1000, "binary_data_output": True},
    "inputs": [{"name": "x", "shape": [1, 16], "datatype": "FP32", "parameters": {}, "data": [0.5] * 16}],
    "outputs": [{"name": "y", "parameters": {"binary_data": False}}],
}


def seeds() -> dict[str, list[bytes]]:
    """A valid input or two for each target, which fuzzing begins with."""
    table = io.BytesIO()
    pd.DataFrame({"x": [[0.5] * 16] * 2}).to_parquet(table)
    model = folder() / "model"
    if not model.exists():
        mlflow_trt.save_model(networks.product(), model, batch=(1, 2, 4))
    rows = [[0.5] * 16]
    return {
        "onnx": [networks.product().SerializeToString(), networks.scaled_by_a_scalar().SerializeToString()],
        "record": [(model / "mlflow_trt.json").read_bytes()],
        "mlmodel": [(model / "MLmodel").read_bytes()],
        "golden": [(model / "golden.npz").read_bytes()],
        "recipe": [b'{"precision": "fp16", "batch": [1, 2, 3]}', b'{"shapes": {"x": [[1, 2], [3, 4], [5, 6]]}}'],
        "settings": [b'{"runtime": "auto", "device": [0, 1]}', b'{"max_batch_delay_ms": 2.5}'],
        "command_line": [b"x:1x3x224x224,'a,b':1", b"trtexec --onnx=a.onnx --minShapes=x:1x2 --fp16", b"1:8:64"],
        "pyfunc": [json.dumps({"x": rows}).encode()],
        "infer": [json.dumps(REQUEST).encode()],
        "invocations": [json.dumps({"inputs": {"x": rows}}).encode()],
        "parquet": [table.getvalue()],
        "answer": [b'{"predictions": {"y": [[1.5]]}}', b'{"message": "Failed to predict data \'x\'. \\nError: y"}'],
    }
