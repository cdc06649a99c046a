"""A session's memory, contexts and streams, on a GPU that exists only here: what goes in comes out doubled."""

from __future__ import annotations

import concurrent.futures
import threading
import time

import fake_gpu
import numpy as np
import pytest

from mlflow_trt.errors import OutOfMemoryError
from mlflow_trt.runtime.batching.sizes import Rows
from mlflow_trt.runtime.engine.contexts import MOST_CONTEXTS

TOGETHER = pytest.mark.parametrize("delay", [0, 5.0], ids=["each by itself", "together"])
LATE = pytest.mark.parametrize("late", [False, True], ids=["shapes known", "shapes late"])


def rows(count, columns=2, seed=0):
    return np.random.default_rng(seed).standard_normal((count, columns)).astype(np.float32)


def check(session, x):
    outputs = session.run({"x": x})
    assert np.array_equal(outputs["y"], x * 2)
    assert np.array_equal(outputs["z"], x[:, 0])
    return outputs


@TOGETHER
@LATE
def test_buffers_grow_and_are_used_again(delay, late):
    with fake_gpu.session(late=late, max_batch_delay_ms=delay) as (session, _, _):
        for seed, (count, columns) in enumerate([(1, 1), (16, 2), (3, 2), (16, 64), (1, 1), (40, 64), (3, 2)]):
            check(session, rows(count, columns, seed))


@TOGETHER
def test_freed_memory_that_comes_back_smaller_at_the_same_address_is_bound_again(delay):
    """A context is not good for what its addresses happen to be, but for the memory that it was bound to."""
    with fake_gpu.session(max_batch_delay_ms=delay) as (session, _, _):
        check(session, rows(4, 64))
        session._scheduler.slots.trim()
        check(session, rows(1, 1))
        check(session, rows(4, 64, seed=1))


def test_a_graph_never_uses_scratch_memory_that_grew_in_another_slot():
    def double(slot, x):
        slot.launch(Rows([{"x": x}], None, 0), 0)
        return slot.finish()["y"]

    with fake_gpu.session() as (session, driver, tensorrt), session._scheduler.slots.lent() as slot:
        driver.gives_addresses_again = False
        for seed in range(3):
            assert np.array_equal(double(slot, rows(2, seed=seed)), 2 * rows(2, seed=seed))
        with session._scheduler.slots.lent() as other:
            double(other, rows(16, 64))
        made = tensorrt.made
        for seed in range(3):
            assert np.array_equal(double(slot, rows(2, seed=seed)), 2 * rows(2, seed=seed))
        assert tensorrt.made == made + 1


def test_no_graph_is_captured_of_allocations(monkeypatch):
    """Not even where another slot finds out first that there are some."""

    def check_in(slot, x):
        slot.launch(Rows([{"x": x}], None, 0), 0)
        outputs = slot.finish()
        assert np.array_equal(outputs["z"], x[:, 0])

    infer, others = fake_gpu.FakeContext.infer_shapes, []

    def infer_later(context):
        if others:
            check_in(others.pop(), rows(3))
        return infer(context)

    monkeypatch.setattr(fake_gpu.FakeContext, "infer_shapes", infer_later)
    with fake_gpu.session(late=True) as (session, driver, _):
        driver.gives_addresses_again = False
        slots = session._scheduler.slots
        with slots.lent() as slot, slots.lent() as other:
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
        with monkeypatch.context() as patch, slots.lent() as slot:
            patch.setattr(fake_gpu.FakeContext, "execute_async_v3", interrupted)
            with pytest.raises(KeyboardInterrupt):
                slot.launch(Rows([{"x": rows(2)}], None, 0), 0)
            slot.abandon()
        with slots.lent() as slot, slots.lent() as other:
            other.launch(Rows([{"x": rows(16, 64)}], None, 0), 0)
            other.finish()
            slot.launch(Rows([{"x": rows(2)}], None, 0), 0)
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
        slots, (_, engine) = session._scheduler.slots, session._finalizer.peek()[2]
        with slots.lent() as slot:
            slot.launch(Rows([{"x": rows(4)}], None, 0), 0)
            with monkeypatch.context() as patch:
                patch.setattr(slots._returned, "wait", wait)
                with pytest.raises(KeyboardInterrupt):
                    session.close()
            assert engine._scratch.nbytes
            assert np.array_equal(slot.finish()["y"], rows(4) * 2)
        slots.close()
        with engine.device.current():
            engine.close()


def test_two_may_warm_up_at_the_same_time():
    with fake_gpu.session(max_batch_delay_ms=5.0) as (session, _, _):
        make = session._scheduler.slots._make

        def slowly():
            time.sleep(0.02)
            return make()

        session._scheduler.slots._make = slowly
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(session.warm_up) for _ in range(2)]:
                future.result(timeout=10)


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


@TOGETHER
@LATE
def test_stress(delay, late):
    """Threads, sizes and shapes mixed; buffers grow and are freed meanwhile."""
    with fake_gpu.session(late=late, max_batch_delay_ms=delay) as (session, _, _):
        barrier = threading.Barrier(8)

        def work(thread):
            random = np.random.default_rng(thread)
            barrier.wait(10)
            for n in range(150):
                check(session, rows(random.integers(1, 20), random.choice([1, 2, 64]), seed=n))
                if n % 40 == thread:
                    session._scheduler.slots.trim()

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))


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
            barrier.wait(10)
            for columns in range(1, 30):
                check(session, rows(4, 2 * columns + thread % 2, seed=thread))

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        assert len(tensorrt.compiled) >= 58
        assert store.kept == str(sorted(tensorrt.compiled)).encode()
