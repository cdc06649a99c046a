"""The kernels that TensorRT-RTX compiled for an engine, in a file that processes share.

TensorRT-RTX compiles kernels when shapes are first run, which takes seconds; from this file the next process gets them
in a fraction. They are executable content, so the file lies in the user's own cache directory, which nobody else can
write to, and its hash is checked before TensorRT-RTX sees it, against damage.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from mlflow_trt.core.files import write_whole
from mlflow_trt.core.log import get_logger
from mlflow_trt.store import cache
from mlflow_trt.store.cache_contents import mark_used

_HASH_BYTES = hashlib.sha256().digest_size
_log = get_logger(__name__)


class KernelFile:
    """The file of one engine on one kind of GPU, driver and TensorRT-RTX.

    Args:
        key: of everything the kernels depend on.
        shipped: kernels that came with the model; they are only read.
    """

    def __init__(self, key: str, shipped: Sequence[bytes] = ()) -> None:
        self._key = key
        self._shipped = list(shipped)

    @property
    def path(self) -> Path:
        """Where they are kept on this machine. Raises OSError where nothing can be."""
        return cache.folder_of("kernels") / self._key

    def read(self) -> list[bytes]:
        """What came with the model and what was kept on this machine."""
        return [*self._shipped, *self._kept()]

    def update(self, merge: Callable[[list[bytes]], bytes | None]) -> None:
        """Keep `merge(what other processes kept)`, whole or not at all; where that is impossible, say so and go on."""
        with cache.lock_key(self._key):
            kept = self._kept()
            kernels = merge(kept)
            if kernels is None or kernels in kept:
                return
            try:
                write_whole(self.path, hashlib.sha256(kernels).digest() + kernels)
                cache.keep_within_limit(self._key)
            except OSError as error:
                _log.debug("Compiled kernels cannot be kept in %s: %s", cache.directory(), error.strerror)

    def _kept(self) -> list[bytes]:
        try:
            content = cache.read_entry(self.path)
        except OSError:
            return []
        expected, kernels = content[:_HASH_BYTES], content[_HASH_BYTES:]
        if hashlib.sha256(kernels).digest() != expected:
            _log.warning("The compiled kernels in %s are damaged and are compiled again", self.path)
            with contextlib.suppress(OSError):
                self.path.unlink()
            return []
        mark_used(self.path)
        return [kernels]
