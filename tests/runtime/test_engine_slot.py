"""A session's memory, contexts and streams, on a GPU that exists only here: what goes in comes out doubled."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import gc
import multiprocessing
import threading
from functools import partial
from typing import Any

import fake_gpu
import numpy as np
import pytest
from helpers import PATIENCE, no_threads, wait_for

from mlflow_trt.errors import OutOfMemoryError, RuntimeUnavailableError
from mlflow_trt.runtime import native
from mlflow_trt.runtime.batching.sizes import BatchRows
from mlflow_trt.runtime.cuda.device import Device
from mlflow_trt.runtime.engine import slot as slot_module
from mlflow_trt.runtime.engine.contexts import MOST_CONTEXTS
from mlflow_trt.runtime.engine.engine import MOST_FAILED_CAPTURES
from mlflow_trt.runtime.replicas import ReplicaSession

EITHER_WAY = pytest.mark.parametrize("extension", [native.extension, None], ids=["in C", "in Python"])
TOGETHER = pytest.mark.parametrize("delay", [0, 5.0], ids=["each by itself", "together"])
LATE = pytest.mark.parametrize("late", [False, True], ids=["shapes known", "shapes late"])


def rows(count, columns=2, seed=0):
    return np.random.default_rng(seed).standard_normal((count, columns)).astype(np.float32)


def check(session, x):
    outputs = session.run({"x": x})
    assert np.array_equal(outputs["y"], x * 2)
    assert np.array_equal(outputs["z"], x[:, 0])
    return outputs


@EITHER_WAY
@TOGETHER
@LATE
def test_buffers_grow_and_are_used_again(delay, late, extension, monkeypatch):
    monkeypatch.setattr(native, "extension", extension)
    with fake_gpu.session(late=late, max_batch_delay_ms=delay) as (session, _, _):
        for seed, (count, columns) in enumerate([(1, 1), (16, 2), (3, 2), (16, 64), (1, 1), (40, 64), (3, 2)]):
            check(session, rows(count, columns, seed))


@EITHER_WAY
@TOGETHER
def test_freed_memory_that_comes_back_smaller_at_the_same_address_is_bound_again(delay, extension, monkeypatch):
    """A context is not good for what its addresses happen to be, but for the memory that it was bound to."""
    monkeypatch.setattr(native, "extension", extension)
    with fake_gpu.session(max_batch_delay_ms=delay) as (session, _, _):
        check(session, rows(4, 64))
        session._scheduler.slots.trim()
        check(session, rows(1, 1))
        check(session, rows(4, 64, seed=1))


def test_a_graph_never_uses_scratch_memory_that_grew_in_another_slot():
    def double(slot, x):
        slot.launch(BatchRows([{"x": x}], None, 0), 0)
        return slot.finish()["y"]

    with fake_gpu.session() as (session, driver, tensorrt), session._scheduler.slots.borrow() as slot:
        driver.gives_addresses_again = False
        for seed in range(3):
            assert np.array_equal(double(slot, rows(2, seed=seed)), 2 * rows(2, seed=seed))
        with session._scheduler.slots.borrow() as other:
            double(other, rows(16, 64))
        captures = driver.captures
        for seed in range(3):
            assert np.array_equal(double(slot, rows(2, seed=seed)), 2 * rows(2, seed=seed))
        assert driver.captures == captures + 1
        assert tensorrt.made == 2


@contextlib.contextmanager
def counted(driver, monkeypatch):
    """What is enqueued one by one, and launched as graphs, meanwhile."""
    counts, enqueue = collections.Counter(), fake_gpu.FakeStream.enqueue

    def count(stream, work):
        counts["enqueued"] += 1
        enqueue(stream, work)

    launches, captures = driver.launches, driver.captures
    with monkeypatch.context() as patch:
        patch.setattr(fake_gpu.FakeStream, "enqueue", count)
        yield counts
    counts["launched"], counts["captured"] = driver.launches - launches, driver.captures - captures


class TestGraphs:
    def test_a_call_that_comes_again_is_one_launch(self, monkeypatch):
        with fake_gpu.session() as (session, driver, _):
            for seed in range(2):
                check(session, rows(3, seed=seed))
            with counted(driver, monkeypatch) as counts:
                for seed in range(4):
                    check(session, rows(3, seed=seed))
        # A launch stands for the upload, the engine, and two downloads.
        assert counts == {"launched": 4, "captured": 0, "enqueued": 16}

    @pytest.mark.parametrize("upload", [True, False], ids=["small inputs", "large inputs"])
    @pytest.mark.parametrize("download", [True, False], ids=["small outputs", "large outputs"])
    def test_what_is_large_is_copied_outside_of_the_graph(self, upload, download, monkeypatch):
        monkeypatch.setattr(slot_module, "GRAPH_INPUT_BYTES", 1 << 20 if upload else 1)
        monkeypatch.setattr(slot_module, "GRAPH_OUTPUT_BYTES", 1 << 20 if download else 1)
        with fake_gpu.session() as (session, driver, _):
            for seed in range(3):
                check(session, rows(3, seed=seed))
            with counted(driver, monkeypatch) as counts:
                check(session, rows(3, seed=3))
            names = {name for slot in session._scheduler.slots._free
                     for context in slot.bindings._contexts.values() for name in context.graphs}  # fmt: skip
        assert names == {f"{'upload, ' * upload}engine{', download' * download}"}
        assert counts == {"launched": 1, "captured": 0, "enqueued": 4}

    def test_they_are_captured_again_when_buffers_move(self, monkeypatch):
        with fake_gpu.session() as (session, driver, _):
            for seed in range(3):
                check(session, rows(3, 2, seed))
            check(session, rows(16, 64))
            with counted(driver, monkeypatch) as counts:
                for seed in range(3):
                    check(session, rows(3, 2, seed))
        assert (counts["captured"], counts["launched"]) == (1, 2)

    @pytest.mark.parametrize("settings", [{"late": True}, {"cuda_graphs": False}], ids=["late outputs", "off"])
    def test_where_there_are_none(self, settings):
        with fake_gpu.session(**settings) as (session, driver, _):
            for seed in range(5):
                check(session, rows(3, seed=seed))
            session.warm_up()
            assert driver.captures == 0

    def test_after_warming_up_nothing_is_captured_any_more(self, monkeypatch):
        with fake_gpu.session(profiles=(*fake_gpu.FakeTensorRT.profiles, ((1, 1), (32, 64), (32, 64)))) as found:
            session, driver, _ = found
            session.warm_up()
            with counted(driver, monkeypatch) as counts:
                for count in (1, 2, 3, 8, 16):
                    check(session, rows(count))
        assert counts["captured"] == 0
        assert counts["launched"] == 5

    @pytest.mark.parametrize(("failures", "captured"), [(2, True), (99, False)])
    def test_a_capture_that_fails_costs_no_call(self, failures, captured, monkeypatch, messages):
        execute, failed = fake_gpu.FakeContext.execute_async_v3, []

        def fail(context, handle):
            if context._tensorrt.driver.capturing and len(failed) < failures:
                failed.append(context)
                raise context._tensorrt.driver.Error("capture invalidated")
            return execute(context, handle)

        monkeypatch.setattr(fake_gpu.FakeContext, "execute_async_v3", fail)
        with fake_gpu.session() as (session, driver, _):
            for seed in range(12):
                check(session, rows(3, seed=seed))
            assert bool(driver.captures) is captured
        assert ("capture invalidated" in messages.text) is not captured
        assert len(failed) == min(failures, MOST_FAILED_CAPTURES)

    def test_who_allocates_is_not_waited_for(self):
        with fake_gpu.session() as (session, driver, _), concurrent.futures.ThreadPoolExecutor(1) as pool:
            check(session, rows(3))
            with Device.allocating:
                assert pool.submit(check, session, rows(3, seed=1)).result(PATIENCE)
                assert driver.captures == 0
            check(session, rows(3, seed=2))
            assert driver.captures == 1

    def test_inputs_on_the_gpu(self):
        """Their graphs hold the engine alone, beside those of calls from the host."""
        with fake_gpu.session() as (session, driver, _):
            for seed in range(4):
                check(session, rows(3, seed=seed))
                found = session.run_on_device({"x": fake_gpu.Lent(driver, rows(3, seed=seed))})
                assert np.array_equal(found["y"].numpy(), rows(3, seed=seed) * 2)
                del found
            assert driver.captures == 2


def test_no_graph_is_captured_of_allocations(monkeypatch):
    """Not even where another slot finds out first that there are some."""

    def check_in(slot, x):
        slot.launch(BatchRows([{"x": x}], None, 0), 0)
        outputs = slot.finish()
        assert np.array_equal(outputs["z"], x[:, 0])

    infer = fake_gpu.FakeContext.infer_shapes
    others: list[Any] = []

    def infer_later(context):
        if others:
            check_in(others.pop(), rows(3))
        return infer(context)

    monkeypatch.setattr(fake_gpu.FakeContext, "infer_shapes", infer_later)
    with fake_gpu.session(late=True) as (session, driver, _):
        driver.gives_addresses_again = False
        slots = session._scheduler.slots
        with slots.borrow() as slot, slots.borrow() as other:
            others.append(other)
            for count in (8, 8, 8, 2, 8):
                check_in(slot, rows(count, seed=count))


def test_a_graph_is_known_of_after_a_run_that_was_interrupted(monkeypatch):
    execute = fake_gpu.FakeContext.execute_async_v3

    def interrupted(context, handle):
        execute(context, handle)
        execute(context, handle)  # which captures
        raise KeyboardInterrupt

    with fake_gpu.session() as (session, driver, _):
        driver.gives_addresses_again = False
        slots = session._scheduler.slots
        with monkeypatch.context() as patch, slots.borrow() as slot:
            patch.setattr(fake_gpu.FakeContext, "execute_async_v3", interrupted)
            with pytest.raises(KeyboardInterrupt):
                slot.launch(BatchRows([{"x": rows(2)}], None, 0), 0)
            slot.abandon()
        with slots.borrow() as slot, slots.borrow() as other:
            other.launch(BatchRows([{"x": rows(16, 64)}], None, 0), 0)
            other.finish()
            slot.launch(BatchRows([{"x": rows(2)}], None, 0), 0)
            assert np.array_equal(slot.finish()["y"], rows(2) * 2)


def test_contexts_are_kept_for_the_shapes_that_came_last():
    with fake_gpu.session() as (session, _, tensorrt):
        for columns in range(1, 2 * MOST_CONTEXTS):
            check(session, rows(4, 64 - columns))
        made = tensorrt.made
        assert made <= MOST_CONTEXTS
        for columns in range(1, 2 * MOST_CONTEXTS):
            check(session, rows(4, columns))
        assert tensorrt.made == made


def test_contexts_are_kept_for_every_size_of_every_profile():
    lengths = (8, 16, 32, 64)
    profiles = tuple(((1, columns), (4, columns), (64, columns)) for columns in lengths)
    with fake_gpu.session(profiles=profiles) as (session, _, tensorrt):
        session.warm_up()
        made = tensorrt.made
        assert made > 2 * MOST_CONTEXTS
        for size in (1, 2, 4, 8, 16, 32, 64):
            for columns in lengths:
                check(session, rows(size, columns))
        assert tensorrt.made == made


def test_a_context_is_told_of_scratch_memory_that_grew_in_its_place():
    """It takes no shapes that need more than it was told of, whatever lies at the address."""
    with fake_gpu.session() as (session, _, _):
        for columns in range(1, 2 * MOST_CONTEXTS):
            check(session, rows(4, columns))


def test_results_are_the_callers():
    with fake_gpu.session(max_batch_delay_ms=5.0) as (session, _, _):
        x = rows(3)
        first = check(session, x)
        check(session, rows(3, seed=1))
        session._scheduler.slots.trim()
        assert np.array_equal(first["y"], x * 2)
        assert all(output.base is None for output in first.values())


@TOGETHER
def test_a_model_of_float64_is_run_in_float32(delay):
    with fake_gpu.session(dtype="float64", max_batch_delay_ms=delay) as (session, driver, _):
        assert [spec.dtype for spec in (*session.inputs, *session.outputs)] == ["float64"] * 3
        session.warm_up()
        x = np.random.default_rng(0).standard_normal((3, 2))
        narrow = x.astype(np.float32)
        for found in (session.run({"x": x}), session.run({"x": narrow}), submitted(session, x)):
            assert [output.dtype for output in found.values()] == [np.float64] * 2
            assert np.array_equal(found["y"], narrow * 2)
        on_device = session.run_on_device({"x": fake_gpu.Lent(driver, narrow)})
        assert np.array_equal(on_device["y"].numpy(), narrow * 2)
        del on_device
        with ReplicaSession({0: session}) as replicas:
            assert np.array_equal(replicas.run({"x": x})["y"], narrow * 2)


def submitted(session, x):
    answers = []
    session.submit({"x": x}, lambda outputs, error: answers.append((outputs, error)))
    wait_for(lambda: answers)
    ((outputs, error),) = answers
    assert error is None
    return outputs


def test_too_little_memory_passes():
    with fake_gpu.session(max_batch_delay_ms=5.0) as (session, driver, _):
        check(session, rows(1))
        driver.room = 300
        with pytest.raises(OutOfMemoryError):
            session.run({"x": rows(16, 64)})
        check(session, rows(1))
        driver.room = 1 << 20
        check(session, rows(16, 64))


def test_pinned_memory_that_is_lacking_for_outputs_is_made_again():
    with fake_gpu.session(batch_axis=None) as (session, driver, _):
        check(session, rows(1))
        whole = driver.pagelocked_empty
        made = []

        def for_inputs_only(nbytes, dtype):
            made.append(nbytes)
            if len(made) > 1:
                raise driver.MemoryError("pinned memory")
            return whole(nbytes, dtype)

        driver.pagelocked_empty = for_inputs_only
        with pytest.raises(OutOfMemoryError):
            session.run({"x": rows(16, 64)})
        driver.pagelocked_empty = whole
        check(session, rows(1))
        check(session, rows(16, 64))


def test_ctrl_c_while_closing_takes_nothing_from_calls_that_run(monkeypatch):
    def wait():
        raise KeyboardInterrupt

    with fake_gpu.session() as (session, _, _):
        slots, (*_, (_, engine)) = session._scheduler.slots, session._finalizer.peek()[2]
        with slots.borrow() as slot:
            slot.launch(BatchRows([{"x": rows(4)}], None, 0), 0)
            with monkeypatch.context() as patch:
                patch.setattr(slots._returned, "wait", wait)
                with pytest.raises(KeyboardInterrupt):
                    session.close()
            assert engine._scratch.nbytes
            assert np.array_equal(slot.finish()["y"], rows(4) * 2)
        slots.close()
        with engine.device.current():
            engine.close()


OWN_THREADS = {
    "compile": lambda scheduler, job: scheduler._readiness._worker.submit(job),
    "capture": lambda scheduler, job: scheduler._native._worker.submit(job),
    "run": lambda scheduler, job: scheduler._threads.do(job),
}


@pytest.mark.skipif(native.extension is None, reason=native.why_not)
@pytest.mark.parametrize("thread", OWN_THREADS)
def test_a_session_that_its_own_thread_finds_to_be_garbage_is_closed(thread):
    """That thread has a slot, which closing waits for."""
    session, driver, _ = fake_gpu.open_session(max_batch_delay_ms=5.0, compile_beside_calls=True)
    check(session, rows(2))
    scheduler, finalizer = session._scheduler, session._finalizer
    wait_for(lambda: not scheduler._readiness._worker._thread)
    begun, may_collect, found = threading.Event(), threading.Event(), []

    def collect():
        with scheduler.slots.borrow():
            begun.set()
            assert may_collect.wait(PATIENCE)
            gc.collect()
            found.append((finalizer.alive, bool(driver.blocks)))

    OWN_THREADS[thread](scheduler, collect)
    assert begun.wait(PATIENCE)
    gc.disable()  # in this thread
    try:
        session.itself = session
        del session
        assert finalizer.alive
        may_collect.set()
        wait_for(lambda: found)
    finally:
        gc.enable()
    wait_for(lambda: not driver.blocks)
    assert found == [(False, True)]


def test_two_may_warm_up_at_the_same_time():
    with fake_gpu.session(max_batch_delay_ms=5.0) as (session, _, _):
        make = session._scheduler.slots._make
        begun = []

        def warm_up():
            begun.append(1)
            session.warm_up()

        def slowly():
            wait_for(lambda: len(begun) == 2)
            return make()

        session._scheduler.slots._make = slowly
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(warm_up) for _ in range(2)]:
                future.result(timeout=PATIENCE)


def test_warm_means_that_no_context_is_made_again():
    """Not even for a profile that was run before a larger one made the scratch memory grow."""
    profiles = (((1, 1), (1, 2), (4, 2)), ((1, 32), (2, 64), (8, 64)))
    with fake_gpu.session(profiles=profiles) as (session, driver, tensorrt):
        driver.gives_addresses_again = False
        session.warm_up()
        made = tensorrt.made
        for shape in ((1, 2), (4, 2), (2, 64), (8, 64)):
            check(session, rows(*shape))
        assert tensorrt.made == made


@EITHER_WAY
@TOGETHER
@LATE
def test_stress(delay, late, extension, monkeypatch):
    """Threads, sizes and shapes mixed; buffers grow and are freed meanwhile."""
    monkeypatch.setattr(native, "extension", extension)
    with fake_gpu.session(late=late, max_batch_delay_ms=delay) as (session, _, _):
        barrier = threading.Barrier(8)

        def work(thread):
            random = np.random.default_rng(thread)
            barrier.wait(PATIENCE)
            for n in range(150):
                check(session, rows(random.integers(1, 20), random.choice([1, 2, 64]), seed=n))
                if n % 40 == thread:
                    session._scheduler.slots.trim()

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))


class TestCompilingBesideCalls:
    @TOGETHER
    def test_calls_are_run_in_the_sizes_there_are(self, delay):
        with fake_gpu.session(max_batch_delay_ms=delay, compile_beside_calls=True) as (session, _, tensorrt):
            may_begin = threading.Event()
            assert session._scheduler._readiness._worker.submit(partial(may_begin.wait, PATIENCE))
            check(session, rows(2))
            assert session.runs == {2: 1}
            for count in (1, 2, 3, 7, 16, 40):
                check(session, rows(count, seed=count))
            assert set(session.runs) == {2}
            assert session.runs[2] == 1 + 1 + 1 + 2 + 4 + 8 + 20
            may_begin.set()
            wait_for(lambda: {shape[0] for shape in tensorrt.compiled.copy()} == {1, 2, 4, 8, 16})
            wait_for(lambda: not session._scheduler._readiness._worker._thread)
            for count in (1, 7, 16):
                check(session, rows(count, seed=count))
            assert set(session.runs) == {1, 2, 8, 16}

    def test_a_call_waits_for_no_kernels_but_its_own(self):
        """Nor does anybody else, where a call brings shapes that are new."""
        with fake_gpu.session() as (session, _, tensorrt), concurrent.futures.ThreadPoolExecutor(1) as pool:
            check(session, rows(4))
            tensorrt.may_compile.clear()
            waiting = pool.submit(check, session, rows(4, 8))
            wait_for(tensorrt._compiling.locked)
            for seed in range(5):
                check(session, rows(4, seed=seed))
            assert not waiting.done()
            tensorrt.may_compile.set()
            waiting.result(PATIENCE)

    def test_unusual_shapes_get_the_sizes_that_calls_want(self):
        with fake_gpu.session(compile_beside_calls=True) as (session, _, tensorrt):
            check(session, rows(1, 5))
            check(session, rows(8, 5))
            wait_for(lambda: (8, 5) in tensorrt.compiled)
            wait_for(lambda: not session._scheduler._readiness._worker._thread)
            assert {shape for shape in tensorrt.compiled if shape[1] == 5} == {(1, 5), (8, 5)}

    def test_threads_that_come_together_want_larger_sizes(self):
        with fake_gpu.session(max_batch_delay_ms=5.0, compile_beside_calls=True) as (session, _, tensorrt):
            check(session, rows(1, 5))
            with concurrent.futures.ThreadPoolExecutor(8) as pool:

                def grown():
                    list(pool.map(lambda n: check(session, rows(1, 5, n)), range(64)))
                    return any(count > 1 and columns == 5 for count, columns in tensorrt.compiled.copy())

                wait_for(grown)

    def test_warm_is_warm(self):
        with fake_gpu.session(compile_beside_calls=True) as (session, _, tensorrt):
            session.warm_up()
            compiled = set(tensorrt.compiled)
            for count in (1, 3, 16):
                check(session, rows(count))
            assert session.runs == {1: 1, 4: 1, 16: 1}
            assert tensorrt.compiled == compiled

    def test_a_size_that_fails_is_not_used(self, monkeypatch, messages):
        execute = fake_gpu.FakeContext.execute_async_v3

        def fail(context, handle):
            return context._shape[0] != 8 and execute(context, handle)

        monkeypatch.setattr(fake_gpu.FakeContext, "execute_async_v3", fail)
        with fake_gpu.session(compile_beside_calls=True) as (session, _, tensorrt):
            check(session, rows(2))
            wait_for(lambda: (16, 2) in tensorrt.compiled)
            wait_for(lambda: not session._scheduler._readiness._worker._thread)
            check(session, rows(7))
            assert 8 not in session.runs
        assert "Batches of 8 rows are run in other sizes" in messages.text

    @pytest.mark.parametrize(("columns", "sizes"), [(2, {1, 2, 4, 8, 16}), (5, {2, 8})], ids=["usual", "unusual"])
    def test_calls_do_without_a_thread_and_ask_again(self, columns, sizes):
        with fake_gpu.session(compile_beside_calls=True) as (session, _, tensorrt):
            with no_threads():
                for count in (2, 7, 16, 7):
                    check(session, rows(count, columns, seed=count))
                assert session.runs == {2: 1 + 4 + 8 + 4}
                assert {shape for shape in tensorrt.compiled if shape[1] == columns} == {(2, columns)}
            check(session, rows(7, columns))
            wait_for(lambda: not session._scheduler._readiness._worker._thread)
            assert {count for count, width in tensorrt.compiled if width == columns} == sizes
            session._scheduler._runs.clear()
            check(session, rows(7, columns))
            assert session.runs == {8: 1}

    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # is what this is about
    def test_a_process_that_is_forked_meanwhile_does_not_wait_for_it(self):
        def run_in_a_fork():
            with pytest.raises(RuntimeUnavailableError, match="loaded before this process was forked"):
                session.run({"x": rows(2)})
            session.close()

        with fake_gpu.session(compile_beside_calls=True) as (session, _, tensorrt):
            tensorrt.may_compile.clear()
            assert session._scheduler._readiness._worker.submit(tensorrt.may_compile.wait)
            process = multiprocessing.get_context("fork").Process(target=run_in_a_fork)
            process.start()
            process.join(PATIENCE)
            assert process.exitcode == 0
            tensorrt.may_compile.set()
            check(session, rows(2))

    def test_closing_ends_it(self):
        with fake_gpu.session(compile_beside_calls=True) as (session, _, tensorrt):
            tensorrt.may_compile.clear()
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                call = pool.submit(check, session, rows(2))
                wait_for(tensorrt._compiling.locked)
                tensorrt.may_compile.set()
                call.result(PATIENCE)
        assert session._scheduler._readiness._worker._thread is None

    def test_empty_batches(self):
        with fake_gpu.session(compile_beside_calls=True) as (session, _, _):
            check(session, rows(0))
            check(session, rows(3))

    @LATE
    def test_stress(self, late):
        settings = {"late": late, "max_batch_delay_ms": 2.0, "compile_beside_calls": True}
        with fake_gpu.session(**settings) as (session, _, _), concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: check(session, rows(n % 21, 1 + n % 3, seed=n)), range(300)))


def test_kernels_are_not_read_while_others_compile():
    class Store:
        kept = b""

        def read(self):
            return []

        def update(self, merge):
            self.kept = merge([])

    store = Store()
    with fake_gpu.session(kernel_store=store) as (session, _, tensorrt):
        barrier = threading.Barrier(4)

        def work(thread):
            barrier.wait(PATIENCE)
            for columns in range(1, 30):
                check(session, rows(4, 2 * columns + thread % 2, seed=thread))

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        assert len(tensorrt.compiled) >= 58
        assert store.kept == str(sorted(tensorrt.compiled)).encode()
