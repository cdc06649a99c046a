"""What goes over the wire to MLflow's scoring server and comes back: requests, answers, and answers that are errors.

No input or output happens here, and MLflow is not imported: clients start in a fraction of a second.
"""

from __future__ import annotations

import ast
import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlflow_trt.core.arrays import Array

if TYPE_CHECKING:
    from mlflow_trt.errors import MlflowTrtError

Shape = tuple[int, ...]
Inputs = Mapping[str, Any]
"""By name an array, a number, nested lists, or a sequence of `bytes`, one for each row."""

SHAPES_KEY = "mlflow_trt_shapes"
"""In `DataFrame.attrs`: the shapes of arrays whose rows were made flat to fit a table, by name of column.

Who sends it wants arrays back, not rows.
"""

PARQUET = "application/vnd.apache.parquet"
JSON = "application/json"

# What MLflow says to a table for a model that wants something a table cannot hold.
_NO_TABLE = "For pandas dataframe input, the first dimension of shape must be a variable dimension"

_FAILED_TO_PREDICT = "Failed to predict data '"
_FAILED_TO_ENFORCE = "Failed to enforce schema of data '"
_LONGEST_TEXT = 2000
_SAYING = ("message", "error", "detail")  # MLflow's, the Open Inference Protocol's, and those of proxies

# An input in the text of a signature, as MLflow writes it: 'x': Tensor('float32', (-1, 3))
_DIM = re.compile(r"-?\d+")
_LONGEST_SIGNATURE = 1 << 20
_TENSOR = re.compile(r"""(?P<name>'[^']*'|"[^"]*"): Tensor\('(?P<dtype>\w+)', (?P<shape>\([-\d, ]*\))\)""")


class Tensor(NamedTuple):
    """An input in a model's signature; -1 for any size."""

    dtype: str
    shape: Shape


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is sent, and where to. `headers` are those beside the content type."""

    content: bytes
    content_type: str
    method: str = "POST"
    path: str = "/invocations"
    headers: Mapping[str, str] = field(default_factory=dict)


def fits_table(inputs: Inputs) -> bool:
    """Whether inputs can go as a table, that is as parquet: all are arrays or `bytes` with one number of rows.

    Lists and numbers have no dtype, and only in JSON does MLflow give them one.
    """
    rows = set()
    for value in inputs.values():
        if is_bytes(value):
            rows.add(len(value))
        elif isinstance(value, np.ndarray) and value.ndim > 0 and value.size > 0:
            rows.add(value.shape[0])
        else:
            return False
    return len(rows) == 1


def check_table(inputs: Inputs) -> None:
    """Raise InputError where inputs do not fit a table."""
    if not fits_table(inputs):
        from mlflow_trt.errors import InputError

        raise InputError(
            "these inputs do not fit a table, which parquet and bytes need: each must be an array or a list of bytes, "
            "all with the same number of rows, which is not 0"
        )


def parquet_request(inputs: Inputs, signature: Mapping[str, Tensor] | None = None) -> Request:
    """Inputs as a table: a column for each, a row for each index of axis 0, whose cells are flat arrays.

    The shapes of the arrays go along, where pandas finds them. Where the model has a `signature`, MLflow comes first,
    reshapes cells by it and casts those that are numbers to its dtype, whatever is lost, but leaves arrays as they are;
    so, where it has another dtype, a number goes as an array of one.

    Raises InputError where inputs do not fit a table, and MissingDependencyError without pyarrow.
    """
    check_table(inputs)
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        from mlflow_trt.errors import MissingDependencyError

        raise MissingDependencyError(
            "pyarrow is not installed: `pip install 'mlflow-trt[client]'`", packages=("pyarrow",)
        ) from error

    wanted = {name: tensor.dtype for name, tensor in (signature or {}).items()}
    columns = {name: _column(name, value, wanted.get(name), pa) for name, value in inputs.items()}
    fields = [pa.field(name, column.type, nullable=False) for name, column in columns.items()]
    shapes = {name: list(np.shape(value)) for name, value in inputs.items() if not is_bytes(value)}
    attributes = {"PANDAS_ATTRS": json.dumps({SHAPES_KEY: shapes})}  # as DataFrame.to_parquet writes them
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table(list(columns.values()), schema=pa.schema(fields, metadata=attributes)),
        sink,
        compression="none",  # floats hardly compress, and it would cost more than a fast network
        use_dictionary=False,
        write_statistics=False,
    )
    return Request(content=sink.getvalue().to_pybytes(), content_type=PARQUET)


def json_request(inputs: Inputs) -> Request:
    """Inputs of any form as MLflow's `inputs`; with `bytes` among them, as base64 in its `dataframe_split`."""
    columns = {name: _listed(name, value) for name, value in inputs.items()}
    content: dict[str, Any] = {"inputs": columns}
    if any(map(is_bytes, inputs.values())):  # MLflow decodes base64 in tables only
        check_table(inputs)
        content = {"dataframe_split": {"columns": list(columns), "data": list(zip(*columns.values(), strict=True))}}
    return Request(content=json.dumps(content).encode(), content_type=JSON)


