"""Calls that go around Python: the micro-batcher in C, where a call is one CUDA graph at each of its batch sizes.

It runs in the session's own slots, all of which are lent to it, and called back by whoever else wants one. The graphs
are Python's as well: a call whose shape comes again captures its own, and a thread captures those that several callers
would have filled together. Memory for other sizes would be taken in vain.
"""

from __future__ import annotations

import bisect
import math
import threading
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np

from mlflow_trt.core.arrays import Feeds, Outputs
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.types import BatchAxis
from mlflow_trt.errors import MlflowTrtError, SessionClosedError
from mlflow_trt.runtime.batching.background_worker import BackgroundWorker
from mlflow_trt.runtime.batching.plans import Plan
from mlflow_trt.runtime.batching.sizes import BatchRows, Shapes
from mlflow_trt.runtime.batching.slots import Slot, Slots

if TYPE_CHECKING:
    from mlflow_trt import _native

MOST_BYTES = 32 << 20
"""Of a call's inputs that goes this way."""
_MOST_KNOWN = 256  # kinds of rows; what comes after them goes through Python
_MOST_SIZES = 24  # as the extension has it
_MOST_ROUTES = 64  # likewise
_MOST_CAPTURES = 32
"""How often graphs of a route are captured: where other shapes take their memory again and again, it is given up."""
_OUT_OF_MEMORY = 2  # CUresult
_ONE_GRAPH, _ANOTHER_SLOT = 0, 2  # of what the batcher misses
_log = get_logger(__name__)


