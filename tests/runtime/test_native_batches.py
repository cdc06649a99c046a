"""Calls that go around Python, by the extension, on a GPU that exists only here."""

from __future__ import annotations

import concurrent.futures
import gc
import multiprocessing
import os
import signal
import threading

import fake_gpu
import numpy as np
import pytest
from helpers import PATIENCE, no_threads, wait_for

from mlflow_trt import ExecutionError, OutOfMemoryError, RuntimeUnavailableError, SessionClosedError
from mlflow_trt.core import nvtx
from mlflow_trt.runtime import native
from mlflow_trt.runtime.batching import native_batches
from mlflow_trt.runtime.batching.sizes import BatchRows
from mlflow_trt.runtime.engine import slot as slot_module

pytestmark = pytest.mark.skipif(native.extension is None, reason=native.why_not)


def rows(count, columns=2, seed=0):
    return np.random.default_rng(seed).standard_normal((count, columns)).astype(np.float32)


def check(session, x):
    outputs = session.run({"x": x})
    assert list(outputs) == ["y", "z"]
    assert np.array_equal(outputs["y"], x * 2)
    assert np.array_equal(outputs["z"], x[:, 0])
    assert all(output.base is None for output in outputs.values())


def captured(session):
    """Wait until nothing is being captured."""
    wait_for(lambda: session._scheduler._native._worker._thread is None)


def counted(driver, call):
    """How many runs the extension launched meanwhile."""
    before = driver.native_launches
    call()
    return driver.native_launches - before


@pytest.fixture
def warm():
    with fake_gpu.session(max_batch_delay_ms=5.0) as (session, driver, tensorrt):
        session.warm_up()
        yield session, driver, tensorrt


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        yield pool


def occupied(pool, session, driver):
    """A call that keeps the GPU busy until it may run, and the one whose batch fills meanwhile."""
    driver.may_run.clear()
    first = pool.submit(check, session, rows(1, seed=100))
    wait_for(lambda: driver.waiting == 1)
    return first


def lined_up(pool, session, batches):
    """The calls of other threads with these, which have come in this order to where the GPU is busy."""
    calls = []
    for number, batch in enumerate(batches):
        calls.append(pool.submit(check, session, batch))
        wait_for(lambda number=number: inside(session) == number + 2)
    return calls


def inside(session):
    """How many calls have reached the extension, and are in the order in which they came."""
    return session._scheduler._native._batcher.callers


