"""A GPU of its own for each process, chosen without anybody to ask: locks in the user's cache directory tell.

A lock goes with its process, however that ends.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Sequence
from typing import IO

from mlflow_trt.core.file_lock import try_lock_file
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.types import Gpu
from mlflow_trt.errors import RuntimeUnavailableError
from mlflow_trt.store import cache

_log = get_logger(__name__)
_choosing = threading.Lock()
_taken: tuple[Gpu, IO[bytes]] | None = None


def own_gpu(gpus: Sequence[Gpu]) -> Gpu:
    """The GPU of this process: the first that no other took in this way; where all are taken, a least shared one.

    The first call chooses, and the choice stays. Raises RuntimeUnavailableError where locks cannot be kept.
    """
    global _taken  # noqa: PLW0603  # it is the process that has a GPU
    with _choosing:
        if _taken is None:
            try:
                _taken = _take(gpus)
            except OSError as error:
                raise RuntimeUnavailableError(
                    f"device='own' keeps a lock for each GPU in {cache.directory()}, which fails: {error.strerror}. "
                    f"Set {cache.DIRECTORY_VARIABLE} to a folder that can be written to, or name a device."
                ) from error
        return _taken[0]


def _take(gpus: Sequence[Gpu]) -> tuple[Gpu, IO[bytes]]:
    folder = cache.folder_of("locks")
    for sharers in itertools.count():
        for gpu in gpus:
            lock = try_lock_file(folder / f"{gpu.uuid}-{sharers}")
            if lock is None:
                continue
            _log.info("This process uses CUDA device %d, %s; sharers: %d", gpu.ordinal, gpu.name, sharers)
            return gpu, lock
    raise AssertionError("unreachable")  # for the type checker: counting has no end


def _forget_holder() -> None:
    global _choosing  # noqa: PLW0603  # a forked process lacks the thread that may have held it
    _choosing = threading.Lock()


os.register_at_fork(after_in_child=_forget_holder)
