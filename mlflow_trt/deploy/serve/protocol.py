"""Requests and answers of the Open Inference Protocol, between bytes and arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from mlflow_trt.core import open_inference as oip
from mlflow_trt.core.arrays import Array, Feeds, Outputs, numpy_dtype
from mlflow_trt.core.inputs import array_of, check_bools, convert_array
from mlflow_trt.core.types import TensorSpec
from mlflow_trt.deploy.serve import json_text
from mlflow_trt.errors import InputDtypeError, InputError, InputShapeError, UnsupportedModelError

_MICROSECONDS = 1e6


class Regions(Protocol):
    """Memory that clients share with the server."""

    def view(self, name: str, offset: int, size: int) -> memoryview:
        """A part of a region. Raises InputError where there is none."""


class Wanted(NamedTuple):
    """An output that was asked for: as binary or JSON, or None for what the request says, or into shared memory."""

    name: str
    binary: bool | None
    region: memoryview | None
    parameters: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class InferRequest:
    """What a client asked for. `timeout` is in seconds; `outputs` is empty for all of them."""

    feeds: Feeds
    outputs: tuple[Wanted, ...] = ()
    id: str | None = None
    binary: bool = False
    timeout: float | None = None


class Answer(NamedTuple):
    """A body in parts, and how many bytes of it are JSON; None for all."""

    parts: list[bytes | memoryview]
    header_length: int | None

    @property
    def size(self) -> int:
        return sum(map(len, self.parts))


@dataclass(frozen=True, kw_only=True)
class Signature:
    """A model's inputs and outputs as the protocol has them.

    Rows of any input may come as BYTES, the numbers themselves, as binary columns of a DataFrame do; `binary` names
    those that are described so.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    binary: frozenset[str] = frozenset()
    _inputs: dict[str, TensorSpec] = field(init=False, repr=False)
    _outputs: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for spec in (*self.inputs, *self.outputs):
            if spec.dtype not in oip.DATATYPES:
                raise UnsupportedModelError(
                    f"{spec.name!r} is of dtype {spec.dtype}, which the Open Inference Protocol does not have; "
                    "cast it in the model"
                )
        object.__setattr__(self, "_inputs", {spec.name: spec for spec in self.inputs})
        object.__setattr__(self, "_outputs", frozenset(spec.name for spec in self.outputs))

    def described(self) -> dict[str, list[dict[str, Any]]]:
        """As `GET /v2/models/NAME` tells it."""

        def tensor(spec: TensorSpec) -> dict[str, Any]:
            shape = [-1 if size is None else size for size in spec.fixed]
            return {"name": spec.name, "datatype": oip.DATATYPES[spec.dtype], "shape": shape}

        inputs = [
            {"name": spec.name, "datatype": oip.BYTES, "shape": [-1]} if spec.name in self.binary else tensor(spec)
            for spec in self.inputs
        ]
        return {"inputs": inputs, "outputs": [tensor(spec) for spec in self.outputs]}

    def input(self, name: object) -> TensorSpec:
        """The input of that name. Raises InputError, which does not quote names of any length."""
        spec = self._inputs.get(name) if isinstance(name, str) else None
        if spec is None:
            wanted = "; ".join(map(str, self.inputs)) or "none"
            raise InputError(f"there is no input {quoted(name)}; the model wants {wanted}", tensor=str(name)[:100])
        return spec

    def check_output(self, name: object) -> str:
        if not isinstance(name, str) or name not in self._outputs:
            has = "; ".join(map(str, self.outputs))
            raise InputError(f"there is no output {quoted(name)}; the model has {has}", tensor=str(name)[:100])
        return name


def quoted(name: object) -> str:
    """A name that a client sent, short enough for an error."""
    text = repr(name)
    return text if len(text) <= 100 else f"{text[:100]}..."


def parse_request(
    body: memoryview, header_length: int | None, signature: Signature, regions: Regions | None = None
) -> InferRequest:
    """What the body asks for. Arrays are views of it, or of shared memory.

    Raises InputError, which names the tensor that is to blame and quotes no data.
    """
    if header_length is not None and not 0 < header_length <= len(body):
        raise InputError(
            f"{oip.HEADER_LENGTH} is {header_length}, and the body has {len(body)} bytes; expected how many of them "
            "are JSON"
        )
    request = json_text.read(body if header_length is None else body[:header_length])
    if not isinstance(request, dict):
        raise InputError("the body is no JSON object")
    parameters = _parameters(request, "the request")
    rest = _Rest(body[len(body) if header_length is None else header_length :])
    feeds: Feeds = {}
    for tensor in _objects(request, "inputs"):
        spec = signature.input(tensor.get("name"))
        if spec.name in feeds:
            raise InputError(f"input {spec.name!r} is there twice", tensor=spec.name)
        feeds[spec.name] = _input(tensor, spec, rest, regions)
    rest.check_read()
    seen: set[str] = set()
    outputs = tuple([_wanted(tensor, signature, seen, regions) for tensor in _objects(request, "outputs")])
    identity = request.get("id")
    if identity is not None and not isinstance(identity, str):
        raise InputError("id is no string")
    return InferRequest(
        feeds=feeds,
        outputs=outputs,
        id=identity,
        binary=_flag(parameters, "binary_data_output", "the request") or False,
        timeout=_timeout(parameters),
    )