class TestOneCaller:
    def test_a_call_that_came_before_goes_around_python(self):
        with fake_gpu.session(max_batch_delay_ms=5.0) as (session, driver, _):
            assert counted(driver, lambda: check(session, rows(3))) == 0
            for seed in range(5):
                assert counted(driver, lambda seed=seed: check(session, rows(3, seed=seed))) == 1
            assert session.runs == {4: 6}
            assert driver.captures == 1
            assert session._scheduler.slots.made == 1

    def test_after_warming_up_the_first_one_does(self, warm):
        session, driver, _ = warm
        for count in range(1, 17):
            assert counted(driver, lambda count=count: check(session, rows(count, seed=count))) == 1
        assert session.runs == {1: 1, 2: 1, 4: 2, 8: 4, 16: 8}

    @pytest.mark.parametrize("rows_in_graph", [1000, 3, 0])
    def test_what_the_engine_is_given_is_what_python_gives_it(self, rows_in_graph, monkeypatch):
        """The same sizes, with the same padding: so the same results, bit for bit. Whoever uploads the rows."""
        monkeypatch.setattr(slot_module, "GRAPH_INPUT_BYTES", rows(rows_in_graph, 3).nbytes)
        batches = [rows(count, columns, seed=count) for columns in (3, 2) for count in (16, 9, 8, 5, 3, 2, 1)]

        def computed():
            with fake_gpu.session(max_batch_delay_ms=5.0) as (session, driver, tensorrt):
                for batch in batches:
                    for _ in range(3):
                        check(session, batch)
                tensorrt.computed.clear()
                launches = counted(driver, lambda: [check(session, batch) for batch in batches])
                assert bool(driver.native_uploads) is (rows_in_graph < 1000 and bool(launches))
                return launches, tensorrt.computed

        launches, in_c = computed()
        assert launches == len(batches)
        monkeypatch.setattr(native, "extension", None)
        launches, in_python = computed()
        assert launches == 0
        assert len(in_c) == len(in_python) == len(batches)
        assert all(np.array_equal(one, other) for one, other in zip(in_c, in_python, strict=True))

    def test_large_rows_are_uploaded_as_they_are_copied(self):
        profile = ((1, 1), (4, 2), (4, 300_000))
        with fake_gpu.session(max_batch_delay_ms=5.0, profiles=(profile,)) as (session, driver, _):
            for seed in range(4):
                check(session, rows(3, 300_000, seed))  # 3.6 MB
            assert driver.native_launches == 3
            assert driver.native_uploads >= 2 * driver.native_launches  # the rows, and the padding

    def test_memory_stays_what_it_was(self):
        with fake_gpu.session(max_batch_delay_ms=5.0) as (session, driver, tensorrt):
            check(session, rows(3))
            before, made = sum(map(len, driver.blocks.values())), tensorrt.made
            for seed in range(50):
                check(session, rows(3, seed=seed))
            captured(session)
            check(session, rows(3))
            assert driver.native_launches
            assert (sum(map(len, driver.blocks.values())), tensorrt.made) == (before, made)

    @pytest.mark.parametrize(
        "settings",
        [{"max_batch_delay_ms": 0}, {"cuda_graphs": False}, {"late": True}, {"batch_axis": None}],
        ids=["no delay", "no graphs", "late outputs", "no rows"],
    )
    def test_what_stays_in_python(self, settings):
        with fake_gpu.session(**{"max_batch_delay_ms": 5.0} | settings) as (session, driver, _):
            for seed in range(5):
                check(session, rows(3, seed=seed))
                if session._scheduler._native:
                    captured(session)
            assert driver.native_launches == 0

    def test_calls_whose_phases_are_marked_stay_in_python(self, monkeypatch):
        monkeypatch.setattr(nvtx, "wanted", True)
        with fake_gpu.session(max_batch_delay_ms=5.0) as (session, driver, _):
            for seed in range(4):
                check(session, rows(3, seed=seed))
            assert driver.native_launches == 0

    def test_large_calls_stay_in_python(self, warm, monkeypatch):
        session, driver, _ = warm
        monkeypatch.setattr(native_batches, "MOST_BYTES", rows(3).nbytes)
        assert counted(driver, lambda: check(session, rows(3))) == 1
        assert counted(driver, lambda: check(session, rows(4))) == 0

    def test_kinds_of_rows_that_are_too_many_stay_in_python(self, monkeypatch):
        monkeypatch.setattr(native_batches, "_MOST_ROUTES", 1)
        monkeypatch.setattr(native_batches, "_MOST_KNOWN", 3)
        with fake_gpu.session(max_batch_delay_ms=5.0) as (session, driver, _):
            for columns in (1, 2, 3, 4):
                for _ in range(3):
                    check(session, rows(2, columns))
                    captured(session)
            assert driver.native_launches == 2
            assert len(session._scheduler._native._routes) == 3

    def test_what_loses_its_memory_again_and_again_is_given_up(self, monkeypatch):
        monkeypatch.setattr(native_batches, "_MOST_CAPTURES", 3)
        with fake_gpu.session(max_batch_delay_ms=5.0) as (session, _, _):
            for _ in range(10):
                for seed in range(3):
                    check(session, rows(2, seed=seed))
                    captured(session)
                session._scheduler.slots.trim()
            (route,) = session._scheduler._native._routes.values()
            assert route.given_up
            assert route.captures == 4


