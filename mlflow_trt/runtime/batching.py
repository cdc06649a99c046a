"""Run a batch of any size on a runtime that takes only some sizes: split it, pad the last piece, join the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from mlflow_trt.errors import InputShapeError
from mlflow_trt.inputs import Array, Feeds
from mlflow_trt.spec import BatchAxis

Outputs = dict[str, Array]


class Piece(NamedTuple):
    """Rows `start` to `stop` of a batch, run as `size` rows: the rest is padding that is cut off again."""

    start: int
    stop: int
    size: int


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


def pieces(rows: int, smallest: int, largest: int) -> Iterator[Piece]:
    """Cut `rows` into pieces of `largest`; what is left over is padded to `smallest` where it is below that."""
    start = 0
    while True:
        stop = min(start + largest, rows)
        yield Piece(start, stop, max(stop - start, smallest))
        start = stop
        if start >= rows:
            return


def run_in_pieces(
    feeds: Feeds, axis: BatchAxis, smallest: int, largest: int, execute: Callable[[Feeds], Outputs]
) -> Outputs:
    """The outputs of `execute` for a batch of any size, although it takes only `smallest` to `largest` rows.

    Raises InputShapeError where an output turns out not to have one row for each row of input.
    """
    rows = batch_size(feeds, axis)
    results: list[Outputs] = []
    for piece in pieces(rows, smallest, largest):
        outputs = execute(_take(feeds, axis, piece))
        for name, output in outputs.items():
            if output.ndim == 0 or output.shape[0] != piece.size:
                raise InputShapeError(
                    f"output {name!r} has the shape {output.shape} for {piece.size} rows of input: it does not carry "
                    f"the batch axis, so only batches of {smallest} to {largest} rows can be run"
                )
        results.append({name: output[: piece.stop - piece.start] for name, output in outputs.items()})
    return _join(results)


def _take(feeds: Feeds, axis: BatchAxis, piece: Piece) -> Feeds:
    taken = dict(feeds)
    for name in axis.inputs:
        part = feeds[name][piece.start : piece.stop]
        missing = piece.size - part.shape[0]
        if missing:
            # The last row once more, not zeros: it is certain to be a valid input. There is none in an empty batch.
            filler = part[-1:] if len(part) else np.zeros_like(part, shape=(1, *part.shape[1:]))
            part = np.concatenate([part, np.repeat(filler, missing, axis=0)])
        taken[name] = part
    return taken


def _join(results: list[Outputs]) -> Outputs:
    if len(results) == 1:
        return results[0]
    names: Mapping[str, Array] = results[0]
    return {name: np.concatenate([result[name] for result in results]) for name in names}
