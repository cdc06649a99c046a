"""From a call to runs: which profile, which batch sizes, alone or together with others, one slot or several at once."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, cast

from mlflow_trt.core.arrays import Feeds, Outputs
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.types import BatchAxis, ShapeProfile
from mlflow_trt.errors import OutOfMemoryError, SessionClosedError
from mlflow_trt.runtime.batching.choose_profile import choose_profile
from mlflow_trt.runtime.batching.host_copy import copies
from mlflow_trt.runtime.batching.microbatch import MicroBatcher, QueuedCall
from mlflow_trt.runtime.batching.readiness import Prepare, Readiness
from mlflow_trt.runtime.batching.shared_work import Work
from mlflow_trt.runtime.batching.sizes import (
    AnySize,
    BatchRows,
    FewSizes,
    OutputWithoutRowsError,
    Piece,
    Sizes,
    batch_size,
    check_rows,
    take,
)
from mlflow_trt.runtime.batching.slots import AnySlot, Slots
from mlflow_trt.runtime.batching.submissions import Done, PendingAnswer, Submission, SubmittedRequest, Threads

MOST_SLOTS = 2
"""One that the GPU works on and one that is filled meanwhile; a third gained nothing in measurements."""

_MOST_SHARED_BYTES = 4096
_LARGE_BYTES = 2 << 20
_MOST_PLANS = 1024
_log = get_logger(__name__)


class Scheduler(Generic[AnySlot]):
    """Runs feeds, which are checked already, in slots.

    Args:
        make_slot: makes one more slot; called when it is needed.
        profiles: what the engine accepts. Empty: anything, as ONNX Runtime does.
        axis: the batch axis, if the model has one.
        largest: the largest batch to run at once where there are no profiles; None for no limit, and then calls are
            not put together either.
        max_batch_delay: seconds for which a batch of several callers stays open at most; 0 runs each call by itself.
        prepare: makes a batch size ready beside the calls, which are run in sizes that are; None: all of them are.
    """

    def __init__(
        self,
        make_slot: Callable[[], AnySlot],
        *,
        profiles: Sequence[ShapeProfile],
        axis: BatchAxis | None,
        largest: int | None = None,
        max_batch_delay: float = 0.0,
        prepare: Prepare | None = None,
    ) -> None:
        self.slots: Slots[AnySlot] = Slots(make_slot, MOST_SLOTS)
        self._profiles = tuple(profiles)
        self._axis = axis if axis is not None and axis.splits else None
        self._declared_axis = axis
        self._sizes = [self._sizes_for(profile) for profile in self._profiles]
        if not self._profiles:
            self._sizes = [AnySize(largest) if largest and self._axis else None]
        self._batcher = MicroBatcher(
            self.slots, self._axis, self._run_alone, self._shrink_batches, self._count, max_batch_delay
        )
        self._batches = max_batch_delay > 0
        self._threads = Threads(MOST_SLOTS)
        self._plans: dict[Hashable, _Plan] = {}
        self._generation = 0  # of plans
        self._readiness = Readiness(prepare, self._axis, self._forget_plans) if prepare and self._axis else None
        self._values_matter = any(limits.is_values for profile in profiles for limits in profile.ranges.values())
        self._without_rows: OutputWithoutRowsError | None = None
        self._runs: collections.Counter[int] = collections.Counter()
        self._calls = 0
        self._counting = threading.Lock()

    @property
    def runs(self) -> dict[int, int]:
        """How often each batch size was run so far; 0 stands for runs without a batch axis."""
        with self._counting:
            return dict(sorted(self._runs.items()))

    def run(self, feeds: Feeds) -> Outputs:
        """New arrays. Raises InputShapeError where no profile accepts the feeds, and what the runtime raises."""
        plan = self._plan(feeds)
        if plan.sizes is None:
            return self._run_whole(feeds, plan.profile)
        with self._counting:
            self._calls += 1
            alone = self._calls == 1
        try:
            return self._run_rows(feeds, plan, alone=alone)
        except OutputWithoutRowsError as error:
            return self._run_without_rows(feeds, plan, error)
        finally:
            self._end(plan)

    def submit(self, feeds: Feeds, done: Done) -> Submission:
        """Run feeds without letting the caller wait; `done` is told what came of it.

        Raises InputShapeError where no profile accepts the feeds, SessionClosedError after `close`.
        """
        plan, answer = self._plan(feeds), PendingAnswer(done)
        self._threads.check_open()
        with self._counting:
            self._calls += 1
            alone = self._calls == 1
        try:
            if plan.sizes is None or self._runs_in_pieces(plan, alone=alone):
                self._threads.do(lambda: self._answer(answer, plan, lambda: self._run_by_itself(feeds, plan)))
            else:
                self._submit_together(feeds, plan, plan.sizes, answer)
        except BaseException:
            self._end(plan)
            raise
        return answer

    def _submit_together(self, feeds: Feeds, plan: _Plan, sizes: Sizes, answer: PendingAnswer) -> None:
        def result(request: SubmittedRequest) -> Outputs:
            try:
                return self._batcher.result(request)
            except OutputWithoutRowsError as error:
                return self._run_without_rows(feeds, plan, error)

        def end(request: SubmittedRequest) -> None:
            if request.outputs is not None or request.error is not None or not answer.is_wanted:
                self._answer(answer, plan, lambda: result(request))
                return
            try:
                self._threads.do(lambda: self._answer(answer, plan, lambda: result(request)))
            except SessionClosedError as error:
                self._end(plan)
                answer.give(None, error)

        request = SubmittedRequest(feeds, plan.rows, plan.profile, sizes, self._key(feeds, plan), answer, end)
        batch = self._batcher.join(request)
        if batch.leader is request:
            try:
                self._threads.do(lambda: self._batcher.lead(batch))
            except (SessionClosedError, RuntimeError):
                # No thread to be had, or closed meanwhile. Others may have joined, and want to be told.
                self._batcher.lead(batch)

    def _answer(self, answer: PendingAnswer, plan: _Plan, result: Callable[[], Outputs]) -> None:
        """Tell what came of a submission, and count it off before, since who is told may send the next one."""
        outputs, failure = None, None
        try:
            if answer.is_wanted:
                outputs = result()
        except Exception as error:  # noqa: BLE001  # told to whoever submitted it
            failure = error
        self._end(plan)
        answer.give(outputs, failure)

    def _end(self, plan: _Plan) -> None:
        """A call has come to its end."""
        with self._counting:
            calls = self._calls
            self._calls -= 1
        if self._readiness is not None:
            self._readiness.ran(plan.key, plan.rows * calls if plan.together else plan.rows)

    def _run_by_itself(self, feeds: Feeds, plan: _Plan) -> Outputs:
        if plan.sizes is None:
            return self._run_whole(feeds, plan.profile)
        try:
            return self._run_in_pieces(feeds, plan.rows, plan.profile)
        except OutputWithoutRowsError as error:
            return self._run_without_rows(feeds, plan, error)

    def _run_without_rows(self, feeds: Feeds, plan: _Plan, error: OutputWithoutRowsError) -> Outputs:
        """Whole, now that the outputs are known to have no rows. Raises the error where the engine cannot do that."""
        self._without_rows = error
        self._forget_plans()
        if not plan.fits:
            raise error
        return self._run_whole(feeds, plan.profile)

    def work(self, feeds: Feeds) -> Work | None:
        """A batch that takes several runs, for several schedulers to take part in; None for any other feeds."""
        plan = self._plan(feeds)
        if plan.sizes is None or plan.rows <= plan.sizes.largest:
            return None
        return Work(feeds, plan.rows, plan.profile)

    def take_part(self, work: Work) -> None:
        """Run pieces until none is left; where the GPU has no room for one, smaller ones from there on.

        Raises what the runtime raises, after giving back what was not finished.
        """
        sizes, failure = self._sizes[work.profile], ""
        assert sizes is not None  # noqa: S101  # for the type checker
        while True:
            try:
                self._pipeline(work, sizes)
            except OutOfMemoryError as error:
                smaller = sizes.smaller()
                if smaller is None:
                    raise
                sizes, failure = smaller, error.message
                self.slots.trim()
            else:
                if failure:
                    self._limit(work.profile, sizes.largest, failure)
                return

    def _limit(self, profile: int, largest: int, cause: str) -> None:
        """Run no more rows at once from now on, if there is a size that small."""
        with self._counting:
            sizes = self._sizes[profile]
            while sizes is not None and sizes.largest > largest:
                sizes = sizes.smaller()
            if sizes is None or sizes is self._sizes[profile]:
                return
            self._sizes[profile] = sizes
        self._forget_plans()
        _log.warning("Running at most %d rows at once from now on: %s", sizes.largest, cause)

    def _shrink_batches(self, request: QueuedCall, cause: str) -> None:
        """For a batch of several requests: the next one is to be smaller."""
        self._limit(request.profile, request.sizes.largest - 1, cause)
        self.slots.trim()

    def sizes_of(self, profile: int) -> Sizes | None:
        """The batch sizes that a profile is run in; None where its batches are not cut."""
        return self._sizes[profile] if self._axis is not None else None

    def close(self) -> None:
        """Refuse new calls, and wait for those that run."""
        self._threads.refuse()
        try:
            self.slots.close()
        finally:
            self._threads.close()
            if self._readiness is not None:
                self._readiness.stop()

    def mark_ready(self, feeds: Feeds, profile: int, size: int | None) -> None:
        """Feeds of so many rows were run in every slot."""
        sizes = self._sizes[profile]
        if self._readiness is not None and sizes is not None and size:
            self._readiness.mark(self._family(profile, feeds), profile, sizes, size, feeds)

    def _forget_plans(self) -> None:
        with self._counting:
            self._generation += 1
            self._plans.clear()

    def _sizes_for(self, profile: ShapeProfile) -> Sizes | None:
        limits = profile.ranges.get(self._axis.inputs[0]) if self._axis else None
        return FewSizes(limits.min[0], limits.opt[0], limits.max[0]) if limits else None

    def _plan(self, feeds: Feeds) -> _Plan:
        """What to do with feeds of these shapes; kept, since it is the same for nearly every call."""
        shapes = tuple([array.shape for array in feeds.values()])
        plan = self._plans.get(shapes)
        if plan is None:
            generation = self._generation
            plan = self._new_plan(feeds)
            if not self._values_matter:
                with self._counting:
                    if len(self._plans) >= _MOST_PLANS:
                        self._plans.clear()
                    if generation == self._generation:
                        self._plans[shapes] = plan
        return plan

    def _new_plan(self, feeds: Feeds) -> _Plan:
        profile, fits = 0, True
        if self._profiles:
            choice = choose_profile(self._profiles, feeds, self._declared_axis)
            profile, fits = choice.profile, choice.rows is None
        axis, sizes = self._axis, self._sizes[profile]
        if self._without_rows is not None and not fits:
            raise self._without_rows
        if axis is None or sizes is None or self._without_rows is not None:
            return _Plan(profile, fits)
        first, *others = axis.inputs
        if fits and any(len(feeds[name]) != len(feeds[first]) for name in others):
            return _Plan(profile, fits)
        rows = batch_size(feeds, axis)
        sizes = self._usable(sizes, profile, rows, feeds)
        shared = tuple(name for name in feeds if name not in axis.inputs)
        together = (
            self._batches
            and rows > 0
            and len(sizes.cut(rows)) == 1
            and sum(feeds[name].nbytes for name in shared) <= _MOST_SHARED_BYTES
        )
        key = self._family(profile, feeds)
        large = sum(array.nbytes for array in feeds.values()) > _LARGE_BYTES
        return _Plan(profile, fits, rows, sizes, key, together, shared, large)

    def _family(self, profile: int, feeds: Feeds) -> Hashable:
        """What calls have in common whose rows can be run together, but for the values of shared inputs."""
        batched = self._axis.inputs if self._axis else ()
        return (profile, *(array.shape[name in batched :] for name, array in feeds.items()))

    def _usable(self, sizes: Sizes, profile: int, rows: int, feeds: Feeds) -> Sizes:
        """Of these sizes those that need not be made ready first."""
        if self._readiness is None or rows == 0:
            return sizes
        axis = cast("BatchAxis", self._axis)
        is_usual = not self._profiles or all(
            array.shape[name in axis.inputs :] == limits.opt[name in axis.inputs :]
            for name, array in feeds.items()
            if (limits := self._profiles[profile].ranges.get(name)) is not None and not limits.is_values
        )
        return self._readiness.usable(self._family(profile, feeds), profile, rows, sizes, feeds, is_usual=is_usual)

    def _run_rows(self, feeds: Feeds, plan: _Plan, *, alone: bool) -> Outputs:
        if plan.sizes is None or self._runs_in_pieces(plan, alone=alone):
            return self._run_in_pieces(feeds, plan.rows, plan.profile)
        if alone and self._batcher.expects_nobody:
            outputs = self._run_at_once(feeds, plan, plan.sizes)
            if outputs is not None:
                return outputs
        return self._batcher.run(QueuedCall(feeds, plan.rows, plan.profile, plan.sizes, self._key(feeds, plan)))

    def _run_at_once(self, feeds: Feeds, plan: _Plan, sizes: Sizes) -> Outputs | None:
        """What the batcher would do for a caller that is alone, in half the time; None where it has to."""
        slot = self.slots.acquire_now()
        if slot is None:
            return None
        size = sizes.hold(plan.rows)
        try:
            slot.launch(BatchRows([feeds], self._axis, size), plan.profile)
            outputs = slot.finish()
            check_rows(outputs, size)
            results = dict(zip(outputs, copies([output[: plan.rows] for output in outputs.values()]), strict=True))
        except OutOfMemoryError:
            slot.abandon()
            return None  # there may be room for smaller pieces
        except BaseException:
            slot.abandon()
            raise
        finally:
            self.slots.release(slot)
        self._count(size)
        return results

    def _runs_in_pieces(self, plan: _Plan, *, alone: bool) -> bool:
        # A large batch with nobody to share the GPU with is better copied and uploaded at the same time.
        return not plan.together or (alone and plan.large)

    def _key(self, feeds: Feeds, plan: _Plan) -> Hashable:
        """What the requests of a batch have in common."""
        if not plan.shared:
            return plan.key
        return (plan.key, *(feeds[name].tobytes() for name in plan.shared))

    def _run_alone(self, request: QueuedCall) -> Outputs:
        return self._run_in_pieces(request.feeds, request.rows, request.profile)

    def _run_whole(self, feeds: Feeds, profile: int) -> Outputs:
        with self.slots.borrow() as slot:
            slot.launch(BatchRows([feeds], None, 0), profile)
            outputs = slot.finish()
            results = dict(zip(outputs, copies(list(outputs.values())), strict=True))
        self._count(0)
        return results

    def _run_in_pieces(self, feeds: Feeds, rows: int, profile: int) -> Outputs:
        work = Work(feeds, rows, profile)
        self.take_part(work)
        return work.outputs

    def _pipeline(self, work: Work, sizes: Sizes) -> None:
        """Fill one slot while another one runs."""
        axis = self._axis
        assert axis is not None  # noqa: S101  # for the type checker
        running: collections.deque[tuple[AnySlot, Piece]] = collections.deque()

        def finish_oldest() -> None:
            slot, piece = running[0]
            work.add(piece, slot.finish())
            running.popleft()
            self.slots.release(slot)
            self._count(piece.size)

        try:
            while work.is_left:
                slot = self.slots.acquire_now()
                while slot is None:
                    # Never wait for a slot while holding one: two such callers would wait for each other.
                    if running:
                        finish_oldest()
                        slot = self.slots.acquire_now()
                    else:
                        slot = self.slots.acquire()
                piece = work.take(self._usable(sizes, work.profile, work.rows, work.feeds))
                if piece is None:  # another GPU was faster
                    self.slots.release(slot)
                    break
                running.append((slot, piece))
                slot.launch(
                    BatchRows([take(work.feeds, axis, piece.start, piece.stop)], axis, piece.size), work.profile
                )
            while running:
                finish_oldest()
        except BaseException:
            for slot, piece in reversed(running):
                slot.abandon()
                work.give_back(piece)
            raise
        finally:
            for slot, _ in running:
                self.slots.release(slot)

    def _count(self, size: int) -> None:
        with self._counting:
            self._runs[size] += 1


class _Plan(NamedTuple):
    """What to do with feeds of some shapes.

    Without `sizes` they run as they are, alone. `together`: with others of the same `key` and the same values of the
    `shared` inputs, which have no rows.
    """

    profile: int
    fits: bool
    rows: int = 0
    sizes: Sizes | None = None
    key: Hashable = None
    together: bool = False
    shared: tuple[str, ...] = ()
    large: bool = False
