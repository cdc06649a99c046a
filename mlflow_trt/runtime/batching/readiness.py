"""Which batch sizes calls are run in while the others are still being compiled, in a thread, one after the other.

A size that was never run may take seconds to compile. So calls are cut or padded to the sizes that have been; the
first one is what the first call needs. Sizes are kept apart by profile and by the shapes of rows: for the usual shapes
all are made ready, for any others those that calls would have been run in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import NoReturn

import numpy as np

from mlflow_trt.core.arrays import Feeds, take_rows
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.types import BatchAxis
from mlflow_trt.errors import MlflowTrtError, SessionClosedError
from mlflow_trt.runtime.batching.background_worker import BackgroundWorker
from mlflow_trt.runtime.batching.sizes import GivenSizes, Sizes

MOST_FAMILIES = 256
"""Of row shapes, that anything is known of. Those that come after them are compiled when they are run."""

_log = get_logger(__name__)

Prepare = Callable[[int, Feeds], None]
"""Runs feeds as they are in a profile, beside the calls that run. Raises what a run raises."""


class _Family:
    """The sizes for rows of one shape."""

    def __init__(self, profile: int, feeds: Feeds, axis: BatchAxis, every: Sizes, first: int, *, is_usual: bool):
        self.profile = profile
        self._axis = axis
        # As little of the caller's arrays as is needed, and nothing that refers to them.
        self._row = {name: array.copy() for name, array in take_rows(feeds, axis, slice(1)).items()}
        self.every = every
        self.ready = {first}
        self.asked_for = {first}  # ready, being made ready, or not to be had
        self.is_usual = is_usual
        self.has_run = False

    def mark(self, size: int) -> None:
        self.ready.add(size)
        self.asked_for.add(size)

    def feeds(self, size: int) -> Feeds:
        """So many rows, all of them valid: repeated from those of a call."""
        return {
            name: np.ascontiguousarray(np.broadcast_to(row, (size, *row.shape[1:])))
            if name in self._axis.inputs
            else row
            for name, row in self._row.items()
        }


class Readiness:
    """The sizes that are ready.

    Args:
        prepare: makes a size ready; called by one thread at a time.
        axis: the batch axis.
        changed: called when there are more, by the thread that made them so.
    """

    def __init__(self, prepare: Prepare, axis: BatchAxis, changed: Callable[[], None]) -> None:
        self._prepare = prepare
        self._axis = axis
        self._changed = changed
        self._lock = threading.Lock()
        self._families: dict[Hashable, _Family] = {}
        self._worker = BackgroundWorker("compile")

    def usable(self, key: Hashable, profile: int, rows: int, every: Sizes, feeds: Feeds, *, is_usual: bool) -> Sizes:
        """The sizes to run these rows in; `every` names all that there may be. The rows are at least one.

        What is missing for them is made ready, once the first call of this family has run.
        """
        first = every.hold(rows) if rows <= every.largest else every.largest
        with self._lock:
            family = self._families.get(key)
            if family is None:
                if len(self._families) >= MOST_FAMILIES:
                    return every
                family = _Family(profile, feeds, self._axis, every, first, is_usual=is_usual)
                self._families[key] = family
            ready = tuple(size for size in every.all if size in family.ready)
            if not ready:  # there is no room for those that were
                family.mark(first)
                ready = (first,)
            if family.has_run:
                self._want(family, every.cut(rows))
        return every if len(ready) == len(every.all) else GivenSizes(ready)

    def ran(self, key: Hashable, rows: int) -> None:
        """A call has run, while so many rows wanted to: from now on other sizes are compiled beside the calls."""
        family = self._families.get(key)
        if family is None or family.asked_for.issuperset(family.every.all):
            return
        with self._lock:
            family.has_run = True
            self._want(family, family.every.cut(max(1, min(rows, family.every.largest))))
            if family.is_usual:
                self._want(family, family.every.all)

    def mark(self, key: Hashable, profile: int, every: Sizes, size: int, feeds: Feeds) -> None:
        """A size was made ready by other means."""
        with self._lock:
            family = self._families.get(key)
            if family is None:
                family = _Family(profile, feeds, self._axis, every, size, is_usual=True)
                self._families[key] = family
            family.mark(size)
        self._changed()

    def close(self) -> None:
        """Make nothing ready any more, once what is under way has ended."""
        self._worker.close()
        self._prepare = _refuse  # lets go of what it runs

    def _want(self, family: _Family, sizes: Iterable[int]) -> None:
        for size in sizes:
            if size not in family.asked_for:
                if not self._worker.submit(partial(self._make_ready, family, size)):
                    return  # a later call asks again
                family.asked_for.add(size)

    def _make_ready(self, family: _Family, size: int) -> None:
        try:
            self._prepare(family.profile, family.feeds(size))
        except MlflowTrtError as error:
            _log.warning("Batches of %d rows are run in other sizes, since they failed: %s", size, error.message)
            return
        except Exception:  # noqa: BLE001  # the calls go on in the sizes there are
            _log.exception("Batches of %d rows are run in other sizes, since they failed", size)
            return
        with self._lock:
            family.ready.add(size)
        self._changed()


def _refuse(_profile: int, _feeds: Feeds) -> NoReturn:
    raise SessionClosedError