class TestSeveralCallers:
    def test_calls_that_wait_run_together(self, warm, pool):
        session, driver, _ = warm
        first = occupied(pool, session, driver)
        others = lined_up(pool, session, [rows(1, seed=seed) for seed in range(6)])
        driver.may_run.set()
        for call in (first, *others):
            call.result(PATIENCE)
        assert sum(session.runs.values()) < 5
        assert driver.native_launches == sum(session.runs.values())

    def test_the_sizes_that_they_would_fill_are_captured(self):
        with fake_gpu.session(max_batch_delay_ms=5.0) as (session, driver, _):
            with concurrent.futures.ThreadPoolExecutor(16) as pool:

                def ready():
                    list(pool.map(lambda seed: check(session, rows(1, seed=seed)), range(64)))
                    return any(len(slot) >= 4 for slot in graphs(session)) and session._scheduler.slots.made == 2

                wait_for(ready)
            captured(session)
            assert counted(driver, lambda: check(session, rows(1))) == 1

    def test_calls_do_without_a_thread_to_capture_and_ask_again(self, pool):
        with fake_gpu.session(max_batch_delay_ms=5.0) as (session, driver, _):

            def stand_in_line():
                """Somebody has to, for want of a second slot."""
                first = occupied(pool, session, driver)
                others = lined_up(pool, session, [rows(1, seed=seed) for seed in range(2)])
                driver.may_run.set()
                for call in (first, *others):
                    call.result(PATIENCE)
                captured(session)

            for seed in range(3):
                check(session, rows(1, seed=seed))
            with no_threads():
                for _ in range(3):
                    assert counted(driver, stand_in_line) == 3
                assert [len(slot) for slot in graphs(session)] == [1]
            check(session, rows(1))  # lends the slots again
            stand_in_line()
            assert session._scheduler.slots.made == 2
            assert all(graphs(session))
            check(session, rows(1))
            assert counted(driver, lambda: check(session, rows(1))) == 1

    @pytest.mark.parametrize("rows_in_graph", [1000, 3])
    @pytest.mark.parametrize("beside", [False, True], ids=["", "compiling beside"])
    def test_stress(self, beside, rows_in_graph, monkeypatch):
        """Rows, shapes, and ways to use the session mixed; buffers grow and are freed meanwhile."""
        monkeypatch.setattr(slot_module, "GRAPH_INPUT_BYTES", rows(rows_in_graph).nbytes)
        with fake_gpu.session(max_batch_delay_ms=2.0, compile_beside_calls=beside) as (session, driver, _):

            def work(thread):
                random = np.random.default_rng(thread)
                for n in range(150):
                    count = 40 if n % 25 == thread else random.integers(1, 17)
                    check(session, rows(count, random.choice([1, 2, 2, 2, 64]), seed=n))
                    if n % 50 == thread:
                        session._scheduler.slots.trim()
                    if n % 60 == thread:
                        found = session.run_on_device({"x": fake_gpu.Lent(driver, rows(3, seed=n))})
                        assert np.array_equal(found["y"].numpy(), rows(3, seed=n) * 2)
                        del found

            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                list(pool.map(work, range(8)))
            assert driver.native_launches > 20
            gc.collect()

    def test_submitted_requests_beside_them(self, warm, pool):
        session, _, _ = warm
        answers, all_there = [], threading.Semaphore(0)

        def told(outputs, error):
            answers.append(outputs if error is None else error)
            all_there.release()

        calls = []
        for seed in range(100):
            session.submit({"x": rows(2, seed=seed)}, told)
            calls.append(pool.submit(check, session, rows(3, seed=seed)))
        for _ in range(100):
            assert all_there.acquire(timeout=PATIENCE)
        for call in calls:
            call.result(PATIENCE)
        expected = {rows(2, seed=seed).tobytes() for seed in range(100)}
        assert {(answer["y"] / 2).tobytes() for answer in answers} == expected


def graphs(session):
    """What the slots have, which are taken back for it."""
    slots = session._scheduler.slots
    with slots.borrow_several(slots.made) as held:
        return [slot.call_graphs() for slot in held]


