"""JSON: by orjson, and by Python where there are numbers that orjson does not write or read, such as NaN."""

from __future__ import annotations

import json
import math
from typing import Any

import orjson

from mlflow_trt.errors import InputError


def read(text: bytes | bytearray | memoryview) -> Any:
    """The value. Raises InputError, which quotes nothing of it."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        try:
            return json.loads(bytes(text), parse_float=_finite)
        except InputError:
            raise
        except (ValueError, RecursionError):
            raise InputError(f"the body is no JSON: {error.msg} at byte {error.pos}") from None


def _finite(number: str) -> float:
    """What is written as a number is one: Python makes infinity of 1e400, which is not what it says."""
    value = float(number)
    if math.isinf(value):
        raise InputError("the body has a number that is too large for a float of 64 bits")
    return value


def write(value: Any, *, may_be_nan: bool = False) -> bytes:
    """The text. orjson writes null for what is no number, so whoever has such numbers says so."""
    if not may_be_nan:
        try:
            return orjson.dumps(value)
        except TypeError:  # half of a surrogate pair, which Python's JSON reads
            pass
    return json.dumps(value).encode()
