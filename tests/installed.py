"""Packages that do not go with those of the tests, in folders of their own, installed once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest


def installed(name: str, *requirements: str) -> Path:
    """The folder of packages and what they depend on. Skips the test where they cannot be had."""
    digest = hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:12]
    tag = f"{name}-{sys.implementation.cache_tag}-{digest}"
    folder = platformdirs.user_cache_path("mlflow-trt-examples") / tag
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--target", str(partial)]
        done = subprocess.run([*pip, *requirements], capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(partial, ignore_errors=True)
            pytest.skip(f"{name} cannot be installed here: {done.stderr.strip()[-300:]}")
        try:
            partial.replace(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return folder