class TestFailures:
    def test_one_bad_call_harms_nobody_else(self, warm, pool):
        session, driver, tensorrt = warm
        first = occupied(pool, session, driver)
        tensorrt.bad = 13.0
        batches = [np.full((1, 2), value, np.float32) for value in range(10, 18)]
        calls = lined_up(pool, session, batches)
        driver.may_run.set()
        first.result(PATIENCE)
        for batch, call in zip(batches, calls, strict=True):
            if batch[0, 0] == 13:
                with pytest.raises(ExecutionError, match="13.0 is a bad number"):
                    call.result(PATIENCE)
            else:
                call.result(PATIENCE)
        tensorrt.bad = None
        check(session, rows(2))

    def test_one_that_is_alone_gets_its_own_error(self, warm):
        session, _, tensorrt = warm
        tensorrt.bad = 13.0
        with pytest.raises(ExecutionError, match="13.0 is a bad number"):
            session.run({"x": np.full((1, 2), 13.0, np.float32)})
        check(session, rows(2))

    def test_an_upload_that_fails_leaves_the_call_to_python(self, monkeypatch):
        monkeypatch.setattr(slot_module, "GRAPH_INPUT_BYTES", 0)
        with fake_gpu.session(max_batch_delay_ms=5.0) as (session, driver, _):
            for seed in range(3):
                check(session, rows(3, seed=seed))
            upload, failed = driver.memcpy_htod_async, []

            def fail_once(*arguments):
                if not failed:
                    failed.append(arguments)
                    raise driver.Error("the bus")
                upload(*arguments)

            monkeypatch.setattr(driver, "memcpy_htod_async", fail_once)
            assert counted(driver, lambda: check(session, rows(3))) == 0
            assert failed
            assert counted(driver, lambda: check(session, rows(3))) == 1

    def test_too_little_memory_for_calls_together_makes_smaller_batches(self, warm, pool, messages):
        session, driver, tensorrt = warm
        first = occupied(pool, session, driver)
        calls = lined_up(pool, session, [rows(2, seed=seed) for seed in range(8)])
        tensorrt.most_rows = 2
        driver.may_run.set()
        for call in (first, *calls):
            call.result(PATIENCE)
        assert "at most 8 rows at once from now on" in messages.text
        for seed in range(5):
            check(session, rows(2, seed=seed))

    def test_too_little_memory_for_a_call_makes_pieces_of_it(self, warm):
        session, _, tensorrt = warm
        tensorrt.most_rows = 4
        check(session, rows(16))
        tensorrt.most_rows = 0
        with pytest.raises(OutOfMemoryError):
            session.run({"x": rows(16)})
        tensorrt.most_rows = 16
        check(session, rows(16))

    def test_a_graph_that_cannot_be_captured_leaves_calls_to_python(self, monkeypatch, messages):
        def fail(*_):
            raise ExecutionError("not this one")

        with fake_gpu.session(max_batch_delay_ms=5.0) as (session, driver, _):
            monkeypatch.setattr("mlflow_trt.runtime.engine.slot.EngineSlot.capture_call", fail)
            for seed in range(5):
                check(session, rows(3, seed=seed))
                captured(session)
            assert driver.native_launches == 0
        assert messages.text.count("Calls of such rows go through Python, since a run failed: not this one") == 1


