"""JSON: by orjson, and by Python where there are numbers that orjson does not write or read, such as NaN."""

from __future__ import annotations

import json
from typing import Any

import orjson

from mlflow_trt.errors import InputError


def read(text: bytes | bytearray | memoryview) -> Any:
    """The value. Raises InputError, which quotes nothing of it."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        try:
            return json.loads(bytes(text))
        except (ValueError, RecursionError):
            raise InputError(f"the body is no JSON: {error.msg} at byte {error.pos}") from None


def write(value: Any, *, may_be_nan: bool = False) -> bytes:
    """The text. orjson writes null for what is no number, so whoever has such numbers says so."""
    if not may_be_nan:
        try:
            return orjson.dumps(value)
        except TypeError:  # half of a surrogate pair, which Python's JSON reads
            pass
    return json.dumps(value).encode()
