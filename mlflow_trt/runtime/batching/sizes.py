"""Run a batch of any size on a runtime that takes only some sizes: cut it, pad the last piece, join the results.

The sizes are few, since a shape that was not run before costs more than any padding: TensorRT-RTX compiles kernels for
it, and every shape wants an execution context and a CUDA graph of its own.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mlflow_trt.core.arrays import Array, Feeds
from mlflow_trt.core.types import BatchAxis
from mlflow_trt.errors import InputShapeError

Shapes = dict[str, tuple[int, ...]]

START_COST = 8
"""What starting a run costs, counted in rows: a run of n rows takes about as long as (START_COST + n) rows do inside of
a large one. Measured on an H100 it is 14 for ResNet-50; it decides only whether to pad or to cut, where anything from
4 to 32 comes within a tenth of the best choice."""


class Piece(NamedTuple):
    """Rows `start` to `stop` of a batch, run as `size` rows: the rest is padding that is cut off again."""

    start: int
    stop: int
    size: int


class Sizes(Protocol):
    """The batch sizes that a runtime is to run. `all` names them, the smallest first; empty: there is no list."""

    largest: int
    all: tuple[int, ...]

    def cut(self, rows: int) -> Sequence[int]:
        """Sizes whose sum is at least `rows`, of which only the last is padded; one where there are no rows."""

    def hold(self, rows: int) -> int:
        """The smallest size that holds `rows`, which are at most `largest`."""

    def smaller(self) -> Sizes | None:
        """The same without the largest, for a GPU that has no room for it; None where there is no smaller one."""


class AnySize:
    """Every size up to `largest`."""

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self.all: tuple[int, ...] = ()

    def cut(self, rows: int) -> Sequence[int]:
        whole, rest = divmod(rows, self.largest)
        return (self.largest,) * whole + ((rest,) if rest or not whole else ())

    def hold(self, rows: int) -> int:
        return rows

    def smaller(self) -> AnySize | None:
        return AnySize(self.largest // 2) if self.largest > 1 else None


class GivenSizes:
    """These, the smallest first."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.all = sizes
        self.largest = sizes[-1]

    def cut(self, rows: int) -> Sequence[int]:
        whole, rest = divmod(rows, self.largest)
        return (self.largest,) * whole + (_cover(rest, self.all) if rest or not whole else ())

    def hold(self, rows: int) -> int:
        return self.all[bisect.bisect_left(self.all, rows)]

    def smaller(self) -> GivenSizes | None:
        return GivenSizes(self.all[:-1]) if len(self.all) > 1 else None


class FewSizes(GivenSizes):
    """The ends of a profile's range, its usual size, and the powers of two between: a handful."""

    def __init__(self, smallest: int, usual: int, largest: int) -> None:
        powers = (1 << n for n in range(largest.bit_length()))
        between = (size for size in powers if smallest < size < largest)
        super().__init__(tuple(sorted({smallest, usual, largest, *between})))


@functools.lru_cache(maxsize=4096)
def _cover(rows: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The cheapest of: padding to the next size, or the largest size below and the same question for the rest."""
    padded = (next(size for size in sizes if size >= rows),)
    below = [size for size in sizes if size < rows]
    if not below:
        return padded
    cut = (below[-1], *_cover(rows - below[-1], sizes))
    return min(padded, cut, key=lambda found: sum(START_COST + size for size in found))


def batch_size(feeds: Feeds, axis: BatchAxis) -> int:
    """How many rows a batch has. Raises InputShapeError where its inputs disagree."""
    first, *others = axis.inputs
    rows = int(feeds[first].shape[0])
    for name in others:
        if feeds[name].shape[0] != rows:
            raise InputShapeError(
                f"input {name!r} has {feeds[name].shape[0]} rows, but input {first!r} has {rows}", tensor=name
            )
    return rows


def pieces(rows: int, sizes: Sizes) -> Iterator[Piece]:
    """The pieces that a batch is run in."""
    start = 0
    for size in sizes.cut(rows):
        stop = min(start + size, rows)
        yield Piece(start, stop, size)
        start = stop


class BatchRows(NamedTuple):
    """What is to be run at once: parts of one or several batches that are put one after another, then padding."""

    parts: Sequence[Feeds]
    axis: BatchAxis | None
    size: int

    @property
    def shapes(self) -> Shapes:
        batched = self.axis.inputs if self.axis else ()
        return {
            name: (self.size, *array.shape[1:]) if name in batched else array.shape
            for name, array in self.parts[0].items()
        }

    def copies(self, name: str) -> Iterator[tuple[Array, int, int]]:
        """Arrays, and the rows of the input `name` that each of them goes to; one of size 1 fills all of its rows.

        Padding repeats the last row, not zeros: it is certain to be valid. Only an empty batch has none.
        """
        if self.axis is None or name not in self.axis.inputs:
            raise ValueError(f"{name!r} has no rows")
        start, last = 0, None
        for part in self.parts:
            array = part[name]
            if len(array):
                yield array, start, start + len(array)
                start, last = start + len(array), array[-1:]
        if start < self.size:
            like = self.parts[0][name]
            yield np.zeros_like(like, shape=(1, *like.shape[1:])) if last is None else last, start, self.size

    def is_batched(self, name: str) -> bool:
        return self.axis is not None and name in self.axis.inputs


class OutputWithoutRowsError(InputShapeError):
    """An output turned out not to have one row for each row of input, whatever the model's graph says."""


def check_rows(outputs: Mapping[str, Array], size: int) -> None:
    """Raise OutputWithoutRowsError where an output does not have `size` rows."""
    for name, output in outputs.items():
        if output.ndim == 0 or output.shape[0] != size:
            raise OutputWithoutRowsError(
                f"output {name!r} has the shape {output.shape} for {size} rows of input: it does not carry the batch "
                "axis, so only batches that the engine takes whole can be run",
                tensor=name,
            )


def check_row_shape(name: str, shape: tuple[int, ...], before: tuple[int, ...]) -> None:
    """Raise InputShapeError where the rows of an output differ from those that another piece of the batch gave."""
    if shape[1:] != before[1:]:
        raise InputShapeError(
            f"output {name!r} has rows of shape {shape[1:]} after rows of {before[1:]}: its size depends on the data, "
            "so only batches that the engine takes whole can be run"
        )
