"""The golden sample: a few inputs and what the source model makes of them, by which an engine is tested before use."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mlflow_trt.convert.conversion import Conversion
from mlflow_trt.core.arrays import Feeds, Outputs, take_rows

GOLDEN_FILE = "golden.npz"
_LARGEST = 8 * 2**20
"""In bytes. It is downloaded with the model, and read at every first load."""
_MOST_ROWS = 8
_INPUT, _OUTPUT = "input:", "output:"


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Inputs, and the outputs of the source model on ONNX Runtime."""

    feeds: Feeds
    outputs: Outputs


def golden_of(conversion: Conversion, reference: Outputs) -> Golden | None:
    """The first rows of the first sample, whose reference outputs are given; None where they are too large to store."""
    feeds = conversion.samples.feeds[0]
    axis = conversion.profiles.batch_axis
    if axis is not None and axis.splits:
        row = sum(np.atleast_1d(array)[:1].nbytes for array in (*feeds.values(), *reference.values()))
        rows = min(_MOST_ROWS, _LARGEST // max(row, 1))
        feeds = take_rows(feeds, axis, slice(rows))
        reference = {name: array[:rows] for name, array in reference.items()}
        if not rows:
            return None
    golden = Golden(feeds=feeds, outputs=reference)
    size = sum(array.nbytes for array in (*feeds.values(), *reference.values()))
    return golden if size <= _LARGEST else None


def to_npz(golden: Golden) -> bytes:
    buffer = io.BytesIO()
    arrays = _prefixed(_INPUT, golden.feeds) | _prefixed(_OUTPUT, golden.outputs)
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def from_npz(content: bytes) -> Golden:
    """Raises ValueError for what is no such file, and for one that unpacks to more than any."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as members:
            size = sum(member.file_size for member in members.infolist())
        if size > 2 * _LARGEST:
            raise ValueError(f"it unpacks to {size} bytes")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            stored = {name: arrays[name] for name in arrays.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, NotImplementedError, SyntaxError) as error:
        raise ValueError(str(error)) from error
    return Golden(feeds=_stripped(_INPUT, stored), outputs=_stripped(_OUTPUT, stored))


def _prefixed(prefix: str, arrays: Outputs) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    return {prefix + name: array for name, array in arrays.items()}


def _stripped(prefix: str, arrays: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]) -> Feeds:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
