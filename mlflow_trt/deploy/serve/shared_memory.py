"""System shared memory: regions that clients on this machine made, and tensors that lie in them.

Whoever may register regions reads and writes the memory of other programs that is called as the operator allows; and a
client that makes a region smaller while it is read can end the server. So it is off unless the operator names a prefix.

Source: Triton's extension_shared_memory.md.
"""

from __future__ import annotations

import mmap
import os
import resource
import stat
from pathlib import Path
from typing import Any

from mlflow_trt.core import open_inference as oip
from mlflow_trt.deploy.serve import json_text
from mlflow_trt.deploy.serve.http import Exchange
from mlflow_trt.deploy.serve.limits import Admission
from mlflow_trt.deploy.serve.problems import Cause, HttpError
from mlflow_trt.deploy.serve.protocol import quoted
from mlflow_trt.errors import InputError, OptionError

ADDRESS = "/v2/systemsharedmemory"
_FOLDER = Path("/dev/shm")  # noqa: S108  # where Linux keeps what shm_open opens
_MOST_REGIONS = 1024


class Region:
    """A part of a shared memory object, mapped."""

    def __init__(self, key: str, offset: int, size: int) -> None:
        self.key = key
        self.offset = offset
        self.size = size
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            file = os.open(_FOLDER / key.lstrip("/"), flags)
        except OSError as error:
            raise InputError(f"the shared memory {quoted(key)} cannot be opened: {error.strerror}") from None
        except UnicodeEncodeError:
            raise InputError(f"the shared memory {quoted(key)} cannot be opened: no file is called so") from None
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise InputError(f"the shared memory {quoted(key)} is none")
            self._check_size(os.fstat(file).st_size)
            self._check_room(file)
            self._memory = self._mapped(file)
        finally:
            os.close(file)

    def view(self, offset: int, size: int) -> memoryview:
        if offset + size > self.size:
            raise InputError(f"{offset} and {size} bytes lead beyond the {self.size} bytes of the shared memory region")
        self._check_size(self._memory.size())
        start = self.offset + offset
        return memoryview(self._memory)[start : start + size]

    def _mapped(self, file: int) -> mmap.mmap:
        """It goes with the last array that lies in it, and with it its own descriptor of the file."""
        try:
            return mmap.mmap(file, self.offset + self.size)
        except (OSError, ValueError) as error:  # the latter of a file that was just made smaller
            raise InputError(f"the shared memory {quoted(self.key)} cannot be mapped: {error}") from None

    def _check_size(self, found: int) -> None:
        wanted = self.offset + self.size
        if found < wanted:
            raise InputError(f"the shared memory {quoted(self.key)} has {found} bytes, and not {wanted}")

    def _check_room(self, file: int) -> None:
        """Memory is taken when it is written to, and a server that writes where none is left ends by SIGBUS."""
        wanted = self.offset + self.size - os.fstat(file).st_blocks * 512
        system = os.fstatvfs(file)
        left = system.f_bavail * system.f_frsize
        if system.f_blocks and wanted > left:  # without blocks, it has no limit
            raise InputError(
                f"the shared memory {quoted(self.key)} would take {wanted} bytes more, and {_FOLDER} has {left} left; "
                "make it larger, as --shm-size does for a container"
            )


class SharedMemory:
    """The regions that clients registered.

    Args:
        prefix: what the names of shared memory objects have to begin with.
    """

    def __init__(self, prefix: str) -> None:
        if not prefix.strip("/") or "/" in prefix.lstrip("/"):
            raise OptionError(
                f"shared_memory_prefix is {prefix!r}; expected what names begin with, without slashes",
                option="shared_memory_prefix",
            )
        self._prefix = prefix.lstrip("/")
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # Each has an open file, and clients need some to connect.
        self._most = _MOST_REGIONS if files == resource.RLIM_INFINITY else min(_MOST_REGIONS, files // 2)
        self._regions: dict[str, Region] = {}

    def view(self, name: str, offset: int, size: int) -> memoryview:
        """A part of a region. Raises InputError where there is none."""
        region = self._regions.get(name)
        if region is None:
            raise InputError(f"there is no shared memory region {quoted(name)}; register it first")
        return region.view(offset, size)

    async def handle(self, exchange: Exchange, admission: Admission, method: str, path: str) -> None:
        """Answer what is asked at `ADDRESS`."""
        parts = path[len(ADDRESS) :].strip("/").split("/")
        name = parts[1] if len(parts) == 3 and parts[0] == "region" else None
        if len(parts) != 1 and not name:
            raise HttpError(404, Cause.NOT_FOUND, "there is nothing at this address")
        action = parts[-1]
        if (method, action) == ("GET", "status"):
            await exchange.answer_json(self._status(name))
        elif (method, action) == ("POST", "unregister"):
            if name:
                self._regions.pop(name, None)
            else:
                self._regions.clear()
            await exchange.answer(200, [])
        elif (method, action) == ("POST", "register") and name:
            with admission.enter() as ticket:
                self.register(name, json_text.read(await exchange.read(ticket)))
            await exchange.answer(200, [])
        else:
            raise HttpError(404, Cause.NOT_FOUND, "shared memory is registered, unregistered, or asked for its status")

    def register(self, name: str, asked: Any) -> None:
        """Map what a client asks for. Raises InputError where that cannot be."""
        if not isinstance(asked, dict):
            raise InputError("the body is no JSON object")
        key, offset, size = asked.get("key"), asked.get("offset", 0), asked.get("byte_size")
        if not isinstance(key, str) or not oip.is_size(offset) or not oip.is_size(size) or not size:
            raise InputError(f"region {quoted(name)}: expected key, offset and byte_size of the shared memory")
        plain = key.removeprefix("/")
        if not plain.startswith(self._prefix) or "/" in plain or "\0" in plain:
            raise InputError(f"the shared memory {quoted(key)} is not called as this server was told to allow")
        if name in self._regions:
            raise InputError(f"region {quoted(name)} is registered already; unregister it first")
        if len(self._regions) >= self._most:
            raise InputError(f"{self._most} regions are registered, and no more may be; unregister some")
        self._regions[name] = Region(key, offset, size)

    def _status(self, name: str | None) -> list[dict[str, Any]]:
        if name is not None and name not in self._regions:
            raise InputError(f"there is no shared memory region {quoted(name)}")
        return [
            {"name": one, "key": region.key, "offset": region.offset, "byte_size": region.size}
            for one, region in self._regions.items()
            if name in (None, one)
        ]
