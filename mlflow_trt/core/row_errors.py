"""How far each row is off: what a norm over all of them hides, where one row is loud and the others are quiet."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_Numbers = npt.NDArray[np.float64]


class RowSummary(NamedTuple):
    """The relative errors of the rows of one output; None where there is a single row, which the norm judges."""

    rows: int
    median: float | None = None
    worst: float | None = None


class RowErrors:
    """Collects two numbers for each row, so that the rows themselves need not be kept."""

    def __init__(self) -> None:
        self._differences: list[_Numbers] = []
        self._norms: list[_Numbers] = []
        self._widths: list[_Numbers] = []

    def add(self, difference: _Numbers, wanted: _Numbers, usable: npt.NDArray[np.bool_], *, by_row: bool) -> None:
        """Arrays of one shape, whose axis 0 counts rows, or which are one row; what is not `usable` is 0 in both."""
        rows = len(wanted) if by_row and wanted.ndim else 1
        self._differences.append(_norms(difference.reshape(rows, -1)))
        self._norms.append(_norms(wanted.reshape(rows, -1)))
        self._widths.append(np.count_nonzero(usable.reshape(rows, -1), axis=1).astype(np.float64))

    def summary(self) -> RowSummary:
        """Each row is measured against its own norm; for the worst, against what one usual value is where that is more.

        A prediction of a single number may be near zero by chance: its relative error would say nothing. In the median
        such rows do no harm.
        """
        if not self._norms:
            return RowSummary(0)
        differences, norms, widths = map(np.concatenate, (self._differences, self._norms, self._widths))
        if len(norms) < 2:
            return RowSummary(len(norms))
        usual = float(np.median(norms / np.sqrt(np.maximum(widths, 1))))
        median = float(np.median(_relative(differences, norms)))
        return RowSummary(len(norms), median, float(_relative(differences, np.maximum(norms, usual)).max()))


def _norms(rows: _Numbers) -> _Numbers:
    norms: _Numbers = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return norms


def _relative(differences: _Numbers, norms: _Numbers) -> _Numbers:
    """The difference itself where the reference is zero."""
    return np.divide(differences, norms, out=differences.copy(), where=norms > 0)
