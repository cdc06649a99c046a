"""Messages between two processes of this machine: a header and arrays, in memory that both see.

Each message is one file in memory, whose handle goes over a Unix socket: eight bytes with the length of the header, the
header as JSON, and the arrays, aligned. Nothing is pickled. Reading copies only what is written to.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import socket
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

_LENGTH = 8
_ALIGNMENT = 64
_KINDS = "biuf"


def send(channel: socket.socket, header: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Raises TypeError for arrays of anything but numbers, OSError where memory or the other process is missing."""
    described, size = [], 0
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in _KINDS:
            kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise TypeError(f"{name!r} is of {kind}; only arrays of numbers can be passed on")
        described.append((name, array.dtype.str, array.shape, size))
        size += _aligned(array.nbytes)
    text = json.dumps({"header": header, "arrays": described}).encode()
    start = _aligned(_LENGTH + len(text))
    handle = os.memfd_create("mlflow-trt", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(handle, 0, start + size)  # or the process ended where memory is short
        with mmap.mmap(handle, start + size) as memory:
            memory[:_LENGTH] = len(text).to_bytes(_LENGTH, "little")
            memory[_LENGTH : _LENGTH + len(text)] = text
            for array, (_, dtype, shape, offset) in zip(arrays.values(), described, strict=True):
                if array.size:
                    _view(memory, dtype, shape, start + offset)[...] = array
        socket.send_fds(channel, [b"\0"], [handle])
    finally:
        os.close(handle)


def receive(channel: socket.socket) -> tuple[Any, dict[str, npt.NDArray[Any]]]:
    """The next header and its arrays. Raises EOFError where the other process has ended."""
    message, handles, _, _ = socket.recv_fds(channel, 1, 1)
    if not message or not handles:
        raise EOFError
    try:
        memory = mmap.mmap(handles[0], 0, access=mmap.ACCESS_COPY)
    finally:
        os.close(handles[0])
    length = int.from_bytes(memory[:_LENGTH], "little")
    content = json.loads(memory[_LENGTH : _LENGTH + length])
    start = _aligned(_LENGTH + length)
    arrays = {
        name: _view(memory, dtype, tuple(shape), start + offset) for name, dtype, shape, offset in content["arrays"]
    }
    return content["header"], arrays


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _view(memory: mmap.mmap, dtype: str, shape: tuple[int, ...], offset: int) -> npt.NDArray[Any]:
    if not math.prod(shape):
        return np.empty(shape, dtype)
    return np.frombuffer(memory, dtype, math.prod(shape), offset).reshape(shape)