class NativeSlot(Slot, Protocol):
    """A slot whose runs can be launched without Python."""

    def capture_call(self, rows: BatchRows, profile: int) -> Shapes:
        """Run rows until it is a graph, with the way back, and small inputs' way there; returns the shapes of the
        outputs, or none where there is no graph to be had.
        """

    def call_graphs(self) -> Mapping[Hashable, int]:
        """The handles of such graphs, by profile and the shapes of the inputs. They are good until the slot is used."""

    def addresses(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """The stream, the pinned memory of all inputs and outputs, and that of the inputs on the GPU."""


AnyNativeSlot = TypeVar("AnyNativeSlot", bound=NativeSlot)


class BatchFailedError(Exception):
    """A whole batch failed: each of its requests is to be run alone. `no_room`: not alone, and memory was lacking."""

    def __init__(self, *, no_room: bool) -> None:
        super().__init__()
        self.no_room = no_room


class _Route:
    """Calls that may run together: of one profile, with rows of one shape, in the same sizes."""

    def __init__(self, profile: int, sizes: tuple[int, ...]) -> None:
        self.profile = profile
        self.sizes = sizes
        self.row: Feeds = {}  # to capture with, once that is wanted: valid, and nothing that refers to the caller's
        self.number: int | None = None  # in the extension, once the outputs are known
        self.outputs: list[tuple[str, tuple[int, ...], np.dtype[np.generic]]] = []
        self.captures = 0
        self.met: set[int] = set()  # sizes that a call found without a graph, by their index
        self.is_asked_for = False  # graphs of it, by somebody who sees to it
        self.given_up = False

    def keep_row(self, feeds: Feeds) -> None:
        self.row = self.row or {name: array[:1].copy() for name, array in feeds.items()}

    def key(self, size: int) -> Hashable:
        """What slots call its shapes."""
        return (self.profile, *((size, *row.shape[1:]) for row in self.row.values()))

    def rows(self, size: int, axis: BatchAxis) -> BatchRows:
        return BatchRows([self.row], axis, size)


class NativeBatches(Generic[AnyNativeSlot]):
    """The batcher in C, on the slots of a session.

    Args:
        slots: the session's.
        axis: along which requests are put one after another; every input has it.
        batcher: the extension's, for as many inputs and outputs.
        inputs: their names, in the order of the slots' memory.
        outputs: the dtypes of the outputs by name, likewise.
        graph_bytes: of inputs, up to which the slots' graphs upload them.
        keep: what the batcher's addresses belong to.
    """

    def __init__(
        self,
        slots: Slots[AnyNativeSlot],
        axis: BatchAxis,
        batcher: _native.Batcher,
        *,
        inputs: Sequence[str],
        outputs: Mapping[str, np.dtype[np.generic]],
        graph_bytes: int,
        keep: object,
    ) -> None:
        self._slots = slots
        self._axis = axis
        self._batcher = batcher
        self._inputs = tuple(inputs)
        self._outputs = dict(outputs)
        self._graph_bytes = graph_bytes
        self._keep = keep
        self._routes: dict[Hashable, _Route] = {}
        self._places: dict[Hashable, list[tuple[int, int]]] = {}  # by shapes: the routes and sizes they belong to
        self._numbered: list[_Route] = []
        self._heard = 0  # of what the batcher wants
        self._lock = threading.Lock()
        self._worker = BackgroundWorker("capture")

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Pairs of a size, and how often it was run."""
        return self._batcher.runs()

    def takes(self, plan: Plan) -> bool:
        """Whether calls of this plan may go this way at all."""
        sizes = plan.sizes.all if plan.sizes is not None else ()
        return plan.together and not plan.shared and 0 < len(sizes) <= _MOST_SIZES and plan.nbytes <= MOST_BYTES

    def run(self, plan: Plan, feeds: Feeds) -> Outputs | None:
        """New arrays; None where Python has to run it. Raises BatchFailedError; SessionClosedError after `close`."""
        route = self._route(plan)
        if route is None or route.given_up:
            return None
        if route.number is None:
            self._meet(route, bisect.bisect_left(route.sizes, plan.rows), feeds)
        if route.number is None:
            return None
        if not self._slots.lend(self._hand_over, self._batcher.recall):
            return None
        outputs = {name: np.empty((plan.rows, *shape), dtype) for name, shape, dtype in route.outputs}
        done = self._batcher.run(route.number, plan.rows, *[feeds[name] for name in self._inputs], *outputs.values())
        if self._batcher.wants != self._heard:
            self._listen(feeds)
        if done is True:
            return outputs
        if done is False:
            return None
        status, company = done
        raise BatchFailedError(no_room=status == _OUT_OF_MEMORY and company > 1)

    def prepare(self, plan: Plan, feeds: Feeds, slots: Sequence[AnyNativeSlot]) -> None:
        """Capture every size of a plan in these slots, which the caller holds."""
        route = self._route(plan)
        if route is None:
            return
        route.keep_row(feeds)
        self._capture(route, range(len(route.sizes)), slots)

    def close(self) -> None:
        """Capture nothing any more; after the slots were closed."""
        self._worker.close()

    def _route(self, plan: Plan) -> _Route | None:
        sizes = plan.sizes.all if plan.sizes is not None else ()
        key = (plan.key, sizes)
        route = self._routes.get(key)
        if route is None:
            with self._lock:
                if len(self._routes) < _MOST_KNOWN:
                    route = self._routes.setdefault(key, _Route(plan.profile, sizes))
        return route

    def _hand_over(self, slots: Sequence[AnyNativeSlot]) -> None:
        """Lend the slots to the batcher, with the graphs that are good."""
        for number, slot in enumerate(slots):
            self._batcher.lend(number, *slot.addresses())
            for key, graph in slot.call_graphs().items():
                for route, size in self._places.get(key, ()):
                    self._batcher.set_graph(number, route, size, graph)
        self._batcher.open()

    # ---- graphs that are missing

    def _meet(self, route: _Route, index: int, feeds: Feeds) -> None:
        """A call found no graph for its size. The second one captures it, as in Python."""
        if index not in route.met:
            route.met.add(index)
            return
        if self._ask_for(route):
            route.keep_row(feeds)
            self._grant(route, [index], slots=1)

    def _listen(self, feeds: Feeds) -> None:
        """What the batcher missed: a graph, or a second slot for callers who stand in line."""
        self._heard = self._batcher.wants
        number, index, kind = self._batcher.wanted()
        route = self._numbered[number]
        if kind == _ONE_GRAPH:
            self._meet(route, index, feeds)
        elif not route.given_up and self._ask_for(route):
            slots = 2 if kind == _ANOTHER_SLOT else 1
            if not self._worker.submit(partial(self._grant, route, range(index + 1), slots)):
                route.is_asked_for = False  # a later call asks again

    def _ask_for(self, route: _Route) -> bool:
        """Whether the caller is to see to graphs of a route, since nobody else does."""
        with self._lock:
            was_asked_for, route.is_asked_for = route.is_asked_for, True
        return not was_asked_for

    def _grant(self, route: _Route, indices: Sequence[int], slots: int) -> None:
        """Capture the graphs of some sizes, by their index, in all slots and at least so many.

        Where that fails, calls stay in Python, which has its own ways to fail.
        """
        try:
            with self._slots.borrow_several(max(slots, self._slots.made)) as held:
                self._capture(route, indices, held)
        except SessionClosedError:
            route.given_up = True
        except MlflowTrtError as error:
            route.given_up = True
            _log.warning("Calls of such rows go through Python, since a run failed: %s", error.message)
        except Exception:  # noqa: BLE001  # as above
            route.given_up = True
            _log.exception("Calls of such rows go through Python, since a run failed")
        finally:
            route.is_asked_for = False

    def _capture(self, route: _Route, indices: Sequence[int], slots: Sequence[AnyNativeSlot]) -> None:
        """Capture what is missing of these sizes, the largest first, so that no buffer grows later."""
        for size in sorted((route.sizes[index] for index in indices), reverse=True):
            for slot in slots:
                is_there = route.number is not None and route.key(size) in slot.call_graphs()
                if route.given_up or is_there:
                    continue
                shapes = slot.capture_call(route.rows(size, self._axis), route.profile)
                # One row for each of input, of the same shape in every size.
                rows = {name: shape[1:] for name, shape in shapes.items() if shape and shape[0] == size}
                if route.number is None and len(rows) == len(self._outputs) and len(self._numbered) < _MOST_ROUTES:
                    self._number(route, rows)
                route.captures += 1
                is_good = route.number is not None and rows == {name: shape for name, shape, _ in route.outputs}
                route.given_up = not is_good or route.captures > _MOST_CAPTURES * len(slots)

    def _number(self, route: _Route, rows: Mapping[str, tuple[int, ...]]) -> None:
        """Make a route known to the batcher, now that the shapes of its rows of output are."""
        route.outputs = [(name, rows[name], dtype) for name, dtype in self._outputs.items()]
        row_bytes = [route.row[name].nbytes for name in self._inputs]
        most_in_graph = self._graph_bytes // max(1, sum(row_bytes))
        row_bytes += [math.prod(shape) * dtype.itemsize for _, shape, dtype in route.outputs]
        number = self._batcher.add_route(route.sizes, tuple(row_bytes), most_in_graph)
        self._numbered.append(route)
        for index, size in enumerate(route.sizes):
            self._places.setdefault(route.key(size), []).append((number, index))
        route.number = number
