"""Calls of many threads, put together and kept apart: on a slot that shows what runs, and on the CPU runtime."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time

import networks
import numpy as np
import pytest
from helpers import PATIENCE, no_threads, read, reference, wait_for

from mlflow_trt import ExecutionError, InputError, OutOfMemoryError, SessionClosedError
from mlflow_trt.core.types import BatchAxis, InputRange, ShapeProfile
from mlflow_trt.runtime.batching.scheduler import MOST_SLOTS, Scheduler
from mlflow_trt.runtime.batching.slots import Slots
from mlflow_trt.runtime.onnxruntime_session import OnnxRuntimeSession

AXIS = BatchAxis(inputs=("x",), splits=True, declared=True)
PROFILE = ShapeProfile(ranges={"x": InputRange(min=(1, 2), opt=(4, 2), max=(16, 2))})


class Gate:
    """What the slots of a test share: how they behave, and what they did."""

    def __init__(self):
        self.open = threading.Event()
        self.open.set()
        self.started = threading.Semaphore(0)
        self.sizes = []
        self.bad = None
        self.most_rows = 10**9
        self.closed = 0
        self.trimmed = 0


class DoublingSlot:
    """y = 2 x, once the gate is open. Fails on a batch with the bad value, and on too many rows."""

    def __init__(self, gate):
        self.gate = gate

    def launch(self, rows, profile):
        if rows.size > self.gate.most_rows:
            raise OutOfMemoryError("no room")
        self.x = np.empty(rows.shapes["x"], rows.parts[0]["x"].dtype)
        for part, start, stop in rows.copies("x"):
            self.x[start:stop] = part
        self.gate.started.release()

    def finish(self):
        assert self.gate.open.wait(PATIENCE)
        if self.gate.bad is not None and (self.x == self.gate.bad).any():
            raise ExecutionError("bad value")
        self.gate.sizes.append(len(self.x))
        return {"y": self.x * 2}

    def abandon(self):
        self.x = np.empty(0)

    def trim(self):
        self.gate.trimmed += 1

    def close(self):
        self.gate.closed += 1


HOURS = 3600.0


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def scheduler(gate):
    scheduler = Scheduler(lambda: DoublingSlot(gate), profiles=[PROFILE], axis=AXIS, max_batch_delay=5.0)
    yield scheduler
    gate.open.set()
    scheduler.close()
    assert gate.closed <= MOST_SLOTS


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor(80) as pool:
        yield pool


def rows(*values):
    return {"x": np.array(values, np.float32).repeat(2).reshape(-1, 2)}


def send(pool, scheduler, values):
    """One call for each value, in this order: the calls that run are counted to be sure."""
    futures = []
    for value in values:
        before = seated(scheduler)
        futures.append(pool.submit(scheduler.run, rows(value)))
        wait_for(lambda before=before: seated(scheduler) != before)
    return futures


def seated(scheduler):
    """The rows of the batches that are being filled."""
    return [batch.rows for batch in scheduler._batcher._open.values()]


def occupied(pool, scheduler, gate):
    """Calls that keep every slot busy until the gate opens."""
    gate.open.clear()
    futures = []
    for _ in range(MOST_SLOTS):
        futures.append(pool.submit(scheduler.run, {"x": np.full((1, 2), 100.0, np.float32)}))
        assert gate.started.acquire(timeout=PATIENCE)
    return futures


def test_calls_that_wait_run_together_and_each_gets_its_rows(pool, scheduler, gate):
    first = occupied(pool, scheduler, gate)
    others = send(pool, scheduler, range(10))
    gate.open.set()
    assert [future.result()["y"].tolist() for future in first] == [[[200, 200]]] * MOST_SLOTS
    for value, future in enumerate(others):
        assert future.result()["y"].tolist() == [[2 * value, 2 * value]]
    assert sorted(gate.sizes) == [1, 1, 16]
    assert scheduler.runs == {1: 2, 16: 1}


def test_a_batch_holds_no_more_than_the_largest_size(pool, scheduler, gate):
    first = occupied(pool, scheduler, gate)
    others = send(pool, scheduler, range(20))
    gate.open.set()
    concurrent.futures.wait(first)
    assert [future.result()["y"][0, 0] for future in others] == [2 * value for value in range(20)]
    assert sorted(gate.sizes) == [1, 1, 4, 16]


def test_a_call_that_is_alone_does_not_wait(gate):
    scheduler = Scheduler(lambda: DoublingSlot(gate), profiles=[PROFILE], axis=AXIS, max_batch_delay=HOURS)
    for value in range(20):
        assert scheduler.run(rows(value))["y"][0, 0] == 2 * value
    scheduler.close()


def test_a_call_that_is_alone_goes_around_the_batcher_unless_others_usually_come(scheduler, gate, monkeypatch):
    joined, join = [], scheduler._batcher.join
    monkeypatch.setattr(scheduler._batcher, "join", lambda request: joined.append(request) or join(request))
    for values in ([1], [2, 3, 4]):
        assert np.array_equal(scheduler.run(rows(*values))["y"], rows(*values)["x"] * 2)
    assert not joined
    assert scheduler.runs == {1: 1, 4: 1}
    scheduler._batcher._usual_callers = 8.0
    scheduler._batcher._seconds = scheduler._batcher._batch_seconds = 0.001
    for value in range(20):
        assert scheduler.run(rows(value))["y"][0, 0] == 2 * value
    assert 5 < len(joined) < 15


def test_the_delay_ends(pool, gate):
    scheduler = Scheduler(lambda: DoublingSlot(gate), profiles=[PROFILE], axis=AXIS, max_batch_delay=0.01)
    gate.open.clear()
    scheduler._batcher._usual_callers = 50.0  # of whom none comes
    for value in range(MOST_SLOTS):
        pool.submit(scheduler.run, rows(value))
        assert gate.started.acquire(timeout=PATIENCE)
    gate.open.set()
    scheduler.close()


@pytest.mark.parametrize(("interval", "seconds", "waits"), [(0.01, 0.8, True), (2 * HOURS, HOURS, False)])
def test_a_batch_waits_only_for_callers_who_come_often(interval, seconds, waits, gate):
    """Where it does not, it would wait for a quarter of an hour and more."""
    scheduler = Scheduler(lambda: DoublingSlot(gate), profiles=[PROFILE], axis=AXIS, max_batch_delay=HOURS)
    batcher = scheduler._batcher
    batcher._usual_callers = 50.0
    batcher._seconds = batcher._batch_seconds = seconds  # of which it waits a quarter
    started = time.monotonic()
    batcher._interval, batcher._joined = interval, started
    scheduler.run(rows(1))
    assert not waits or time.monotonic() - started > seconds / 5
    scheduler.close()


def test_shapes_that_differ_are_kept_apart(pool, gate):
    wide = ShapeProfile(ranges={"x": InputRange(min=(1, 1), opt=(4, 2), max=(16, 8))})
    scheduler = Scheduler(lambda: DoublingSlot(gate), profiles=[wide], axis=AXIS, max_batch_delay=5.0)
    first = occupied(pool, scheduler, gate)
    batches = [np.full((1, 1 + n % 3), n, np.float32) for n in range(9)]
    futures = [pool.submit(scheduler.run, {"x": batch}) for batch in batches]
    wait_for(lambda: sum(seated(scheduler)) == 9)
    gate.open.set()
    for batch, future in zip(batches, futures, strict=True):
        assert np.array_equal(future.result()["y"], batch * 2)
    concurrent.futures.wait(first)
    assert sorted(gate.sizes) == [1, 1, 4, 4, 4]
    scheduler.close()


def test_one_bad_call_harms_nobody_else(pool, scheduler, gate):
    gate.bad = 3.0
    occupied(pool, scheduler, gate)
    futures = send(pool, scheduler, range(6))
    gate.open.set()
    for value, future in enumerate(futures):
        if value == 3:
            with pytest.raises(ExecutionError, match="bad value"):
                future.result()
        else:
            assert future.result()["y"].tolist() == [[2 * value, 2 * value]]
    gate.bad = None
    assert scheduler.run(rows(3.0))["y"][0, 0] == 6


def test_too_little_memory_makes_smaller_batches(scheduler, gate, messages):
    gate.most_rows = 4
    x = rows(*range(30))
    assert np.array_equal(scheduler.run(x)["y"], x["x"] * 2)
    assert max(gate.sizes) == 4
    assert "at most 4 rows at once from now on" in messages.text
    assert gate.trimmed >= 2
    gate.most_rows = 0
    with pytest.raises(OutOfMemoryError, match="no room"):
        scheduler.run(x)
    gate.most_rows = 4
    gate.sizes.clear()
    assert np.array_equal(scheduler.run(x)["y"], x["x"] * 2)
    assert max(gate.sizes) == 4


def test_too_little_memory_for_any_size_leaves_the_sizes_as_they_are(scheduler, gate):
    x = rows(*range(16))
    gate.most_rows = 0
    with pytest.raises(OutOfMemoryError, match="no room"):
        scheduler.run(x)
    gate.most_rows = 16
    assert np.array_equal(scheduler.run(x)["y"], x["x"] * 2)
    assert gate.sizes == [16]


def test_too_little_memory_for_a_small_call_makes_pieces_of_it(scheduler, gate, messages):
    gate.most_rows = 4
    x = rows(*range(10))
    assert np.array_equal(scheduler.run(x)["y"], x["x"] * 2)
    assert gate.sizes == [4, 4, 2]
    assert "at most 4 rows at once from now on" in messages.text


def test_too_little_memory_for_calls_together_too(pool, scheduler, gate, messages):
    gate.most_rows = 2
    occupied(pool, scheduler, gate)
    futures = send(pool, scheduler, range(8))
    gate.open.set()
    assert [future.result()["y"][0, 0] for future in futures] == [2 * value for value in range(8)]
    assert "at most 8 rows at once from now on" in messages.text


def test_too_little_memory_for_anybody_teaches_no_sizes(pool, scheduler, gate):
    gate.most_rows = 0
    occupied_by = [pool.submit(scheduler.run, rows(*range(n))) for n in range(1, 9)]
    assert all(isinstance(future.exception(timeout=PATIENCE), OutOfMemoryError) for future in occupied_by)
    gate.most_rows = 16
    scheduler.run(rows(*range(16)))
    assert gate.sizes == [16]


def test_an_interrupted_leader_leaves_nobody_waiting(pool, scheduler, gate, monkeypatch):
    first = occupied(pool, scheduler, gate)
    leader, *others = send(pool, scheduler, range(3))
    launch = DoublingSlot.launch

    def interrupted(slot, rows, profile):
        monkeypatch.setattr(DoublingSlot, "launch", launch)
        raise KeyboardInterrupt

    monkeypatch.setattr(DoublingSlot, "launch", interrupted)
    gate.open.set()
    assert isinstance(leader.exception(timeout=PATIENCE), KeyboardInterrupt)
    assert [future.result(timeout=PATIENCE)["y"][0, 0] for future in others] == [2, 4]
    concurrent.futures.wait(first)
    assert scheduler.run(rows(5))["y"][0, 0] == 10


def test_close_waits_for_what_runs_and_refuses_what_waits(pool, scheduler, gate):
    gate.open.clear()
    running = [pool.submit(scheduler.run, rows(float(n))) for n in range(MOST_SLOTS)]
    batch = {"x": np.ones((40, 2), np.float32)}
    assert gate.started.acquire(timeout=PATIENCE)
    waiting = [pool.submit(scheduler.run, batch) for _ in range(3)]
    wait_for(lambda: len(scheduler.slots._line) >= 1)
    closing = pool.submit(scheduler.close)
    wait_for(lambda: scheduler.slots._closed)
    assert not closing.done()
    gate.open.set()
    closing.result(timeout=PATIENCE)
    for future in waiting:
        with contextlib.suppress(SessionClosedError):
            assert np.array_equal(future.result(timeout=PATIENCE)["y"], batch["x"] * 2)
    assert any(future.exception(timeout=PATIENCE) is None for future in running)
    with pytest.raises(SessionClosedError):
        scheduler.run(rows(1.0))


class Told:
    """What `done` of a number of submissions is told."""

    def __init__(self):
        self.outcomes = {}
        self._all = threading.Semaphore(0)

    def __call__(self, number):
        def done(outputs, error):
            assert number not in self.outcomes
            self.outcomes[number] = error if outputs is None else outputs["y"]
            self._all.release()

        return done

    def wait(self, count):
        for _ in range(count):
            assert self._all.acquire(timeout=PATIENCE)
        return self.outcomes


class TestSubmit:
    def test_requests_run_together_with_those_of_threads_that_wait(self, pool, scheduler, gate):
        first, told = occupied(pool, scheduler, gate), Told()
        for value in range(6):
            scheduler.submit(rows(value), told(value))
        waiting = send(pool, scheduler, [6, 7])
        gate.open.set()
        outcomes = told.wait(6)
        assert all(np.array_equal(outcomes[value], rows(value)["x"] * 2) for value in range(6))
        assert all(
            np.array_equal(future.result(PATIENCE)["y"], rows(6 + n)["x"] * 2) for n, future in enumerate(waiting)
        )
        assert all(future.exception(PATIENCE) is None for future in first)
        assert sorted(gate.sizes) == [1] * MOST_SLOTS + [8]

    def test_many_requests_need_few_threads(self, scheduler, gate):
        gate.open.clear()
        before, told = threading.active_count(), Told()
        for value in range(200):
            scheduler.submit(rows(value), told(value))
        assert threading.active_count() - before <= MOST_SLOTS
        gate.open.set()
        outcomes = told.wait(200)
        assert all(np.array_equal(outcomes[value], rows(value)["x"] * 2) for value in range(200))

    @pytest.mark.parametrize("count", [0, 3, 65])
    def test_any_number_of_rows(self, scheduler, count):
        told, values = Told(), list(range(count))
        scheduler.submit(rows(*values), told(0))
        assert np.array_equal(told.wait(1)[0], rows(*values)["x"] * 2)

    def test_one_bad_request_harms_nobody_else(self, pool, scheduler, gate):
        first, told = occupied(pool, scheduler, gate), Told()
        gate.bad = 3
        for value in range(1, 7):
            scheduler.submit(rows(value), told(value))
        gate.open.set()
        outcomes = told.wait(6)
        assert isinstance(outcomes.pop(3), ExecutionError)
        assert all(np.array_equal(outcome, rows(value)["x"] * 2) for value, outcome in outcomes.items())
        assert all(future.exception(PATIENCE) is None for future in first)

    def test_one_that_fails_alone_runs_once(self, scheduler, gate):
        gate.bad, told = 1, Told()
        scheduler.submit(rows(1), told(0))
        assert isinstance(told.wait(1)[0], ExecutionError)
        assert gate.started.acquire(timeout=PATIENCE)
        assert not gate.started.acquire(blocking=False)

    def test_too_little_memory_makes_smaller_batches(self, pool, scheduler, gate, messages):
        occupied(pool, scheduler, gate)
        gate.most_rows, told = 4, Told()
        for value in range(1, 9):
            scheduler.submit(rows(value), told(value))
        gate.open.set()
        outcomes = told.wait(8)
        assert all(np.array_equal(outcome, rows(value)["x"] * 2) for value, outcome in outcomes.items())
        assert "at most 8 rows" in messages.text

    def test_what_is_cancelled_does_not_run(self, pool, scheduler, gate):
        first, told = occupied(pool, scheduler, gate), Told()
        submissions = [scheduler.submit(rows(value), told(value)) for value in range(5)]
        assert [submissions[n].cancel() for n in (0, 2, 3, 4)] == [True] * 4
        assert not submissions[0].cancel()
        gate.open.set()
        assert [*told.wait(1)] == [1]
        assert all(future.exception(PATIENCE) is None for future in first)
        assert gate.sizes == [1] * (MOST_SLOTS + 1)
        assert not submissions[1].cancel()

    def test_an_error_of_who_is_told_is_logged_and_harms_nobody(self, pool, scheduler, gate, messages):
        def fail(_outputs, _error):
            raise ValueError("not my day")

        occupied(pool, scheduler, gate)
        told = Told()
        scheduler.submit(rows(1), fail)
        scheduler.submit(rows(2), told(2))
        gate.open.set()
        assert np.array_equal(told.wait(1)[2], rows(2)["x"] * 2)
        assert "not my day" in messages.text

    def test_who_is_told_may_submit_and_close(self, gate):
        scheduler = Scheduler(lambda: DoublingSlot(gate), profiles=[PROFILE], axis=AXIS, max_batch_delay=5.0)
        closed = threading.Event()

        def again(outputs, _error):
            scheduler.submit({"x": outputs["y"]}, close)

        def close(outputs, _error):
            assert outputs["y"][0, 0] == 12
            scheduler.close()
            closed.set()

        scheduler.submit(rows(3), again)
        assert closed.wait(PATIENCE)
        with pytest.raises(SessionClosedError):
            scheduler.submit(rows(1), again)

    def test_closing_tells_everybody(self, pool, scheduler, gate):
        first, told = occupied(pool, scheduler, gate), Told()
        for value in range(40):
            scheduler.submit(rows(value), told(value))
        closing = pool.submit(scheduler.close)
        wait_for(lambda: scheduler.slots._closed)
        gate.open.set()
        closing.result(PATIENCE)
        assert all(isinstance(outcome, SessionClosedError) for outcome in told.wait(40).values())
        assert all(future.exception(PATIENCE) is None for future in first)


class TestSubmitWithoutThreads:
    """The system has none to give: whoever submits runs it, or who leads the batch."""

    @pytest.mark.parametrize("count", [0, 3, 65])
    def test_requests_are_answered(self, scheduler, count):
        told, values = Told(), list(range(count))
        with no_threads():
            scheduler.submit(rows(*values), told(0))
            assert np.array_equal(told.outcomes[0], rows(*values)["x"] * 2)
        scheduler.submit(rows(*values), told(1))
        assert np.array_equal(told.wait(2)[1], rows(*values)["x"] * 2)

    def test_a_batch_that_fails_keeps_nobody_waiting(self, pool, scheduler, gate):
        first, told = occupied(pool, scheduler, gate), Told()
        gate.bad = 3
        with no_threads():
            (leader,) = send(pool, scheduler, [1])
            for value in (2, 3, 4):
                scheduler.submit(rows(value), told(value))
            (last,) = send(pool, scheduler, [5])
            gate.open.set()
            outcomes = told.wait(3)
            assert [call.result(PATIENCE)["y"][0, 0] for call in (leader, last)] == [2, 10]
        assert isinstance(outcomes.pop(3), ExecutionError)
        assert {value: outcome.tolist() for value, outcome in outcomes.items()} == {2: [[4, 4]], 4: [[8, 8]]}
        assert all(future.exception(PATIENCE) is None for future in first)

    def test_those_that_are_lacking_are_started_later(self, scheduler, gate, monkeypatch):
        start, started = threading.Thread.start, []

        def start_one(thread):
            if started:
                raise RuntimeError("can't start new thread")
            started.append(thread)
            start(thread)

        gate.open.clear()
        told = Told()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start_one)
            for value in range(2):
                scheduler.submit(rows(*[value] * 17), told(value))
            assert gate.started.acquire(timeout=PATIENCE)
        scheduler.submit(rows(*[2] * 17), told(2))
        assert len(scheduler._threads._threads) == MOST_SLOTS
        gate.open.set()
        assert {value: outcome[0, 0] for value, outcome in told.wait(3).items()} == {0: 0, 1: 2, 2: 4}


def test_a_slot_that_cannot_be_made_is_one_callers_error(pool, gate):
    made = []

    def make():
        made.append(1)
        if len(made) > 1:
            raise OutOfMemoryError("no second slot")
        return DoublingSlot(gate)

    slots = Slots(make, 2)
    first = slots.acquire()
    with pytest.raises(OutOfMemoryError):
        slots.acquire()
    second = pool.submit(slots.acquire)
    assert second.exception(timeout=PATIENCE) is not None
    slots.release(first)
    assert slots.acquire() is first
    slots.release(first)
    slots.close()


def test_slots_that_cannot_be_trimmed_are_not_lost(gate, monkeypatch):
    slots = Slots(lambda: DoublingSlot(gate), 2)
    for slot in (slots.acquire(), slots.acquire()):
        slots.release(slot)

    def fails(_slot):
        raise ExecutionError("the GPU is lost")

    monkeypatch.setattr(DoublingSlot, "trim", fails)
    with pytest.raises(ExecutionError, match="lost"):
        slots.trim()
    slots.close()
    assert gate.closed == 2


def test_slots_are_lent_in_the_order_in_which_they_were_asked_for(pool, gate):
    slots = Slots(lambda: DoublingSlot(gate), 1)
    held, order, futures = slots.acquire(), [], []

    def use(number):
        with slots.borrow():
            order.append(number)

    for number in range(10):
        futures.append(pool.submit(use, number))
        wait_for(lambda number=number: len(slots._line) == number + 1)
    assert slots.acquire_now() is None
    slots.release(held)
    for future in futures:
        future.result(timeout=PATIENCE)
    assert order == list(range(10))
    slots.close()


@pytest.fixture
def sessions(tmp_path):
    source = read(networks.product(), tmp_path)
    session = OnnxRuntimeSession(source.path, source.inputs, source.outputs, batch_axis=AXIS, largest_batch=16,
                                 max_batch_delay_ms=5.0)  # fmt: skip
    with session, reference(source) as alone:
        yield session, alone


def test_stress(pool, sessions):
    """Sizes and threads mixed, bad inputs among them: every answer is the one that the call alone gets."""
    session, alone = sessions
    batches = [networks.rows(n % 41, seed=n) for n in range(400)]
    bad = {n for n in range(400) if n % 50 == 7}

    def call(n):
        if n in bad:
            with pytest.raises(InputError):
                session.run({"x": batches[n][:, :5]})
            return None
        return session.run({"x": batches[n]})["y"]

    for n, result in enumerate(pool.map(call, range(400))):
        if n not in bad:
            expected = alone.run({"x": batches[n]})["y"]
            assert result.shape == expected.shape
            assert np.allclose(result, expected, rtol=1e-5, atol=1e-6)
            assert result.base is None or result.base.shape == result.shape  # nobody else's rows
    assert sum(session.runs.values()) < 1_000
    assert set(session.runs) <= set(range(17))


def test_submitted_requests_get_what_the_call_alone_gets(sessions):
    session, alone = sessions
    batches, told = [networks.rows(n % 41, seed=n) for n in range(200)], Told()
    for n, x in enumerate(batches):
        session.submit({"x": x}, told(n))
    with pytest.raises(InputError):
        session.submit({"x": batches[1][:, :5]}, told(-1))
    for n, result in told.wait(200).items():
        assert np.allclose(result, alone.run({"x": batches[n]})["y"], rtol=1e-5, atol=1e-6)


def test_closing_under_load_ends_every_call(pool, sessions):
    session, _ = sessions
    session.run({"x": networks.rows(1)})

    right = []

    def call(n):
        while True:
            try:
                right.append(session.run({"x": networks.rows(n % 20 + 1)})["y"].shape[0] == n % 20 + 1)
            except SessionClosedError:
                return

    futures = [pool.submit(call, n) for n in range(80)]
    wait_for(lambda: len(right) > 200)
    session.close()
    for future in futures:
        future.result(PATIENCE)
    assert all(right)
