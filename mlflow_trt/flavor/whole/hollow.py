"""Weights that are not there: a file of safetensors with its header alone, and zeros for the rest where it is loaded.

The loaders of transformers and sentence_transformers want weights, and make up those that they miss, which takes
seconds. Zeros are there at once: files have holes for them, which take no room.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow_trt.core.scratch import scratch_folder

HOLLOW_FILE = "model.safetensors"

_DTYPES = {
    "float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2), "int64": ("I64", 8),
    "int32": ("I32", 4), "int16": ("I16", 2), "int8": ("I8", 1), "uint8": ("U8", 1), "bool": ("BOOL", 1),
}  # fmt: skip


def hollow_weights(tensors: Mapping[str, Any]) -> bytes:
    """The header of a file with these tensors of torch. Those of other dtypes are left out."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        kind = _DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        if kind is not None:
            end = start + math.prod(tensor.shape) * kind[1]
            header[name] = {"dtype": kind[0], "shape": list(tensor.shape), "data_offsets": [start, end]}
            start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _link(file: Path, target: Path) -> None:
    """Not as a symbolic link: MLflow refuses those that lead out of a model."""
    try:
        target.hardlink_to(file.resolve())
    except OSError:  # on another device, or somebody else's
        shutil.copyfile(file, target)


@contextmanager
def fill(folder: Path, names: Iterable[str], hollow: Iterable[str]) -> Iterator[Path]:
    """A folder with these files of another, but for hollow ones, which are as large as their header says.

    It is there for the length of the block; what was mapped into memory stays.
    """
    hollow = set(hollow)
    with scratch_folder() as workdir:
        for name in names:
            file = workdir / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if name not in hollow:
                _link(folder / name, file)
                continue
            header = (folder / name).read_bytes()
            ends = [tensor["data_offsets"][1] for key, tensor in json.loads(header[8:]).items() if key[:2] != "__"]
            with file.open("wb") as target:
                target.write(header)
                target.truncate(len(header) + max(ends, default=0))
        yield workdir
