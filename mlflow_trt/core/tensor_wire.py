"""What goes over the wire to a server of the Open Inference Protocol and comes back, as a client sees it.

No input or output happens here, and MLflow is not imported unless something goes wrong: clients start in a fraction of
a second. Tensors go and come as bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from mlflow_trt.core import open_inference as oip
from mlflow_trt.core import wire
from mlflow_trt.core.arrays import Array, Outputs

HEADER_LENGTH = oip.HEADER_LENGTH

_OURS = "mlflow-trt"
_BINARY_TENSORS = "binary_tensor_data"
_PLAIN: Mapping[str, str] = {"accept-encoding": "identity"}  # Triton would compress tensors, which takes long


class Model(NamedTuple):
    """A model of a server: where it is asked, and its inputs by name, with the protocol's types."""

    path: str
    inputs: dict[str, wire.Tensor]


def server_request() -> wire.Request:
    """What server is this?"""
    return _question("GET", "/v2")


def index_request() -> wire.Request:
    """Which models are there?"""
    return _question("POST", "/v2/repository/index", b"{}")


def model_request(name: str) -> wire.Request:
    """What does the model NAME, or NAME/VERSION, take?"""
    return _question("GET", _path(name))


def described_server(body: bytes) -> str | None:
    """The name in an answer to `server_request`, or None for a server that does not take tensors as bytes."""
    told = _object(body)
    extensions = told.get("extensions")
    return str(told.get("name")) if isinstance(extensions, list) and _BINARY_TENSORS in extensions else None


def default_model(body: bytes, server: str) -> str:
    """The model to ask where none was named: the first of ours, as for /invocations, and the only one of others.

    Args:
        body: an answer to `index_request`.
        server: as it calls itself.

    Raises OptionError where it is not clear which, ServerError where there is none.
    """
    try:
        ready = [model for model in json.loads(body) if model.get("state") != "UNAVAILABLE"]
        names = list(dict.fromkeys(str(model["name"]) for model in ready))
    except (ValueError, KeyError, TypeError, AttributeError):
        names = []
    if len(names) == 1 or (names and server == _OURS):
        return names[0]
    from mlflow_trt.errors import OptionError, ServerError

    if not names:
        raise ServerError("the server does not tell which models it has; name one with model=")
    raise OptionError(f"the server has several models; name one with model=: {', '.join(names)}", option="model")


def described_model(name: str, body: bytes) -> Model:
    """What the answer to `model_request` tells. Raises ServerError for any other body."""
    try:
        inputs = {
            str(tensor["name"]): wire.Tensor(str(tensor["datatype"]), tuple(map(int, tensor["shape"])))
            for tensor in _object(body)["inputs"]
        }
    except (ValueError, KeyError, TypeError):
        raise _no_answer(body, "describe a model") from None
    return Model(f"{_path(name)}/infer", inputs)


def arrays_of(inputs: wire.Inputs) -> dict[str, Any]:
    """Each value as an array, or as the `bytes` that it is a list of. Raises what `wire.array_of` does."""
    return {name: value if wire.is_bytes(value) else wire.array_of(name, value) for name, value in inputs.items()}


def infer_request(arrays: Mapping[str, Any], model: Model) -> wire.Request:
    """What `arrays_of` made, for the model to run; its outputs are asked for as bytes.

    Raises InputShapeError for arrays of other shapes than the model's, InputDtypeError where a number would not be the
    same in its type.
    """
    wire.check_shapes(arrays, {name: tensor for name, tensor in model.inputs.items() if tensor.dtype != oip.BYTES})
    described = []
    parts: list[bytes | memoryview] = []
    for name, value in arrays.items():
        wanted = model.inputs[name].dtype if name in model.inputs else None
        datatype, shape, data = _tensor(name, value, wanted)
        described.append({
            "name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(data)}
        })  # fmt: skip
        parts.append(data)
    header = json.dumps({"inputs": described, "parameters": {"binary_data_output": True}}).encode()
    headers = {**_PLAIN, HEADER_LENGTH: str(len(header))}
    return wire.Request(content=b"".join([header, *parts]), content_type=oip.BINARY, path=model.path, headers=headers)


