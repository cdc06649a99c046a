"""Ranges around the phases of a call, for Nsight Systems: with MLFLOW_TRT_NVTX=1 in the environment.

What is wrapped is decided when a module is imported, so that a call costs nothing more without the variable.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from mlflow_trt.core.log import get_logger
from mlflow_trt.core.optional import is_installed

VARIABLE = "MLFLOW_TRT_NVTX"
_DOMAIN = "mlflow-trt"
_P = ParamSpec("_P")
_R = TypeVar("_R")
_log = get_logger(__name__)


def _is_wanted() -> bool:
    if os.environ.get(VARIABLE, "") in {"", "0"}:
        return False
    if not is_installed("nvtx"):
        _log.warning("%s is set, and no ranges are marked: `pip install nvtx`", VARIABLE)
        return False
    return True


wanted = _is_wanted()
"""Whether functions are marked that are defined from now on."""


def marked(name: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Mark each call of a function as a range of this name, where that is wanted; else the function stays as it is."""

    def mark(function: Callable[_P, _R]) -> Callable[_P, _R]:
        if not wanted:
            return function
        import nvtx

        @functools.wraps(function)
        def ranged(*args: _P.args, **keywords: _P.kwargs) -> _R:
            nvtx.push_range(name, domain=_DOMAIN)
            try:
                return function(*args, **keywords)
            finally:
                nvtx.pop_range(domain=_DOMAIN)

        return ranged

    return mark
