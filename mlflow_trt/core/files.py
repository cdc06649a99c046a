"""Files that others may be reading."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: Any) -> None:
    """Write aside, then replace: whoever reads the path sees the old file or the whole new one.

    `content` is bytes, or memory that the buffer protocol shows, as TensorRT's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            file.write(memoryview(content))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
