"""Options of the benchmarks that name things."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Iterable


def parse_names(text: str, known: Iterable[str]) -> list[str]:
    """`a,b`, each of them known. Raises ArgumentTypeError, which argparse shows, for any other."""
    names = text.split(",")
    for name in names:
        if name not in known:
            raise ArgumentTypeError(f"there is no {name!r}; choose from {', '.join(known)}")
    return names