class TestLending:
    """The slots are Python's as soon as it wants them, and the extension's again with the next call."""

    def test_each_other_use_of_the_session_takes_them_back(self, warm):
        session, driver, _ = warm
        x = rows(3)
        for use in (
            lambda: session.run_on_device({"x": fake_gpu.Lent(driver, x)}).clear(),
            lambda: session.run({"x": rows(40)}),
            session._scheduler.slots.trim,
            session.warm_up,
        ):
            assert counted(driver, lambda: check(session, x)) == 1
            assert session._scheduler.slots.are_lent
            use()
            for _ in range(2):
                check(session, x)  # whose graph may have to be captured again
        assert counted(driver, lambda: check(session, x)) == 1

    def test_graphs_are_those_of_the_memory_there_is(self):
        with fake_gpu.session(max_batch_delay_ms=5.0) as (session, driver, _):
            for columns in (2, 8, 2, 64, 2, 8):
                for seed in range(3):
                    check(session, rows(3, columns, seed))
                    captured(session)
                assert counted(driver, lambda columns=columns: check(session, rows(3, columns))) == 1

    def test_who_wants_a_slot_waits_for_the_runs_there_are(self, warm, pool):
        session, driver, _ = warm
        first = occupied(pool, session, driver)
        waiting = pool.submit(check, session, rows(40))
        wait_for(session._scheduler.slots._lock.locked)
        assert not waiting.done()
        driver.may_run.set()
        first.result(PATIENCE)
        waiting.result(PATIENCE)

    def test_nothing_is_lent_while_somebody_keeps_the_slots(self, warm):
        session, driver, _ = warm
        with session._scheduler.slots.kept_here():
            assert counted(driver, lambda: check(session, rows(3))) == 0
        assert counted(driver, lambda: check(session, rows(3))) == 1

    def test_who_lends_waits_for_those_who_use_a_slot(self, warm, pool):
        session, driver, _ = warm
        with session._scheduler.slots.borrow() as slot:
            slot.launch(BatchRows([{"x": rows(4)}], None, 0), 0)
            call = pool.submit(check, session, rows(3))
            wait_for(lambda: len(session._scheduler.slots._line) == 1)
            assert np.array_equal(slot.finish()["y"], rows(4) * 2)
        call.result(PATIENCE)
        assert driver.native_launches == 1

    def test_closing_waits_for_the_runs_there_are(self, warm, pool):
        session, driver, _ = warm
        first = occupied(pool, session, driver)
        closing = pool.submit(session.close)
        wait_for(lambda: session._closed)
        assert not closing.done()
        driver.may_run.set()
        first.result(PATIENCE)
        closing.result(PATIENCE)
        with pytest.raises(SessionClosedError):
            session.run({"x": rows(1)})

    def test_closing_under_load_ends_every_call(self, pool):
        with fake_gpu.session(max_batch_delay_ms=5.0) as (session, driver, _):
            session.warm_up()
            done = []

            def call(seed):
                while True:
                    try:
                        check(session, rows(seed % 5 + 1, seed=seed))
                    except SessionClosedError:
                        return
                    done.append(seed)

            calls = [pool.submit(call, seed) for seed in range(16)]
            wait_for(lambda: len(done) > 200)
            session.close()
            for each in calls:
                each.result(PATIENCE)
            assert driver.native_launches > 20


