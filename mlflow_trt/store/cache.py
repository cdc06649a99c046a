"""What is kept in the user's cache directory: engines that were rebuilt on this machine, and self-tests that passed.

A model folder is never written to after it was logged, so what does not fit this machine is built again and kept here,
under a key that changes with everything that went into it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from pydantic import TypeAdapter, ValidationError

from mlflow_trt.core.log import get_logger
from mlflow_trt.core.types import EngineRecord

DIRECTORY_VARIABLE = "MLFLOW_TRT_CACHE_DIR"

_RECORD = "engine.json"
_PLAN = "engine.plan"
_log = get_logger(__name__)
_records = TypeAdapter(EngineRecord)


def directory() -> Path:
    """`$MLFLOW_TRT_CACHE_DIR`, else the user's cache directory."""
    configured = os.environ.get(DIRECTORY_VARIABLE)
    return Path(configured) if configured else platformdirs.user_cache_path("mlflow-trt")


def problem() -> str | None:
    """Why nothing can be kept, or None where it can."""
    try:
        directory().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory()):
            return None
    except OSError as error:
        return f"{directory()} cannot be written to: {error.strerror}"


def key_of(parts: Mapping[str, object]) -> str:
    """The sha256 of everything that what is kept depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def has_passed(key: str) -> bool:
    """Whether a self-test was remembered under `key`."""
    return (directory() / "self_tests" / key).is_file()


def remember_pass(key: str) -> None:
    """Remember a self-test that passed; where nothing can be kept, it runs again next time."""
    with contextlib.suppress(OSError):
        folder = directory() / "self_tests"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / key).touch()


@contextmanager
def only_one(key: str) -> Iterator[None]:
    """Let one process at a time make what belongs to `key`: the others wait, and then find it."""
    with contextlib.ExitStack() as stack:
        # Nowhere to lock is nowhere to keep: see store_engine. And some file systems have no locks.
        with contextlib.suppress(OSError):
            folder = directory() / "locks"
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / key).open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Closing is not enough: a process that was forked meanwhile has the file open too.
            stack.callback(fcntl.flock, lock, fcntl.LOCK_UN)
        yield


def find_engine(key: str) -> tuple[EngineRecord, bytes] | None:
    """The engine stored under `key`. One that is incomplete or was changed is removed: it can be built again."""
    folder = directory() / "engines" / key
    try:
        if not folder.is_dir():
            return None
        record = _records.validate_json((folder / _RECORD).read_bytes())
        plan = (folder / _PLAN).read_bytes()
    except (OSError, ValidationError):
        record, plan = None, b""
    if record is None or hashlib.sha256(plan).hexdigest() != record.sha256:
        _log.warning("The cached engine in %s is damaged and is built again", folder)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return record, plan


def store_engine(key: str, record: EngineRecord, plan: Path) -> None:
    """Keep the engine in the file `plan`: whole or not at all. Where that is impossible, say so and go on."""
    folder = directory() / "engines" / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
            aside = Path(partial) / "engine"
            aside.mkdir()
            shutil.copyfile(plan, aside / _PLAN)
            (aside / _RECORD).write_bytes(_records.dump_json(record, indent=2))
            aside.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was first, with an engine of the same key
            _log.warning(
                "The engine cannot be kept in %s (%s) and is built again next time; set %s to a writable folder",
                folder.parent,
                error.strerror,
                DIRECTORY_VARIABLE,
            )
