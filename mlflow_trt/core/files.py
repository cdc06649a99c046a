"""Files that others may be reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlflow_trt.core.scratch import held, remove_abandoned, scratch_name


def write_whole(path: Path, content: Any) -> None:
    """Write aside, then replace: whoever reads the path sees the old file or the whole new one.

    `content` is bytes, or memory that the buffer protocol shows, as TensorRT's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, f".{path.name}.")
    partial = path.with_name(scratch_name(path.name))
    try:
        with partial.open("xb") as file, held(partial):
            file.write(memoryview(content))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
