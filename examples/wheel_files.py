"""Real models to try things on: files inside the wheels that projects publish on PyPI."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs


def wheel_file(requirement: str, member: str) -> Path:
    """The file `member` of the wheel of `requirement`, such as `magika==1.0.3`.

    Taken from the installed package where there is one; else the wheel is downloaded once, without what it depends on,
    and the file kept in the user's cache directory.
    """
    package = member.split("/", 1)[0]
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        installed = Path(location).parent / member
        if installed.is_file():
            return installed
    cached = platformdirs.user_cache_path("mlflow-trt-examples") / requirement
    target = cached / member
    if not target.is_file():
        wheel = next(cached.glob("*.whl"), None) or _download(requirement, cached)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(member, cached)
    return target


def _download(requirement: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", partial, requirement], check=True)
        wheel = next(Path(partial).glob("*.whl"))
        return wheel.replace(folder / wheel.name)
