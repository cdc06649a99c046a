"""The Open Inference Protocol, version 2, over HTTP: its types, and tensors as bytes or as JSON.

What client and server share. A body is a JSON object; with the binary tensor extension, whose header tells how long the
object is, the bytes of tensors follow it in their order. Tensors are little-endian and in C order.

Source: https://github.com/kserve/open-inference-protocol and Triton's extension_binary_data.md.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mlflow_trt.core.arrays import Array, numpy_dtype

HEADER_LENGTH = "inference-header-content-length"
"""The HTTP header that says how many bytes of the body are JSON; without it, all are."""

BINARY = "application/octet-stream"
BYTES = "BYTES"
"""The datatype of elements that are bytes of any length, each with that length before it."""

DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float32": "FP32", "float64": "FP64", "bfloat16": "BF16",
}  # fmt: skip
"""The protocol's names of types, by numpy's."""

_NAMES = {datatype: name for name, datatype in DATATYPES.items()}
_LENGTH = struct.Struct("<I")


def dtype_of(datatype: str) -> np.dtype[np.generic]:
    """Numpy's type. Raises KeyError for BYTES and what the protocol does not have."""
    return numpy_dtype(_NAMES[datatype])


@functools.lru_cache(maxsize=64)  # numpy makes a dtype's name anew each time
def datatype_of(dtype: np.dtype[np.generic]) -> str:
    """The protocol's name. Raises KeyError for what it does not have."""
    return DATATYPES[dtype.name]


def is_size(value: object) -> bool:
    """Whether it can be the size of something: an int of 63 bits, and no bool, which Python takes for one."""
    return type(value) is int and 0 <= value < 1 << 63


def is_shape(value: object) -> bool:
    return isinstance(value, list) and all(map(is_size, value))


def array_of(data: bytes | bytearray | memoryview, dtype: np.dtype[np.generic], shape: Sequence[int]) -> Array:
    """A view of bytes as an array, or a copy where they lie so that processors would have to read across words.

    Raises ValueError where there are more or fewer than the shape has.
    """
    size = math.prod(shape) * dtype.itemsize
    if len(data) != size:
        raise ValueError(f"expected {size} bytes for a shape of {list(shape)}, got {len(data)}")
    if not size:
        return np.zeros(shape, dtype)
    array: Array = np.frombuffer(data, dtype).reshape(shape)
    return array if array.flags.aligned else array.copy()


def raw(array: Array) -> memoryview:
    """The bytes of an array, without a copy where it is contiguous."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return memoryview(flat.view(np.uint8).data) if flat.size else memoryview(b"")


def packed_cells(cells: Sequence[bytes]) -> bytes:
    """Elements of BYTES, each after its length."""
    return b"".join(part for cell in cells for part in (_LENGTH.pack(len(cell)), cell))


def unpacked_cells(data: bytes | bytearray | memoryview) -> Iterator[bytes]:
    """What `packed_cells` packed. Raises ValueError where a length leads beyond the end."""
    view = memoryview(data)
    while view:
        if len(view) < _LENGTH.size:
            raise ValueError("its last element has no whole length")
        (size,) = _LENGTH.unpack_from(view)
        if len(view) - _LENGTH.size < size:
            raise ValueError("the length of an element leads beyond the end")
        yield bytes(view[_LENGTH.size : _LENGTH.size + size])
        view = view[_LENGTH.size + size :]


def listed(array: Array) -> list[Any]:
    """The numbers of an array for JSON, in C order. Floats that Python lacks become those that hold their values."""
    if array.dtype.name in ("float16", "bfloat16"):
        array = array.astype(np.float32)
    numbers: list[Any] = array.reshape(-1).tolist()
    return numbers
