"""Folders and files that nobody else can have put there.

What is in the cache is deserialized, which executes it, so it has to be this user's own: folders are made for their
owner alone, links are not followed, and what belongs to somebody else is not looked into.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_ROOT = 0


class NotPrivateError(PermissionError):
    """Somebody else may have put there what lies at `path`; the text says how."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(None, reason, str(path))


def private_root(path: Path) -> Path:
    """The folder `path`, made where it is missing, or where others write to it a folder of this user's own inside.

    Raises NotPrivateError for a folder of another user, OSError where none can be made.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for found in (path.lstat(), path.stat()):  # the link, where it is one, and what it leads to
        _check_owner(path, found)
    # A volume that a cluster mounts, and /tmp, are root's and open to all. Not ours to close, and no place for engines.
    return private_child(path, f"user-{os.geteuid()}") if path.stat().st_mode & _OTHERS_WRITE else path


def private_child(folder: Path, name: str) -> Path:
    """A folder in a private one that only its owner may look into, made where it is missing.

    Raises NotPrivateError for a link and for another user's folder, OSError where none can be made.
    """
    path = folder / name
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    handle = _open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = os.fstat(handle)
        if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) != 0o700:
            os.fchmod(handle, 0o700)  # made by a release that left it to the umask
    finally:
        os.close(handle)
    return path


def check_private_folder(path: Path) -> None:
    """Raise NotPrivateError for a link and for another user's folder, OSError where there is none."""
    os.close(_open(path, os.O_RDONLY | os.O_DIRECTORY))


def is_private_file(path: Path) -> bool:
    """Whether there is a file. Raises NotPrivateError for a link and for what another user owns."""
    try:
        os.close(_open(path, os.O_RDONLY))
    except FileNotFoundError:
        return False
    return True


def touch_private(path: Path) -> None:
    """Make an empty file, unless there is something. A link is not followed."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def read_private(path: Path) -> bytes:
    """The content of a file. Raises NotPrivateError for a link and for what another user owns, OSError as usual."""
    with os.fdopen(_open(path, os.O_RDONLY), "rb") as file:
        return file.read()


def _open(path: Path, flags: int) -> int:
    """A handle of a regular file or folder: checked after it was opened, so that nobody can exchange it in between."""
    try:
        # O_NONBLOCK: a pipe that somebody put there would be waited for.
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise NotPrivateError(path, "is a symbolic link") from error
        raise
    try:
        _check_kind_and_owner(path, os.fstat(handle))
    except BaseException:
        os.close(handle)
        raise
    return handle


def _check_kind_and_owner(path: Path, found: os.stat_result) -> None:
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise NotPrivateError(path, "is no regular file")
    _check_owner(path, found)


def _check_owner(path: Path, found: os.stat_result) -> None:
    # Root can do everything to this user anyway.
    if found.st_uid not in (os.geteuid(), _ROOT):
        raise NotPrivateError(path, f"belongs to another user, with the uid {found.st_uid}")
