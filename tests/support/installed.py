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


def install(*requirements: str, python: str | Path = sys.executable, target: Path | None = None) -> str:
    """Install packages for this Python, or wheels into a folder. Returns why they cannot be had, if so."""
    where = [] if target is None else ["--only-binary=:all:", "--target", str(target)]
    commands = [
        # What is imported of them is compiled then, which is a small part.
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"],
    ]
    if uv := shutil.which("uv"):  # seconds instead of minutes, if it is there and finds all of it
        commands.insert(0, [uv, "pip", "install", "--quiet", "--python", python])
    problems = []
    for command in commands:
        done = subprocess.run([*command, *where, *requirements], capture_output=True, text=True, check=False)
        if not done.returncode:
            return ""
        problems.append(done.stderr.strip()[-300:])
        if target is not None:
            shutil.rmtree(target, ignore_errors=True)
    return f"{problems}"


def installed(name: str, *requirements: str) -> Path:
    """The folder of packages and what they depend on. Skips the test where they cannot be had."""
    digest = hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:12]
    tag = f"{name}-{sys.implementation.cache_tag}-{digest}"
    folder = platformdirs.user_cache_path("mlflow-trt-examples") / tag
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        if problem := install(*requirements, target=partial):
            pytest.skip(f"{name} cannot be installed here: {problem}")
        try:
            partial.replace(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return folder