class TestInterruptions:
    @pytest.fixture
    def ctrl_c(self):
        """Ctrl-C as in a terminal, whatever started the tests. True once it came while Python stood in for the driver,
        whose functions, as C, know nothing of exceptions.
        """
        held_back = threading.Event()

        def interrupt(_number, frame):
            while frame and frame.f_globals is not vars(fake_gpu):
                frame = frame.f_back
            if not frame:
                raise KeyboardInterrupt
            held_back.set()

        before = signal.signal(signal.SIGINT, interrupt)
        yield held_back.is_set
        signal.signal(signal.SIGINT, before)

    @pytest.fixture
    def untraced_threads(self):
        """Threads that coverage does not see. In Python 3.11, one that is traced and calls a function goes nowhere from
        when a signal has come until the main thread saw to it, which here waits for these threads.
        """
        before = threading.gettrace()
        threading.settrace(None)
        yield
        threading.settrace(before)

    @pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="Ctrl-C is the main thread's")
    def test_ctrl_c_while_waiting_leaves_the_batch_to_the_others(self, untraced_threads, warm, pool, ctrl_c):
        session, driver, _ = warm
        first = occupied(pool, session, driver)
        (other,) = lined_up(pool, session, [rows(2, seed=1)])

        def interrupt():
            wait_for(lambda: inside(session) == 3)
            os.kill(os.getpid(), signal.SIGINT)
            driver.may_run.set()

        def be_interrupted():
            session.run({"x": rows(2, seed=2)})
            if ctrl_c():
                raise KeyboardInterrupt

        interrupting = pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            be_interrupted()
        for call in (interrupting, first, other):
            call.result(PATIENCE)
        assert inside(session) == 0
        assert counted(driver, lambda: check(session, rows(3))) == 1

    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # is what this is about
    def test_a_forked_process_is_told_so(self, warm, pool):
        session, driver, _ = warm
        context = multiprocessing.get_context("fork")
        answers = context.Queue()

        def run_in_a_fork():
            try:
                session.run({"x": rows(1)})
            except RuntimeUnavailableError as error:
                answers.put(error.message)
            session.close()

        first = occupied(pool, session, driver)  # somebody is inside, with whatever locks
        process = context.Process(target=run_in_a_fork)
        process.start()
        assert "loaded before this process was forked" in answers.get(timeout=PATIENCE)
        process.join(PATIENCE)
        assert process.exitcode == 0
        driver.may_run.set()
        first.result(PATIENCE)
        check(session, rows(3))


class TestExtension:
    def batcher(self, inputs=1, outputs=1):
        return native.extension.Batcher(inputs, outputs, 0.0, 0, 0, 0, 0, 0, 0)

    def test_what_is_no_batcher(self):
        for inputs, outputs in ((0, 1), (1, 0), (60, 60)):
            with pytest.raises(ValueError, match="64 in all at most"):
                self.batcher(inputs, outputs)
        with pytest.raises(TypeError):
            native.extension.Batcher(1, 1, 0.0, "push", 0, 0, 0, 0, 0)

    def test_what_is_no_route(self):
        batcher = self.batcher()
        for sizes, row_bytes in (((), (4, 4)), ((1,), (4,)), (tuple(range(1, 30)), (4, 4))):
            with pytest.raises(ValueError, match="expected"):
                batcher.add_route(sizes, row_bytes, 2)
        assert [batcher.add_route((1, 2), (4, 4), 2) for _ in range(64)] == list(range(64))
        with pytest.raises(ValueError, match="too many"):
            batcher.add_route((1, 2), (4, 4), 2)

    def test_arrays_that_do_not_fit_are_refused(self):
        batcher = self.batcher()
        route = batcher.add_route((1, 2), (8, 4), 2)
        x, y = np.ones((1, 2), np.float32), np.ones((1,), np.float32)
        locked = y.copy()
        locked.flags.writeable = False
        for arrays in ((x, x), (y, y), (np.ones((2, 4), np.float32)[:, ::2][:1].T, y), (x, locked)):
            with pytest.raises(ValueError, match="expected a contiguous array"):
                batcher.run(route, 1, *arrays)
        with pytest.raises(AttributeError, match="__array_struct__"):
            batcher.run(route, 1, [1.0, 2.0], y)
        with pytest.raises(TypeError, match="an array for each tensor"):
            batcher.run(route, 1, x)
        for number, count in ((1, 1), (route, 0)):
            with pytest.raises(ValueError, match="no such route"):
                batcher.run(number, count, x, y)
        assert batcher.run(route, 1, x, y) is False
        batcher.recall()

    def test_what_is_no_slot(self):
        batcher = self.batcher()
        with pytest.raises(ValueError, match="no such slot"):
            batcher.lend(4, 1, (1, 1), (1,))
        with pytest.raises(ValueError, match="the address of each"):
            batcher.lend(0, 1, (1,), (1,))
        with pytest.raises(ValueError, match="each input on the GPU"):
            batcher.lend(0, 1, (1, 1), ())
        with pytest.raises(ValueError, match="no such route or size"):
            batcher.set_graph(0, 0, 24, 1)
