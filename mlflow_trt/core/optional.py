"""Packages that may be there or not."""

from __future__ import annotations

import importlib.util


def is_installed(module: str) -> bool:
    """Whether a module can be imported; a folder of that name that merely lies on the path does not count."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None