def invocation_request(data: Any, params: Mapping[str, Any] | None = None) -> Request:
    """Whatever MLflow's server takes, as it stands: a DataFrame as `dataframe_split`, anything else as `inputs`.

    Raises InputError where JSON has nothing for it.
    """
    content: dict[str, Any] = {"inputs": data}
    if type(data).__module__.partition(".")[0] == "pandas" and hasattr(data, "columns"):
        cells = data.astype(object).where(data.notna(), None)
        content = {"dataframe_split": {"columns": list(data), "index": list(data.index), "data": cells.values.tolist()}}
    if params is not None:
        content["params"] = dict(params)
    try:
        return Request(content=json.dumps(content, default=_plain, allow_nan=False).encode(), content_type=JSON)
    except (TypeError, ValueError, RecursionError) as error:
        from mlflow_trt.errors import InputError

        raise InputError(f"this cannot be sent as JSON: {error}") from error


def signature_request() -> Request:
    """What no model takes: MLflow refuses it, and says what the signature is, before the model sees it."""
    return Request(content=b'{"inputs": {}}', content_type=JSON)


def signature_in(body: bytes) -> dict[str, Tensor]:
    """The inputs by name, as far as an answer to `signature_request` tells them.

    Models without tensors in their signature, and servers with MLFLOW_DISABLE_SCHEMA_DETAILS, tell none.
    """
    text = body.decode(errors="replace")
    try:
        text = str(json.loads(text)["message"])
        return {
            ast.literal_eval(match["name"]): Tensor(match["dtype"], tuple(map(int, _DIM.findall(match["shape"]))))
            for match in _TENSOR.finditer(text[:_LONGEST_SIGNATURE])
        }
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError):
        return {}


def misshapen(inputs: Inputs, signature: Mapping[str, Tensor]) -> dict[str, str]:
    """By name, what is wrong with arrays of another shape than the signature's: in a table, MLflow reshapes rows."""
    return {
        name: f"input {name!r} has the shape {np.shape(value)}; the model's signature wants {signature[name].shape}"
        for name, value in inputs.items()
        if name in signature and not is_bytes(value) and not _has_shape(value, signature[name].shape)
    }


def check_shapes(inputs: Inputs, signature: Mapping[str, Tensor]) -> None:
    """Raise InputShapeError where `misshapen` finds something."""
    if wrong := misshapen(inputs, signature):
        from mlflow_trt.errors import InputShapeError

        raise InputShapeError("; ".join(wrong.values()), tensor=next(iter(wrong)))


def wants_json(status: int, body: bytes) -> bool:
    """Whether an answer says that parquet cannot serve: the server is too old, or the model's inputs fit no table."""
    return status == 415 or (status == 400 and _NO_TABLE.encode() in body)


def decode_answer(body: bytes, dtypes: Mapping[str, npt.DTypeLike] | None = None) -> dict[str, Array]:
    """The arrays of an answer, by name of output.

    A server with `answers="base64"` tells dtype and shape of each. Otherwise they are those of JSON: int64, float64 and
    bool, unless `dtypes` names others. An answer that names no outputs is one, called `predictions`.

    Raises ServerError where the body is no answer of a scoring server.
    """
    try:
        return _arrays(predictions_in(body), dtypes or {})
    # Rows that make no array.
    except (ValueError, KeyError, TypeError, RecursionError, MemoryError):
        raise _no_answer(body) from None


def predictions_in(body: bytes) -> Any:
    """What an answer says, as JSON has it. Raises ServerError where the body is no answer of a scoring server."""
    try:
        return json.loads(body)["predictions"]
    # No JSON, or other JSON, or nested without an end.
    except (ValueError, KeyError, TypeError, RecursionError, MemoryError):
        raise _no_answer(body) from None


def _no_answer(body: bytes) -> MlflowTrtError:
    from mlflow_trt.errors import ServerError

    return ServerError(
        f"the answer is none of MLflow's scoring server: {shortened(body)}; check the address", status=200
    )


def packed(array: Array) -> dict[str, Any]:
    """What a server with `answers="base64"` says for an output; MLflow writes the `bytes` as base64.

    Little-endian, C-contiguous; dtype by numpy's name.
    """
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return {"dtype": array.dtype.name, "shape": list(array.shape), "base64": little.tobytes()}


def error_of(status: int, body: bytes) -> MlflowTrtError:
    """What an answer that is an error would have raised in this process, without the data that MLflow quotes in it."""
    from mlflow_trt.errors import InputError, OutOfMemoryError, ServerError, ServerTimeoutError

    text = _message(body)
    if status in {400, 413, 422}:
        return InputError(f"the server refused the input: {text}")
    if status == 429:
        return OutOfMemoryError(f"the server has no room for this now: {text}; send fewer rows, or again later")
    if status in {408, 504}:
        return ServerTimeoutError(
            f"the server gave up: {text}; raise its timeout (--timeout of either server), or send fewer rows",
            status=status,
        )
    return ServerError(f"the server answered {status}: {text}", status=status)


