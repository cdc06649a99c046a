"""Forked processes: they have what was loaded before, and neither the threads nor the GPU that it needs."""

from __future__ import annotations

import ctypes
import gc
import os
import weakref
from collections.abc import Callable
from typing import Any

_kept: weakref.WeakSet[object] = weakref.WeakSet()
_generation = 0


def generation() -> int:
    """How many forks lie between this process and the one that imported this module."""
    return _generation


def keep_in_forks(loaded: object) -> None:
    """Let no forked process destroy an object: ONNX Runtime would wait for threads that it does not have, for ever."""
    _kept.add(loaded)


def finalize(owner: object, free: Callable[..., object], *arguments: object) -> Callable[[], object]:
    """Like `weakref.finalize`, but that nothing is freed in processes that were forked since."""
    return weakref.finalize(owner, _free_here, _generation, free, arguments)


def check_not_forked(loaded_in: int, what: str) -> None:
    """Raise RuntimeUnavailableError where `what` was loaded at another `generation`."""
    if loaded_in != _generation:
        from mlflow_trt.errors import (
            RuntimeUnavailableError,  # loads MLflow, which the process that builds does not need
        )

        raise RuntimeUnavailableError(
            f"{what} was loaded before this process was forked from another, whose threads and GPU it does not have. "
            "Load it in this process, after the fork; where TensorRT runs it, start processes with multiprocessing's "
            "'spawn' or 'forkserver', since CUDA does not survive a fork"
        )


def _free_here(made_in: int, free: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    if made_in == _generation:
        free(*arguments)


def _note_fork() -> None:
    global _generation  # noqa: PLW0603  # it is the process that was forked
    _generation += 1
    if not _kept:
        return
    gc.freeze()  # what was garbage already may hold sessions of ONNX Runtime, of whoever made them
    for loaded in list(_kept):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(loaded))  # also where the interpreter ends and clears modules


os.register_at_fork(after_in_child=_note_fork)
