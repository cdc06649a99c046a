"""A batch that is run in pieces, by one scheduler or by those of several GPUs at the same time."""

from __future__ import annotations

import threading

import numpy as np

from mlflow_trt.core.arrays import Array, Feeds, Outputs
from mlflow_trt.runtime.batching.host_copy import copy_rows
from mlflow_trt.runtime.batching.sizes import Piece, Sizes, check_row_shape, check_rows


class Work:
    """Shares out the rows of a batch, and puts its outputs together as they come.

    Attributes:
        outputs: new arrays, complete when `is_done`.
    """

    def __init__(self, feeds: Feeds, rows: int, profile: int) -> None:
        self.feeds = feeds
        self.rows = rows
        self.profile = profile
        self.outputs: Outputs = {}
        self._lock = threading.Lock()
        self._left = [(0, rows)]
        self._done = 0

    @property
    def is_done(self) -> bool:
        """Whether every row has its outputs."""
        return self._done == self.rows and bool(self.outputs)

    @property
    def is_left(self) -> bool:
        """Whether there are rows that nobody has taken."""
        return bool(self._left)

    def take(self, sizes: Sizes) -> Piece | None:
        """The next rows, as many as are run at once; None where there are none left."""
        with self._lock:
            if not self._left:
                return None
            start, stop = self._left.pop()
            size = sizes.largest if stop - start >= sizes.largest else sizes.cut(stop - start)[0]
            if start + size < stop:
                self._left.append((start + size, stop))
            return Piece(start, min(start + size, stop), size)

    def give_back(self, piece: Piece) -> None:
        """Rows that were taken and not run, for somebody to take again."""
        with self._lock:
            self._left.append((piece.start, piece.stop))

    def stop(self) -> None:
        """Let nobody take any more."""
        with self._lock:
            self._left.clear()

    def add(self, piece: Piece, outputs: Outputs) -> None:
        """Take the rows that are no padding. Raises InputShapeError for an output without rows."""
        check_rows(outputs, piece.size)
        for name, output in outputs.items():
            with self._lock:
                if name not in self.outputs:
                    self.outputs[name] = np.empty((self.rows, *output.shape[1:]), output.dtype)
            _put(name, piece, output, self.outputs[name])
        with self._lock:
            self._done += piece.stop - piece.start


def _put(name: str, piece: Piece, output: Array, target: Array) -> None:
    check_row_shape(name, output.shape, target.shape)
    rows = piece.stop - piece.start
    if rows:
        for _ in copy_rows([(output[:rows], 0, rows)], target[piece.start : piece.stop]):
            pass