def make_answer(request: InferRequest, name: str, version: str, outputs: Outputs) -> Answer:
    """The body that tells the outputs. Those for shared memory are written there; raises InputError for too little."""
    header: dict[str, Any] = {"model_name": name, "model_version": version}
    if request.id is not None:
        header["id"] = request.id
    parts: list[bytes | memoryview] = [b""]
    described: list[dict[str, Any]] = []
    may_be_nan = is_binary = False
    for wanted in request.outputs or [Wanted(output, None, None, {}) for output in outputs]:
        array = outputs[wanted.name]
        tensor: dict[str, Any] = {
            "name": wanted.name,
            "datatype": oip.datatype_of(array.dtype),
            "shape": list(array.shape),
        }
        if wanted.region is not None:
            _write(array, wanted)
            tensor["parameters"] = {**wanted.parameters, "shared_memory_byte_size": array.nbytes}
        elif request.binary if wanted.binary is None else wanted.binary:
            is_binary = True
            tensor["parameters"] = {"binary_data_size": array.nbytes}
            parts.append(oip.raw(array))
        else:
            numbers = tensor["data"] = oip.listed(array)
            may_be_nan |= array.dtype.kind not in "biu" and not all(map(math.isfinite, numbers))
        described.append(tensor)
    header["outputs"] = described
    parts[0] = json_text.write(header, may_be_nan=may_be_nan)
    return Answer(parts, len(parts[0]) if is_binary else None)


class _Rest:
    """The bytes after the JSON, which tensors take one after the other."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def take(self, size: object, spec: TensorSpec) -> memoryview:
        left = len(self._data) - self._at
        if not oip.is_size(size) or int(size) > left:  # type: ignore[call-overload]  # is_size says that it is an int
            raise InputError(
                f"input {spec.name!r}: binary_data_size is {quoted(size)}, and {left} bytes are left of the body",
                tensor=spec.name,
            )
        start, self._at = self._at, self._at + int(size)  # type: ignore[call-overload]
        return self._data[start : self._at]

    def check_read(self) -> None:
        if left := len(self._data) - self._at:
            raise InputError(f"{left} bytes of the body belong to no input: {oip.HEADER_LENGTH} may be wrong")


def _parameters(of: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    parameters = of.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise InputError(f"the parameters of {what} are no JSON object")
    return parameters


def _objects(request: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    found = request.get(key)
    if found is None:
        return ()
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise InputError(f"{key} is no list of JSON objects")
    return found


def _flag(parameters: Mapping[str, Any], key: str, what: str) -> bool | None:
    value = parameters.get(key)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{key} of {what} is neither true nor false")
    return value


def _timeout(parameters: Mapping[str, Any]) -> float | None:
    """Triton's parameter `timeout`, in microseconds; 0 for none."""
    value = parameters.get("timeout")
    if value is not None and not oip.is_size(value):
        raise InputError("timeout of the request is no number of microseconds")
    return value / _MICROSECONDS if value else None


def _input(tensor: Mapping[str, Any], spec: TensorSpec, rest: _Rest, regions: Regions | None) -> Array:
    name = f"input {spec.name!r}"
    shape = tensor.get("shape")
    if not oip.is_shape(shape):
        raise InputShapeError(f"{name} has no shape: expected a list of sizes", tensor=spec.name)
    assert isinstance(shape, list)  # noqa: S101  # for the type checker
    datatype = tensor.get("datatype")
    is_cells = datatype == oip.BYTES  # as in a column of bytes, whatever the signature says
    if datatype != oip.DATATYPES[spec.dtype] and not is_cells:
        raise InputDtypeError(
            f"{name} has the datatype {quoted(datatype)}; expected {oip.DATATYPES[spec.dtype]}", tensor=spec.name
        )
    parameters = _parameters(tensor, name)
    if "shared_memory_region" in parameters:
        return _array(_region(parameters, regions, name, spec), spec, shape, is_cells=is_cells)
    if "binary_data_size" in parameters:
        return _array(rest.take(parameters["binary_data_size"], spec), spec, shape, is_cells=is_cells)
    if "data" not in tensor:
        raise InputError(f"{name} has no data", tensor=spec.name)
    try:
        if is_cells:
            return _rows(_texts(tensor["data"], spec), spec, shape)
        return _from_numbers(tensor["data"], spec, shape)
    except InputError:
        raise
    except ValueError as error:  # a shape that numpy does not have
        raise InputShapeError(f"{name}: {error}", tensor=spec.name) from None


def _array(data: memoryview, spec: TensorSpec, shape: Sequence[int], *, is_cells: bool) -> Array:
    try:
        if is_cells:
            return _rows(list(oip.unpacked_cells(data)), spec, shape)
        return check_bools(oip.array_of(data, numpy_dtype(spec.dtype), shape), spec)
    except InputError:
        raise
    except ValueError as error:
        raise InputShapeError(f"input {spec.name!r}: {error}", tensor=spec.name) from None


