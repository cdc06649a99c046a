"""A timing cache that several builds share: read, merged and replaced under a lock."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from pathlib import Path

from mlflow_trt.backends import tensorrt_api as trt_api
from mlflow_trt.backends.tensorrt import TensorRT
from mlflow_trt.core.file_lock import lock_file
from mlflow_trt.core.files import write_whole


class TimingCacheError(Exception):
    """The file cannot serve this build; the text says why."""


class TimingCacheFile:
    """The file and its lock beside it. A build does not hold the lock: it takes minutes, and others go on meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def attach(self, tensorrt: TensorRT, config: trt_api.IBuilderConfig) -> None:
        """Let the build use what the file holds.

        Raises TimingCacheError where it belongs to another GPU or TensorRT.
        """
        with self._lock():
            content = self._path.read_bytes() if self._path.exists() else b""
        cache = config.create_timing_cache(content)
        if not config.set_timing_cache(cache, ignore_mismatch=False):
            said = tensorrt.log.last_error()
            raise TimingCacheError(f"the timing cache {self._path} does not fit this GPU and TensorRT: {said}")

    def merge(self, tensorrt: TensorRT, config: trt_api.IBuilderConfig) -> str:
        """Add what the build learned to what others wrote meanwhile, and return the sha256 of the file."""
        with self._lock():
            cache = config.get_timing_cache()
            if self._path.exists():
                others = config.create_timing_cache(self._path.read_bytes())
                if not cache.combine(others, ignore_mismatch=False):
                    raise TimingCacheError(
                        f"the timing cache {self._path} cannot be merged: {tensorrt.log.last_error()}"
                    )
            content = bytes(memoryview(cache.serialize()))  # type: ignore[arg-type]  # it supports the buffer protocol
            write_whole(self._path, content)
        return hashlib.sha256(content).hexdigest()

    def _lock(self) -> AbstractContextManager[None]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Not the file itself, which is replaced: whoever waited would then hold the lock of a file that is gone.
        return lock_file(self._path.with_name(f"{self._path.name}.lock"))