def is_bytes(value: Any) -> bool:
    """Whether it is a sequence of `bytes`, which numpy would make strings of that lose their last zeros."""
    if isinstance(value, np.ndarray):
        return value.dtype == object and value.ndim == 1 and len(value) > 0 and all(map(_is_cell, value))
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_cell, value))


def array_of(name: str, value: Any) -> Array:
    """The value of an input as an array. Raises what `core.inputs.array_of` does."""
    try:
        if not np.ma.is_masked(value):
            return np.asarray(value)
    except ValueError:
        pass
    from mlflow_trt.core import inputs  # which loads MLflow

    return inputs.array_of(value, name)


def _plain(value: Any) -> Any:
    """For what JSON does not know: numpy's arrays and numbers, bytes as base64, dates and times by ISO 8601."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"JSON has nothing for {type(value).__name__}")


def _is_cell(value: Any) -> bool:
    return isinstance(value, (bytes, bytearray, memoryview))


def _has_shape(value: Any, wanted: Shape) -> bool:
    shape = np.shape(value)
    return len(shape) == len(wanted) and all(dim in (-1, size) for size, dim in zip(shape, wanted, strict=True))


def _column(name: str, value: Any, wanted: str | None, pa: Any) -> Any:
    if is_bytes(value):
        return pa.array([bytes(cell) for cell in value], pa.binary())
    array = _native(name, value)
    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    if array.ndim == 1 and wanted in {None, array.dtype.name}:
        return flat
    rows = array.shape[0]
    # Nothing is null: saying so spares the levels that tell, for each number.
    of = pa.field("element", flat.type, nullable=False)
    offsets = np.arange(rows + 1, dtype=np.int64) * (array.size // rows)
    if offsets[-1] < 2**31:
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), flat, type=pa.list_(of))
    return pa.LargeListArray.from_arrays(pa.array(offsets), flat, type=pa.large_list(of))


def _listed(name: str, value: Any) -> Any:
    if is_bytes(value):
        return [base64.b64encode(cell).decode() for cell in value]
    array = _native(name, value)
    if 0 in array.shape[:-1]:
        from mlflow_trt.errors import InputShapeError

        raise InputShapeError(
            f"input {name!r} has the shape {array.shape}, which JSON cannot tell; send one row or more", tensor=name
        )
    return array.tolist()


def _native(name: str, value: Any) -> Array:
    """An array of numbers in a type that parquet, JSON and signatures know."""
    array = array_of(name, value)
    if array.dtype.name == "bfloat16":
        return array.astype(np.float32)
    if array.dtype.kind not in "biuf":
        from mlflow_trt.errors import InputDtypeError

        raise InputDtypeError(
            f"input {name!r} is of dtype {array.dtype}; expected numbers, bools, or a list of bytes", tensor=name
        )
    return array.astype(array.dtype.newbyteorder("="), copy=False)  # pyarrow knows no other byte order


def _arrays(answer: Any, dtypes: Mapping[str, npt.DTypeLike]) -> dict[str, Array]:
    if isinstance(answer, list) and answer and all(isinstance(row, dict) for row in answer):
        answer = {name: [row[name] for row in answer] for name in answer[0]}  # a DataFrame, as records
    if not isinstance(answer, dict):
        answer = {"predictions": answer}
    return {name: _decoded(value, dtypes.get(name)) for name, value in answer.items()}


def _decoded(value: Any, dtype: npt.DTypeLike | None) -> Array:
    if isinstance(value, dict) and value.keys() == {"dtype", "shape", "base64"}:
        known = np.dtype(value["dtype"])
        if known.kind not in "biuf" and known.name != "bfloat16":
            raise ValueError(f"{known} is no dtype of an output")
        raw = np.frombuffer(base64.b64decode(value["base64"]), known.newbyteorder("<"))
        array: Array = raw.reshape(value["shape"]).astype(known)  # a copy, which may be written to
        return array if dtype is None else array.astype(dtype)
    return np.asarray(value, dtype)


def _message(body: bytes) -> str:
    try:
        answer = json.loads(body)
        told = [answer[key] for key in _SAYING if answer.get(key)] if isinstance(answer, dict) else []
        text = told[0] if told else answer
    except (ValueError, RecursionError):
        return shortened(body)
    text = str(text).partition("\nInput: \n")[0]
    if text.startswith(_FAILED_TO_PREDICT):
        head, found, reason = text.partition("\nError: ")
        if found and head.rstrip(" ").endswith("'."):
            text = reason
    if text.startswith(_FAILED_TO_ENFORCE):
        # From the end: what is quoted of the data may look like anything.
        quoted, found, reason = text.rpartition("'. Error: ")
        _, is_there, schema = quoted.rpartition("' with schema '")
        if found and is_there:
            return shortened(f"{reason} The model wants {schema}")
    return shortened(text)


def shortened(text: str | bytes) -> str:
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    text = text.strip() or "(nothing)"
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} ..."