def _rows(cells: Sequence[bytes], spec: TensorSpec, shape: Sequence[int]) -> Array:
    """Rows whose numbers came as bytes, in the input's dtype."""
    import pandas as pd

    from mlflow_trt.core.frames import feeds_from_frame

    if len(cells) != math.prod(shape):
        raise InputShapeError(
            f"input {spec.name!r} has {len(cells)} elements, and a shape of {list(shape)}", tensor=spec.name
        )
    return feeds_from_frame(pd.DataFrame({spec.name: pd.Series(cells, dtype=object)}), (spec,))[spec.name]


def _texts(data: object, spec: TensorSpec) -> list[bytes]:
    if not isinstance(data, list) or not all(isinstance(cell, str) for cell in data):
        raise InputDtypeError(f"input {spec.name!r}: the data of BYTES is no list of strings", tensor=spec.name)
    return [cell.encode() for cell in data]


def _from_numbers(data: object, spec: TensorSpec, shape: Sequence[int]) -> Array:
    """JSON's numbers, flat or nested, as the input's dtype; what would not be the same number is refused."""
    if not isinstance(data, list):
        raise InputError(f"input {spec.name!r}: data is no list", tensor=spec.name)
    array = array_of(data, spec.name)
    if array.size != math.prod(shape):
        raise InputShapeError(
            f"input {spec.name!r} has {array.size} elements, and a shape of {list(shape)}", tensor=spec.name
        )
    if not array.size:
        return np.zeros(shape, numpy_dtype(spec.dtype))
    if spec.dtype == "uint64" and array.dtype.kind == "f":
        array = _large_integers(data, array)
    is_float = spec.dtype.startswith(("float", "bfloat"))
    kinds = "b" if spec.dtype == "bool" else "fiu" if is_float else "iu"
    if array.dtype.kind not in kinds or (array.dtype.kind != "b" and _has_bools(data)):
        what = {"b": "true or false", "fiu": "a number", "iu": "an integer of 64 bits"}[kinds]
        raise InputDtypeError(f"input {spec.name!r}: an element is not {what}", tensor=spec.name)
    return convert_array(array.astype(np.float64) if is_float else array, spec).reshape(shape)


def _has_bools(values: list[Any]) -> bool:
    """Whether true or false are among numbers, which numpy takes for 1 and 0."""
    kinds = set(map(type, values))
    return bool in kinds or (list in kinds and any(map(_has_bools, values)))


def _large_integers(data: list[Any], array: Array) -> Array:
    """Integers of which some are beyond int64, and others not: numpy makes floats of them together."""

    def flat(values: list[Any]) -> Iterator[Any]:
        for value in values:
            if isinstance(value, list):
                yield from flat(value)
            else:
                yield value

    numbers = list(flat(data))
    if not all(type(number) is int and 0 <= number < 1 << 64 for number in numbers):
        return array
    return np.array(numbers, np.uint64)


def _region(
    parameters: Mapping[str, Any], regions: Regions | None, what: str, spec: TensorSpec | None = None
) -> memoryview:
    name, size = parameters["shared_memory_region"], parameters.get("shared_memory_byte_size")
    offset = parameters.get("shared_memory_offset", 0)
    tensor = spec.name if spec else None
    if regions is None:
        raise InputError(f"{what} is in shared memory, which this server was not started with", tensor=tensor)
    if not isinstance(name, str) or not oip.is_size(size) or not oip.is_size(offset):
        raise InputError(f"{what} does not say where in shared memory it is: region, byte size, offset", tensor=tensor)
    return regions.view(name, offset, size)  # type: ignore[arg-type]  # is_size says that it is an int


def _wanted(tensor: Mapping[str, Any], signature: Signature, seen: set[str], regions: Regions | None) -> Wanted:
    name = signature.check_output(tensor.get("name"))
    what = f"output {name!r}"
    if name in seen:
        raise InputError(f"{what} is asked for twice", tensor=name)
    seen.add(name)
    parameters = _parameters(tensor, what)
    if parameters.get("classification"):
        raise InputError(f"{what}: this server does not classify; ask for the scores", tensor=name)
    if "shared_memory_region" not in parameters:
        return Wanted(name, _flag(parameters, "binary_data", what), None, {})
    place = _region(parameters, regions, what)
    kept = {key: parameters[key] for key in ("shared_memory_region", "shared_memory_offset") if key in parameters}
    return Wanted(name, None, place, kept)


def _write(array: Array, wanted: Wanted) -> None:
    assert wanted.region is not None  # noqa: S101  # for the type checker
    if array.nbytes > len(wanted.region):
        raise InputError(
            f"output {wanted.name!r} has {array.nbytes} bytes, and its place in shared memory {len(wanted.region)}",
            tensor=wanted.name,
        )
    wanted.region[: array.nbytes] = oip.raw(array)
