"""Read the values of options."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer


def default_name(source: str) -> str:
    """What a version of a registered model is registered as where nothing else is said; empty for other sources."""
    match = re.fullmatch(r"models:/([^/@]+)(/[^/@]+|@[^/]+)", source)
    return f"{match[1]}-trt" if match else ""


def parse_batch(text: str) -> tuple[int, int, int]:
    """`64`, or the smallest, the usual and the largest like `1:8:64`."""
    numbers = _numbers(text)
    if len(numbers) == 1:
        return (numbers[0],) * 3
    if len(numbers) != 3:
        raise typer.BadParameter(f"--batch: {text!r}: expected a number like 64, or min:opt:max like 1:8:64")
    return (numbers[0], numbers[1], numbers[2])


def parse_batches(text: str) -> list[int]:
    """Sizes to measure: written like a range of sizes, so that one can be taken for the other; any number of them."""
    return parse_numbers(text, "--batch")


def parse_numbers(text: str, option: str) -> list[int]:
    """`1:8:64`, or the same with commas."""
    numbers = _numbers(text)
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"{option}: {text!r}: expected numbers of 1 or more, like 1:8:64")
    return numbers


def _numbers(text: str) -> list[int]:
    """Numbers between colons, or between commas; none where it is anything else."""
    try:
        return [int(part) for part in text.split("," if "," in text else ":")]
    except ValueError:
        return []


def parse_shapes(text: str, option: str) -> dict[str, tuple[int, ...]]:
    """`x:1x3x224x224,mask:1x128`, as trtexec writes it; a name may contain colons, and commas where it is quoted."""
    shapes = {}
    for item in filter(None, re.findall(r"""((?:"[^"]*"|'[^']*'|[^,])*),?""", text)):
        name, _, dims = item.rpartition(":")
        if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'":
            name = name[1:-1]
        try:
            shapes[name] = tuple(int(dim) for dim in dims.split("x"))
        except ValueError:
            name = ""
        if not name:
            raise typer.BadParameter(f"{option}: {item!r}: expected input:dims, like x:1x3x224x224")
    return shapes


def parse_settings(text: str, option: str) -> dict[str, Any] | None:
    """`{"runtime": "auto"}`, or nothing."""
    if not text:
        return None
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):  # the latter for what is nested a thousand times
        settings = None
    if not isinstance(settings, dict):
        raise typer.BadParameter(f'{option}: {text!r}: expected JSON like {{"runtime": "auto"}}')
    return settings


Triple = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def combine_shapes(low: str, usual: str, high: str) -> dict[str, Triple]:
    """The three shape options as one mapping; each must name the same inputs."""
    options = {"--min-shapes": low, "--opt-shapes": usual, "--max-shapes": high}
    parsed = {option: parse_shapes(text, option) for option, text in options.items()}
    names = {name for shapes in parsed.values() for name in shapes}
    for option, shapes in parsed.items():
        for name in names - set(shapes):
            raise typer.BadParameter(f"{option} does not name the input {name!r}, which another of the three does")
    smallest, middle, largest = parsed.values()
    return {name: (smallest[name], middle[name], largest[name]) for name in smallest}


def combine_profiles(low: Sequence[str], usual: Sequence[str], high: Sequence[str]) -> list[dict[str, Triple]]:
    """The shape options, each given once for every profile."""
    if not len(low) == len(usual) == len(high):
        raise typer.BadParameter(
            f"--min-shapes is given {len(low)} times, --opt-shapes {len(usual)} and --max-shapes {len(high)}: "
            "give all three for each profile"
        )
    return [combine_shapes(*profile) for profile in zip(low, usual, high, strict=True)]


NOTHING_DONE = 3
"""What a command exits with that found nothing to do, or nothing to compare."""


def select_device(ordinal: int) -> None:
    """Let this process, and those that it starts, see no GPU but this one of those that it sees now."""
    visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    if ordinal < 0 or (visible and ordinal >= len(visible)):
        seen = f"CUDA_VISIBLE_DEVICES={','.join(visible)} leaves {len(visible)}" if visible else "0 is the first"
        raise typer.BadParameter(f"--device: there is no GPU {ordinal}: {seen}")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[ordinal] if visible else str(ordinal)


_EXIT_CODES = {"passed": 0, "failed": 1, "inconclusive": 1, "nothing was compared": NOTHING_DONE}
"""By verdict; click answers 2 for options that make no sense."""


def exit_code(verdict: str) -> int:
    """What a command that compares exits with."""
    return _EXIT_CODES[str(verdict)]


@contextmanager
def results_on_stdout(enabled: bool) -> Iterator[None]:
    """Keep standard output for the result: TensorRT's libraries, and whoever else, print to standard error instead."""
    import sys

    if not enabled or sys.stdout is None:
        yield
        return
    sys.stdout.flush()
    original = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(original, 1)
        os.close(original)
