"""What is kept in the user's cache directory: engines that were rebuilt on this machine, and self-tests that passed.

A model folder is never written to after it was logged, so what does not fit this machine is built again and kept here,
under a key that changes with everything that went into it. It is executed from here, so only what this user put here
counts: see private_folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from pydantic import TypeAdapter, ValidationError

from mlflow_trt.core.file_lock import lock_file
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.scratch import scratch_folder
from mlflow_trt.core.types import EngineRecord
from mlflow_trt.store.cache_contents import (
    SIZE_VARIABLE,
    CacheEntry,
    forget_self_tests,
    limit,
    mark_used,
    remove_beyond,
    remove_unused_since,
)
from mlflow_trt.store.private_folder import (
    NotPrivateError,
    check_private_folder,
    is_private_file,
    private_child,
    private_root,
    read_private,
    touch_private,
)

DIRECTORY_VARIABLE = "MLFLOW_TRT_CACHE_DIR"

_RECORD = "engine.json"
_PLAN = "engine.plan"
_log = get_logger(__name__)
_told: set[str] = set()
_of_this_process: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
os.register_at_fork(after_in_child=_of_this_process.clear)  # whoever held one is not there
_records = TypeAdapter(EngineRecord)


def directory() -> Path:
    """`$MLFLOW_TRT_CACHE_DIR`, else the user's cache directory."""
    configured = os.environ.get(DIRECTORY_VARIABLE)
    return Path(configured) if configured else platformdirs.user_cache_path("mlflow-trt")


def root() -> Path:
    """The folder in which this user's things are kept. Raises OSError where there is none."""
    return private_root(directory())


def folder_of(kind: str) -> Path:
    """The folder for one kind of thing, made where it is missing; nobody but this user has put anything there.

    Raises OSError where there is none; a NotPrivateError was told to the user, too.
    """
    try:
        return private_child(root(), kind)
    except NotPrivateError as error:
        _warn_of_foreign(error)
        raise


def problem() -> str | None:
    """Why nothing can be kept, or None where it can."""
    try:
        with tempfile.TemporaryFile(dir=root()):
            return None
    except OSError as error:
        return f"{directory()} cannot be written to: {error.strerror}"


def key_of(parts: Mapping[str, object]) -> str:
    """The sha256 of everything that what is kept depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def has_passed(key: str) -> bool:
    """Whether a self-test was remembered under `key`."""
    try:
        return is_private_file(folder_of("self_tests") / key)
    except NotPrivateError as error:
        _warn_of_foreign(error)
    except OSError:
        pass
    return False


def remember_pass(key: str) -> None:
    """Remember a self-test that passed; where nothing can be kept, it runs again next time."""
    with contextlib.suppress(OSError):
        touch_private(folder_of("self_tests") / key)


def read_entry(path: Path) -> bytes:
    """The content of a file in one of the folders. Raises OSError where it cannot be read or is somebody else's."""
    try:
        return read_private(path)
    except NotPrivateError as error:
        _warn_of_foreign(error)
        raise


@contextmanager
def lock_key(key: str) -> Iterator[None]:
    """Let one process at a time make what belongs to `key`, and one thread of it: the others wait, and then find it."""
    with _of_this_process[key], contextlib.ExitStack() as stack:
        # Nowhere to lock is nowhere to keep: see store_engine. And some file systems have no locks.
        with contextlib.suppress(OSError):
            path = folder_of("locks") / key
            said = "Another process is making what this one needs; waiting for it to end or to give %s up"
            stack.enter_context(lock_file(path, when_busy=lambda: _log.info(said, path)))
        yield


def find_engine(key: str) -> tuple[EngineRecord, bytes] | None:
    """The engine stored under `key`. One that is incomplete or was changed is removed: it can be built again."""
    try:
        folder = folder_of("engines") / key
        if not os.path.lexists(folder):
            return None
    except OSError:
        return None
    try:
        check_private_folder(folder)
        record = _records.validate_json(read_private(folder / _RECORD))
        plan = read_private(folder / _PLAN)
    except NotPrivateError as error:
        _warn_of_foreign(error)
        return None
    except (OSError, ValidationError):
        record, plan = None, b""
    if record is None or hashlib.sha256(plan).hexdigest() != record.sha256:
        _log.warning("The cached engine in %s is damaged and is built again", folder)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    mark_used(folder)
    return record, plan


def store_engine(key: str, record: EngineRecord, plan: Path) -> None:
    """Keep the engine in the file `plan`: whole or not at all. Where that is impossible, say so and go on."""
    folder = directory() / "engines" / key
    try:
        folder = folder_of("engines") / key
        with scratch_folder(folder.parent, ".partial-") as partial:
            aside = partial / "engine"
            aside.mkdir()
            shutil.copyfile(plan, aside / _PLAN)
            (aside / _RECORD).write_bytes(_records.dump_json(record, indent=2))
            aside.rename(folder)
        keep_within_limit(key)
    except OSError as error:
        if not folder.is_dir():  # else another process was first, with an engine of the same key
            _log.warning(
                "The engine cannot be kept in %s (%s) and is built again next time; set %s to a writable folder",
                folder.parent,
                error.strerror,
                DIRECTORY_VARIABLE,
            )


def prune_cache(size: int | None, *, unused_for: float | None = None, everything: bool = False) -> list[CacheEntry]:
    """Remove what was not used for so many days, then what was not used for longest beyond `size` bytes.

    None takes the limit of the cache. `everything` leaves nothing, not even that self-tests passed. Returns what was
    removed. Raises OSError where the cache cannot be looked into.
    """
    folder = root()
    removed = [] if unused_for is None else remove_unused_since(folder, unused_for * 86400)
    removed += remove_beyond(folder, 0 if everything else limit() if size is None else size)
    if everything:
        forget_self_tests(folder)
    return removed


def keep_within_limit(key: str) -> None:
    """Remove what was not used for longest where the cache has grown too large, but for what is kept under `key`."""
    for entry in remove_beyond(root(), limit(), spared=(key,)):
        _log.info(
            "Removed %s %s from the cache, which had become too large (see %s)",
            entry.kind,
            entry.key[:12],
            SIZE_VARIABLE,
        )


def _warn_of_foreign(error: NotPrivateError) -> None:
    """Say what is ignored, once each."""
    told = f"{error.filename} {error.strerror}"
    if told not in _told:
        _told.add(told)
        _log.warning(
            "%s, so it is ignored: engines are executed, and nobody else may have put them there. Remove it, or set %s "
            "to a folder of your own",
            told,
            DIRECTORY_VARIABLE,
        )
