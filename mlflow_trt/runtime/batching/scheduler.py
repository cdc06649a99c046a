"""From a call to runs: which profile, which batch sizes, alone or together with others, one slot or several at once."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic

from mlflow_trt.core.arrays import Feeds, Outputs
from mlflow_trt.core.types import BatchAxis, ShapeProfile
from mlflow_trt.errors import OutOfMemoryError, SessionClosedError
from mlflow_trt.runtime.batching.host_copy import copies
from mlflow_trt.runtime.batching.microbatch import MicroBatcher, Request
from mlflow_trt.runtime.batching.native_batches import BatchFailedError, NativeBatches
from mlflow_trt.runtime.batching.own_threads import Threads
from mlflow_trt.runtime.batching.pieces import run_pieces
from mlflow_trt.runtime.batching.plans import Plan, Plans
from mlflow_trt.runtime.batching.readiness import Prepare
from mlflow_trt.runtime.batching.shared_work import Work
from mlflow_trt.runtime.batching.sizes import BatchRows, OutputWithoutRowsError, Sizes, check_rows
from mlflow_trt.runtime.batching.slots import AnySlot, Slots
from mlflow_trt.runtime.batching.submissions import Done, PendingAnswer, Submission, SubmittedRequest

MOST_SLOTS = 2
"""One that the GPU works on and one that is filled meanwhile; a third gained nothing in measurements."""


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
        native: makes the batcher in C for these slots, where there is one.
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
        native: Callable[[Slots[AnySlot], BatchAxis], NativeBatches[Any] | None] | None = None,
    ) -> None:
        self.slots: Slots[AnySlot] = Slots(make_slot, MOST_SLOTS)
        if prepare is not None:
            prepare = partial(self._prepare_here, prepare)
        self._plans = Plans(profiles, axis, largest=largest, puts_together=max_batch_delay > 0, prepare=prepare)
        self._axis, self._readiness = self._plans.axis, self._plans.readiness
        self._batcher = MicroBatcher(
            self.slots, self._axis, self._run_alone, self._shrink_batches, self._count, max_batch_delay
        )
        self._native = native(self.slots, self._axis) if native and self._axis and max_batch_delay > 0 else None
        self._threads = Threads(MOST_SLOTS)
        self._runs: collections.Counter[int] = collections.Counter()
        self._calls = 0
        self._counting = threading.Lock()

    @property
    def runs(self) -> dict[int, int]:
        """How often each batch size was run so far; 0 stands for runs without a batch axis."""
        with self._counting:
            runs = self._runs.copy()
        for size, count in self._native.runs if self._native is not None else ():
            if count:
                runs[size] += count
        return dict(sorted(runs.items()))

    def run(self, feeds: Feeds) -> Outputs:
        """New arrays. Raises InputShapeError where no profile accepts the feeds, and what the runtime raises."""
        plan = self._plans.plan(feeds)
        if plan.sizes is None:
            return self._run_whole(feeds, plan.profile)
        alone = self._begin()
        try:
            return self._with_rows(feeds, plan, lambda: self._run_rows(feeds, plan, alone=alone))
        finally:
            self._end(plan)

    def submit(self, feeds: Feeds, done: Done) -> Submission:
        """Run feeds and tell `done` what came of it. The caller waits only where the system has no thread to give.

        Raises InputShapeError where no profile accepts the feeds, SessionClosedError after `close`.
        """
        plan, answer = self._plans.plan(feeds), PendingAnswer(done)
        self._threads.check_open()
        self.slots.keep_here()
        alone = self._begin()
        try:
            if plan.sizes is None or self._runs_in_pieces(plan, alone=alone):
                self._threads.do(lambda: self._answer(answer, plan, lambda: self._run_by_itself(feeds, plan)))
            else:
                self._submit_together(feeds, plan, plan.sizes, answer)
        except BaseException:
            self._end_submission(plan)
            raise
        return answer

    def work(self, feeds: Feeds) -> Work | None:
        """A batch that takes several runs, for several schedulers to take part in; None for any other feeds."""
        plan = self._plans.plan(feeds)
        if plan.sizes is None or plan.rows <= plan.sizes.largest:
            return None
        return Work(feeds, plan.rows, plan.profile)

    def take_part(self, work: Work) -> None:
        """Run pieces until none is left; where the GPU has no room for one, smaller ones from there on.

        Raises what the runtime raises, after giving back what was not finished.
        """
        with self.slots.kept_here():
            self._take_part(work)

    def sizes_of(self, profile: int) -> Sizes | None:
        """The batch sizes that a profile is run in; None where its batches are not cut."""
        return self._plans.sizes_of(profile)

    def mark_ready(self, feeds: Feeds, profile: int, size: int | None) -> None:
        """Feeds of so many rows were run in every slot."""
        self._plans.mark_ready(feeds, profile, size)

    def prepare_native(self, feeds: Feeds, slots: Sequence[AnySlot]) -> None:
        """Make calls of such rows ready to go around Python, where they can, in these slots, which the caller holds."""
        plan = self._plans.plan(feeds)
        if self._native is not None and self._native.takes(plan):
            self._native.prepare(plan, feeds, slots)

    def close(self) -> None:
        """Refuse new calls, and wait for those that run."""
        self._threads.refuse()
        try:
            self.slots.close()
        finally:
            self._threads.close()
            if self._native is not None:
                self._native.close()
            if self._readiness is not None:
                self._readiness.close()

    def _begin(self) -> bool:
        """A call has come. Whether it is the only one."""
        with self._counting:
            self._calls += 1
            return self._calls == 1

    def _end(self, plan: Plan) -> None:
        """A call has come to its end."""
        with self._counting:
            calls = self._calls
            self._calls -= 1
        if self._readiness is not None:
            self._readiness.ran(plan.key, plan.rows * calls if plan.together else plan.rows)

    def _submit_together(self, feeds: Feeds, plan: Plan, sizes: Sizes, answer: PendingAnswer) -> None:
        def result(request: SubmittedRequest) -> Outputs:
            return self._with_rows(feeds, plan, lambda: self._batcher.result(request))

        def end(request: SubmittedRequest) -> None:
            answer.begun = request.begun
            if request.outputs is not None or request.error is not None or not answer.is_wanted:
                self._answer(answer, plan, lambda: result(request))
                return
            try:
                self._threads.do(lambda: self._answer(answer, plan, lambda: result(request)))
            except SessionClosedError as error:
                self._end_submission(plan)
                answer.give(None, error)

        request = SubmittedRequest(feeds, plan.rows, plan.profile, sizes, plan.key_of(feeds), answer, end)
        batch = self._batcher.join(request)
        if batch.leader is request:
            try:
                self._threads.do(lambda: self._batcher.lead(batch))
            except SessionClosedError:
                self._batcher.lead(batch)  # others may have joined, and want to be told

    def _answer(self, answer: PendingAnswer, plan: Plan, result: Callable[[], Outputs]) -> None:
        """Tell what came of a submission, and count it off before, since who is told may send the next one."""
        outputs, failure = None, None
        if answer.begun is None:
            answer.begun = time.monotonic()
        try:
            if answer.is_wanted:
                outputs = result()
        except Exception as error:  # noqa: BLE001  # told to whoever submitted it
            failure = error
        self._end_submission(plan)
        answer.give(outputs, failure)

    def _end_submission(self, plan: Plan) -> None:
        self.slots.let_go()
        self._end(plan)

    def _run_by_itself(self, feeds: Feeds, plan: Plan) -> Outputs:
        if plan.sizes is None:
            return self._run_whole(feeds, plan.profile)
        return self._with_rows(feeds, plan, lambda: self._run_in_pieces(feeds, plan.rows, plan.profile))

    def _with_rows(self, feeds: Feeds, plan: Plan, run: Callable[[], Outputs]) -> Outputs:
        """What `run` returns; whole, where that shows that the outputs have no rows, and the engine can do it."""
        try:
            return run()
        except OutputWithoutRowsError as error:
            self._plans.run_without_rows(error)
            if not plan.fits:
                raise
        return self._run_whole(feeds, plan.profile)

    def _run_rows(self, feeds: Feeds, plan: Plan, *, alone: bool) -> Outputs:
        outputs = self._run_natively(feeds, plan)
        if outputs is not None:
            return outputs
        if plan.sizes is None or self._runs_in_pieces(plan, alone=alone):
            return self._run_in_pieces(feeds, plan.rows, plan.profile)
        if alone and self._batcher.expects_nobody:
            outputs = self._run_at_once(feeds, plan, plan.sizes)
            if outputs is not None:
                return outputs
        return self._batcher.run(Request(feeds, plan.rows, plan.profile, plan.sizes, plan.key_of(feeds)))

    def _runs_in_pieces(self, plan: Plan, *, alone: bool) -> bool:
        # A large batch with nobody to share the GPU with is better copied and uploaded at the same time.
        return not plan.together or (alone and plan.is_large)

    def _run_natively(self, feeds: Feeds, plan: Plan) -> Outputs | None:
        """What came of a call that went around Python; None for one that cannot."""
        native = self._native
        if native is None or not native.takes(plan):
            return None
        try:
            return native.run(plan, feeds)
        except BatchFailedError as failure:
            outputs = self._run_in_pieces(feeds, plan.rows, plan.profile)
            if failure.no_room and plan.sizes is not None:  # while there was some for one request: it was the size
                self._limit_batches(plan.profile, plan.sizes, "the GPU is out of memory")
            return outputs

    def _run_at_once(self, feeds: Feeds, plan: Plan, sizes: Sizes) -> Outputs | None:
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

    def _run_whole(self, feeds: Feeds, profile: int) -> Outputs:
        with self.slots.kept_here(), self.slots.borrow() as slot:
            slot.launch(BatchRows([feeds], None, 0), profile)
            outputs = slot.finish()
            results = dict(zip(outputs, copies(list(outputs.values())), strict=True))
        self._count(0)
        return results

    def _run_alone(self, request: Request) -> Outputs:
        return self._run_in_pieces(request.feeds, request.rows, request.profile)

    def _run_in_pieces(self, feeds: Feeds, rows: int, profile: int) -> Outputs:
        work = Work(feeds, rows, profile)
        self.take_part(work)
        return work.outputs

    def _take_part(self, work: Work) -> None:
        sizes, failure = self._plans.sizes_of(work.profile), ""
        assert sizes is not None  # noqa: S101  # for the type checker
        while True:
            try:
                self._run_pieces(work, sizes)
            except OutOfMemoryError as error:
                smaller = sizes.smaller()
                if smaller is None:
                    raise
                sizes, failure = smaller, error.message
                self.slots.trim()
            else:
                if failure:
                    self._plans.limit(work.profile, sizes.largest, failure)
                return

    def _run_pieces(self, work: Work, sizes: Sizes) -> None:
        assert self._axis is not None  # noqa: S101  # for the type checker
        run_pieces(
            work,
            self.slots,
            self._axis,
            lambda: self._plans.usable(sizes, work.profile, work.rows, work.feeds),
            self._count,
        )

    def _prepare_here(self, prepare: Prepare, profile: int, feeds: Feeds) -> None:
        # In a slot of its own, which knows nothing of runs that Python knows nothing of.
        with self.slots.kept_here():
            prepare(profile, feeds)

    def _shrink_batches(self, request: Request, cause: str) -> None:
        """For a batch of several requests: the next one is to be smaller."""
        self._limit_batches(request.profile, request.sizes, cause)

    def _limit_batches(self, profile: int, sizes: Sizes, cause: str) -> None:
        self._plans.limit(profile, sizes.largest - 1, cause)
        self.slots.trim()

    def _count(self, size: int) -> None:
        with self._counting:
            self._runs[size] += 1