def decode_answer(body: bytes, header_length: str | None, dtypes: Mapping[str, npt.DTypeLike]) -> Outputs:
    """The arrays of an answer by name of output, in the model's dtypes unless `dtypes` names others.

    Raises ServerError where the body is no answer of the protocol.
    """
    try:
        length = len(body) if header_length is None else int(header_length)
        rest = memoryview(body)[length:]
        outputs: Outputs = {}
        for tensor in json.loads(body[:length])["outputs"]:
            size = tensor.get("parameters", {}).get("binary_data_size")
            data, rest = (None, rest) if size is None else (rest[:size], rest[size:])
            array = _output(tensor, data)
            outputs[str(tensor["name"])] = array.astype(dtypes.get(tensor["name"], array.dtype))  # writable: a copy
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _no_answer(body[:2000], "tell outputs") from None
    return outputs


def _question(method: str, path: str, content: bytes = b"") -> wire.Request:
    return wire.Request(content=content, content_type=wire.JSON, method=method, path=path)


def _path(model: str) -> str:
    name, _, version = model.strip("/").partition("/")
    return f"/v2/models/{quote(name, safe='')}" + (f"/versions/{quote(version, safe='')}" if version else "")


def _object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body, or an empty one for any other."""
    try:
        told = json.loads(body)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _tensor(name: str, value: Any, wanted: str | None) -> tuple[str, list[int], bytes | memoryview]:
    """An input's type, shape and bytes."""
    if wire.is_bytes(value):
        cells = [bytes(cell) for cell in value]
        return oip.BYTES, [len(cells)], oip.packed_cells(cells)
    dtype = None if wanted in {None, oip.BYTES} else oip.dtype_of(str(wanted))
    array = _converted(name, value, dtype)
    return oip.datatype_of(array.dtype), list(array.shape), oip.raw(array)


def _converted(name: str, array: Array, wanted: np.dtype[np.generic] | None) -> Array:
    """In the model's dtype, where that loses nothing but a float's last digits."""
    if array.dtype == wanted:
        return array
    if array.dtype.name in oip.DATATYPES and wanted is None:
        return array.astype(array.dtype.newbyteorder("<"), copy=False)
    if wanted is not None and array.dtype.kind in "biuf":
        if np.can_cast(array.dtype, wanted, "safe"):
            return array.astype(wanted)
        if array.dtype.kind == wanted.kind == "f":
            with np.errstate(over="ignore"):
                narrowed = array.astype(wanted)
            if np.isfinite(narrowed).all():
                return narrowed
    # What is left is rare, or wrong. To look closer loads MLflow, for the errors that it knows.
    from mlflow_trt.core.inputs import convert_array
    from mlflow_trt.core.types import TensorSpec
    from mlflow_trt.errors import InputDtypeError

    if wanted is None:
        raise InputDtypeError(
            f"input {name!r} is of dtype {array.dtype}; expected numbers, bools, or a list of bytes", tensor=name
        )
    return convert_array(array, TensorSpec(name=name, dtype=wanted.name, shape=(None,) * array.ndim))


def _output(tensor: Mapping[str, Any], data: memoryview | None) -> Array:
    shape = [int(size) for size in tensor["shape"]]
    if tensor["datatype"] == oip.BYTES:
        cells = [str(cell).encode() for cell in tensor["data"]] if data is None else list(oip.unpacked_cells(data))
        texts = np.empty(len(cells), object)
        texts[:] = cells
        return texts.reshape(shape)
    dtype = oip.dtype_of(tensor["datatype"])
    if data is None:
        return np.asarray(tensor["data"], dtype).reshape(shape)
    return oip.array_of(data, dtype, shape)


def _no_answer(body: bytes, what: str) -> Exception:
    from mlflow_trt.errors import ServerError

    return ServerError(
        f"the answer is none of the Open Inference Protocol, which would {what}: {wire.shortened(body)}; check the "
        "address",
        status=200,
    )
