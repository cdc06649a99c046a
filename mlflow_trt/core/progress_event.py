"""What is told about a long step while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BuildProgress:
    """What the builder is doing, and which fraction (0 to 1) of the whole it has done."""

    phase: str
    fraction: float


Progress = Callable[[BuildProgress], None]
