"""Folders that are written whole or not at all, and checked before anything takes time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow_trt.core.scratch import held, remove_abandoned, scratch_name
from mlflow_trt.errors import OptionError


def check_target(path: Path) -> None:
    """Raise OptionError where no folder can be written, before anything takes time."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OptionError(f"{path} exists already; name a folder that does not exist or is empty", option="path")
    check_parent(path, option="path")


def check_parent(path: Path, *, option: str) -> None:
    """Raise OptionError where nothing can be written at `path`, since it would be in no folder or a foreign one."""
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise OptionError(f"{path} cannot be written: {nearest} is no folder that you may write to", option=option)


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """A folder beside `path` that takes its place when the block ends well, and vanishes when it does not."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, f".{path.name}.")
    aside = path.with_name(scratch_name(path.name))
    aside.mkdir()
    try:
        with held(aside):
            yield aside
        if path.exists():
            # An empty folder may be somebody's current one, a link or a mount: it is filled, not replaced.
            _fill(path, aside)
        else:
            aside.replace(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _fill(folder: Path, aside: Path) -> None:
    """Move everything into a folder that is empty, and may be on another device; or nothing, where that fails."""
    try:
        for entry in list(aside.iterdir()):
            shutil.move(entry, folder / entry.name)
        aside.rmdir()
    except BaseException:
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink(missing_ok=True)
        raise
