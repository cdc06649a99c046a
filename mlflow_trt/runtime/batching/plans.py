"""What to do with a call: which profile, which batch sizes, and whether it can be put together with others."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from typing import NamedTuple, cast

from mlflow_trt.core.arrays import Feeds
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.types import BatchAxis, ShapeProfile
from mlflow_trt.runtime.batching.choose_profile import choose_profile
from mlflow_trt.runtime.batching.readiness import Prepare, Readiness
from mlflow_trt.runtime.batching.sizes import AnySize, FewSizes, OutputWithoutRowsError, Sizes, batch_size

_MOST_SHARED_BYTES = 4096
_LARGE_BYTES = 2 << 20
_MOST_PLANS = 1024
_log = get_logger(__name__)


class Plan(NamedTuple):
    """What to do with feeds of some shapes.

    Without `sizes` they run as they are, alone. `together`: with others of the same `key` and the same values of the
    `shared` inputs, which have no rows. `nbytes` are those of the inputs.
    """

    profile: int
    fits: bool
    rows: int = 0
    sizes: Sizes | None = None
    key: Hashable = None
    together: bool = False
    shared: tuple[str, ...] = ()
    nbytes: int = 0

    @property
    def is_large(self) -> bool:
        return self.nbytes > _LARGE_BYTES

    def key_of(self, feeds: Feeds) -> Hashable:
        """What the requests of a batch have in common."""
        if not self.shared:
            return self.key
        return (self.key, *(feeds[name].tobytes() for name in self.shared))


class Plans:
    """Makes plans and keeps them, since calls of the same shapes are treated alike.

    Args:
        profiles: what the engine accepts. Empty: anything, as ONNX Runtime does.
        axis: the batch axis, if the model has one.
        largest: the largest batch to run at once where there are no profiles; None for no limit, and then calls are
            not put together either.
        puts_together: whether calls are put together at all.
        prepare: makes a batch size ready beside the calls, which are run in sizes that are; None: all of them are.
    """

    def __init__(
        self,
        profiles: Sequence[ShapeProfile],
        axis: BatchAxis | None,
        *,
        largest: int | None,
        puts_together: bool,
        prepare: Prepare | None,
    ) -> None:
        self._profiles = tuple(profiles)
        self.axis = axis if axis is not None and axis.splits else None
        self._declared_axis = axis
        self._sizes = [self._sizes_for(profile) for profile in self._profiles]
        if not self._profiles:
            self._sizes = [AnySize(largest) if largest and self.axis else None]
        self._puts_together = puts_together
        self._plans: dict[Hashable, Plan] = {}
        self._generation = 0  # of plans
        self._values_matter = any(limits.is_values for profile in profiles for limits in profile.ranges.values())
        self._without_rows: OutputWithoutRowsError | None = None
        self._lock = threading.Lock()
        self.readiness = Readiness(prepare, self.axis, self.forget) if prepare and self.axis else None

    def plan(self, feeds: Feeds) -> Plan:
        """What to do with feeds of these shapes; kept, since it is the same for nearly every call."""
        shapes = tuple([array.shape for array in feeds.values()])
        plan = self._plans.get(shapes)
        if plan is None:
            generation = self._generation
            plan = self._new_plan(feeds)
            if not self._values_matter:
                with self._lock:
                    if len(self._plans) >= _MOST_PLANS:
                        self._plans.clear()
                    if generation == self._generation:
                        self._plans[shapes] = plan
        return plan

    def run_without_rows(self, error: OutputWithoutRowsError) -> None:
        """From now on cut nothing: `error` tells of an output that has no rows."""
        self._without_rows = error
        self.forget()

    def limit(self, profile: int, largest: int, cause: str) -> None:
        """Run no more rows at once from now on, if there is a size that small."""
        with self._lock:
            sizes = self._sizes[profile]
            while sizes is not None and sizes.largest > largest:
                sizes = sizes.smaller()
            if sizes is None or sizes is self._sizes[profile]:
                return
            self._sizes[profile] = sizes
        self.forget()
        _log.warning("Running at most %d rows at once from now on: %s", sizes.largest, cause)

    def sizes_of(self, profile: int) -> Sizes | None:
        """The batch sizes that a profile is run in; None where its batches are not cut."""
        return self._sizes[profile] if self.axis is not None else None

    def mark_ready(self, feeds: Feeds, profile: int, size: int | None) -> None:
        """Feeds of so many rows were run in every slot."""
        sizes = self._sizes[profile]
        if self.readiness is not None and sizes is not None and size:
            self.readiness.mark(self._family(profile, feeds), profile, sizes, size, feeds)

    def usable(self, sizes: Sizes, profile: int, rows: int, feeds: Feeds) -> Sizes:
        """Of these sizes those that need not be made ready first."""
        if self.readiness is None or rows == 0:
            return sizes
        axis = cast("BatchAxis", self.axis)
        is_usual = not self._profiles or all(
            array.shape[name in axis.inputs :] == limits.opt[name in axis.inputs :]
            for name, array in feeds.items()
            if (limits := self._profiles[profile].ranges.get(name)) is not None and not limits.is_values
        )
        return self.readiness.usable(self._family(profile, feeds), profile, rows, sizes, feeds, is_usual=is_usual)

    def forget(self) -> None:
        with self._lock:
            self._generation += 1
            self._plans.clear()

    def _sizes_for(self, profile: ShapeProfile) -> Sizes | None:
        limits = profile.ranges.get(self.axis.inputs[0]) if self.axis else None
        return FewSizes(limits.min[0], limits.opt[0], limits.max[0]) if limits else None

    def _new_plan(self, feeds: Feeds) -> Plan:
        profile, fits = 0, True
        if self._profiles:
            choice = choose_profile(self._profiles, feeds, self._declared_axis)
            profile, fits = choice.profile, choice.rows is None
        axis, sizes = self.axis, self._sizes[profile]
        if self._without_rows is not None and not fits:
            raise self._without_rows
        if axis is None or sizes is None or self._without_rows is not None:
            return Plan(profile, fits)
        first, *others = axis.inputs
        if fits and any(len(feeds[name]) != len(feeds[first]) for name in others):
            return Plan(profile, fits)
        rows = batch_size(feeds, axis)
        sizes = self.usable(sizes, profile, rows, feeds)
        shared = tuple(name for name in feeds if name not in axis.inputs)
        together = (
            self._puts_together
            and rows > 0
            and len(sizes.cut(rows)) == 1
            and sum(feeds[name].nbytes for name in shared) <= _MOST_SHARED_BYTES
        )
        key = self._family(profile, feeds)
        nbytes = sum(array.nbytes for array in feeds.values())
        return Plan(profile, fits, rows, sizes, key, together, shared, nbytes)

    def _family(self, profile: int, feeds: Feeds) -> Hashable:
        """What calls have in common whose rows can be run together, but for the values of shared inputs."""
        batched = self.axis.inputs if self.axis else ()
        return (profile, *(array.shape[name in batched :] for name, array in feeds.items()))
