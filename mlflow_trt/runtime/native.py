"""The extension in C, where it was built: what callers do without Python's interpreter lock.

Without it the same is done in Python: where there was no compiler, on other systems than Linux, or where the
environment says so, to compare.
"""

from __future__ import annotations

import os
from typing import cast

from mlflow_trt.core.arrays import Array

try:
    from mlflow_trt import _native

    _problem = ""
except ImportError as _error:
    _native = None  # type: ignore[assignment]  # where it was not built
    _problem = f"the extension in C was not built, or does not load here: {_error}"

VARIABLE = "MLFLOW_TRT_NATIVE"
"""The environment variable that turns the extension off with 0, when a process starts."""


if os.environ.get(VARIABLE) == "0":
    _native = None  # type: ignore[assignment]
    _problem = f"{VARIABLE} is 0"

extension = _native
"""The module, or None."""
why_not = _problem
"""The reason where it is None."""

if extension is not None:
    os.register_at_fork(after_in_child=extension.after_fork)


def description() -> str:
    """Which one runs, for people."""
    return "in C" if extension is not None else f"none, Python does its work more slowly: {why_not}"


def address(array: Array) -> int:
    """Where the elements of an array lie."""
    return cast("int", array.__array_interface__["data"][0])
