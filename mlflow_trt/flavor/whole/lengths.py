"""Run texts in few lengths: rows of like length together, each padded to the next length and put back in its place."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mlflow_trt.core.arrays import Array, Feeds, Outputs
from mlflow_trt.core.whole_model import Lengths

_HOW_MANY = 4


def few_lengths(usual: int, longest: int) -> tuple[int, ...]:
    """Four lengths at most, in equal ratios from the usual one to the longest, and all but that multiples of eight."""
    first = min(-(-usual // 8) * 8, longest)
    ratio = (longest / first) ** (1 / (_HOW_MANY - 1))
    sizes = (min(-(-round(first * ratio**step) // 8) * 8, longest) for step in range(_HOW_MANY - 1))
    return tuple(sorted({*sizes, longest}))


def run_in_lengths(
    run: Callable[[Feeds], Outputs], feeds: Feeds, lengths: Lengths, start_cost: int = 0
) -> dict[str, Array]:
    """What `run` makes of the feeds. Positions behind the end of a row are zeros in outputs that carry them.

    Rows that do not end with their padding are run as they are: where they begin tells some networks something.
    `start_cost` is what a run costs by itself, in tokens: see `group_rows`.
    """
    mask = feeds[lengths.mask]
    ends = ends_of(mask)
    if ends is None:
        return dict(run(feeds))
    rows, given = mask.shape
    groups = group_rows(ends, lengths.sizes, start_cost)
    if len(groups) == 1:
        ((size, _),) = groups
        return _in_place([(np.arange(rows), run(_resized(feeds, lengths, size)))], rows, given, lengths)
    parts = []
    for size, members in groups:
        picked = {name: array[members] if _has_rows(array, rows) else array for name, array in feeds.items()}
        parts.append((np.asarray(members), run(_resized(picked, lengths, size))))
    return _in_place(parts, rows, given, lengths)


def group_rows(ends: npt.NDArray[Any], sizes: Sequence[int], start_cost: int) -> list[tuple[int, list[int]]]:
    """Rows to run together, by the length they are padded to, the shortest first.

    Each row is padded to its next length, unless starting a run for it would take longer than padding it to the length
    of another group: of all ways to put neighbours together the one with the fewest tokens, counting `start_cost` of
    them for each run.
    """
    groups: dict[int, list[int]] = {}
    for row, end in enumerate(ends):
        groups.setdefault(_hold(sizes, int(end)), []).append(row)
    found = sorted(groups.items())

    def cost(ways: Sequence[int]) -> int:
        """`ways` names the groups whose length others are padded to."""
        start, tokens = 0, 0
        for way in ways:
            tokens += start_cost + found[way][0] * sum(len(rows) for _, rows in found[start : way + 1])
            start = way + 1
        return tokens

    last = len(found) - 1
    every = ((*chosen, last) for count in range(last, -1, -1) for chosen in itertools.combinations(range(last), count))
    start, together = 0, []
    for way in min(every, key=cost):  # of equals that with the most groups
        together.append((found[way][0], sorted(row for _, rows in found[start : way + 1] for row in rows)))
        start = way + 1
    return together


def computed_tokens(mask: Array, lengths: Lengths) -> int:
    """How many positions are computed for a batch with this mask."""
    ends = ends_of(mask)
    return mask.size if ends is None else sum(_hold(lengths.sizes, int(end)) for end in ends)


def longest_text(mask: npt.NDArray[Any]) -> int:
    """How many tokens the longest row has, or all of them where rows do not end with their padding."""
    ends = ends_of(mask)
    return int(mask.shape[1] if ends is None else ends.max())


def ends_of(mask: npt.NDArray[Any]) -> npt.NDArray[np.int64] | None:
    """Where each row ends; None where one has something behind its first padding, or nothing at all."""
    if mask.ndim != 2 or not mask.size:
        return None
    ones = mask != 0
    ends: npt.NDArray[np.int64] = ones.sum(axis=1)
    expected = np.arange(mask.shape[1]) < ends[:, None]
    return ends if ends.all() and bool((ones == expected).all()) else None


def _hold(sizes: Sequence[int], length: int) -> int:
    """The next size; a length beyond all of them stays, and whoever runs it says what it takes."""
    index = bisect.bisect_left(sizes, length)
    return sizes[index] if index < len(sizes) else length


def _has_rows(array: Array, rows: int) -> bool:
    return array.ndim > 0 and array.shape[0] == rows


def _resized(feeds: Feeds, lengths: Lengths, size: int) -> dict[str, Array]:
    resized: dict[str, Array] = dict(feeds)
    for name, padding in lengths.padding.items():
        array = feeds[name][:, :size]
        missing = size - array.shape[1]
        if missing:
            array = np.pad(array, ((0, 0), (0, missing), *((0, 0),) * (array.ndim - 2)), constant_values=padding)
        resized[name] = np.ascontiguousarray(array)
    return resized


def _in_place(parts: Sequence[tuple[Any, Outputs]], rows: int, given: int, lengths: Lengths) -> dict[str, Array]:
    placed: dict[str, Array] = {}
    for name, first in parts[0][1].items():
        carries = name in lengths.outputs
        if len(parts) == 1 and (not carries or first.shape[1] == given):
            placed[name] = first
            continue
        shape = (rows, given, *first.shape[2:]) if carries else (rows, *first.shape[1:])
        whole = np.zeros(shape, first.dtype)
        for members, outputs in parts:
            if carries:
                length = min(outputs[name].shape[1], given)
                whole[members, :length] = outputs[name][:, :length]
            else:
                whole[members] = outputs[name]
        placed[name] = whole
    return placed
