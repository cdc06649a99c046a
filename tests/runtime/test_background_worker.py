"""Jobs beside the calls: in their order, one at a time, and never a caller's trouble."""

from __future__ import annotations

import concurrent.futures
import gc
import subprocess
import sys
import threading
import weakref
from functools import partial

import pytest
from helpers import PATIENCE, no_threads, wait_for

from mlflow_trt.runtime.batching.background_worker import BackgroundWorker


@pytest.fixture
def worker():
    worker = BackgroundWorker("test")
    yield worker
    worker.close()


def ended(worker):
    """Wait until there is nothing to do."""
    wait_for(lambda: worker._thread is None)


class Job:
    """Takes until it may end."""

    def __init__(self):
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self.thread = None

    def __call__(self):
        self.thread = threading.current_thread()
        self.begun.set()
        assert self.may_end.wait(PATIENCE)


def test_jobs_are_done_in_their_order_by_one_thread(worker):
    first, done = Job(), []
    assert worker.submit(first)
    assert all(worker.submit(lambda n=n: done.append((n, threading.current_thread()))) for n in range(50))
    assert first.begun.wait(PATIENCE)
    assert done == []
    first.may_end.set()
    ended(worker)
    assert done == [(n, first.thread) for n in range(50)]


def test_there_is_a_thread_only_while_there_are_jobs(worker):
    threads = []
    for _ in range(3):
        job = Job()
        assert worker.submit(job)
        assert job.begun.wait(PATIENCE)
        assert job.thread.name == "mlflow-trt-test"
        job.may_end.set()
        ended(worker)
        job.thread.join(PATIENCE)
        threads.append(job.thread)
    assert len(set(threads)) == 3
    assert not any(thread.is_alive() for thread in threads)


def test_a_job_that_fails_ends_nothing(worker, messages):
    def fail():
        raise ValueError("not my day")

    job, done = Job(), []
    for each in (job, fail, partial(done.append, 1)):
        assert worker.submit(each)
    job.may_end.set()
    ended(worker)
    assert done == [1]
    assert "not my day" in messages.text


def test_a_job_may_submit_others(worker):
    done = []

    def again(left):
        done.append(left)
        if left:
            assert worker.submit(partial(again, left - 1))

    assert worker.submit(partial(again, 20))
    ended(worker)
    assert done == list(range(20, -1, -1))


def test_no_job_is_lost_and_none_done_twice_where_many_submit(worker):
    done, busy = [], threading.Lock()

    def do(job):
        assert busy.acquire(blocking=False)  # alone
        done.append(job)
        busy.release()

    def submit(thread):
        for n in range(200):
            assert worker.submit(partial(do, (thread, n)))
            if n % 20 == thread:
                ended(worker)  # so that others find it with a thread that is about to end

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(submit, range(8)))
    ended(worker)
    for thread in range(8):
        assert [n for found, n in done if found == thread] == list(range(200))


class TestClose:
    def test_it_waits_for_the_job_that_runs_and_drops_the_others(self, worker):
        job, done = Job(), []
        assert worker.submit(job)
        assert worker.submit(partial(done.append, 1))
        assert job.begun.wait(PATIENCE)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            closing = pool.submit(worker.close)
            wait_for(lambda: worker._closed)
            assert not worker.submit(partial(done.append, 2))
            assert not closing.done()
            job.may_end.set()
            closing.result(PATIENCE)
        assert not job.thread.is_alive()
        assert done == []

    def test_there_may_be_nothing_to_wait_for(self, worker):
        worker.close()
        worker.close()
        assert not worker.submit(pytest.fail)
        assert worker._thread is None


class TestNoThread:
    def test_the_job_is_left_out(self, worker):
        done = []
        with no_threads():
            assert not worker.submit(partial(done.append, 1))
        assert worker.submit(partial(done.append, 2))
        ended(worker)
        assert done == [2]

    def test_where_there_is_one_already_it_does_the_job(self, worker):
        job, done = Job(), []
        assert worker.submit(job)
        with no_threads():
            assert worker.submit(partial(done.append, 1))
            job.may_end.set()
            ended(worker)
            assert not worker.submit(partial(done.append, 2))
        assert done == [1]

    def test_closing(self, worker):
        with no_threads():
            assert not worker.submit(pytest.fail)
            worker.close()


class Owner:
    def __init__(self):
        self.worker = BackgroundWorker("test")

    def do(self):
        pass


def test_nothing_refers_to_who_had_jobs_done():
    gc.disable()  # or it would hide a cycle
    try:
        owner = Owner()
        worker, there = owner.worker, weakref.ref(owner)
        assert worker.submit(owner.do)
        ended(worker)
        del owner
        assert there() is None
    finally:
        gc.enable()


def test_a_job_refers_to_nothing_once_it_is_done(worker):
    owner, job = Owner(), Job()
    there = weakref.ref(owner)
    assert worker.submit(owner.do)
    assert worker.submit(job)
    del owner
    assert job.begun.wait(PATIENCE)
    assert there() is None
    job.may_end.set()


BUSY = """if True:
    import threading, weakref
    from mlflow_trt.runtime.batching.background_worker import BackgroundWorker

    class Owner:
        pass

    def do():
        begun.set()
        while not worker._closed:
            pass
        print("done", flush=True)

    begun, owner, worker = threading.Event(), Owner(), BackgroundWorker("test")
    assert worker.submit(do)
    assert begun.wait()
"""


@pytest.mark.parametrize(
    ("end", "printed"), [("", ""), ("weakref.finalize(owner, worker.close)", "done\n")], ids=["", "closed at the end"]
)
def test_the_interpreter_waits_for_a_job_only_where_that_is_closed(end, printed):
    command = [sys.executable, "-c", f"{BUSY}    {end}\n"]
    assert subprocess.run(command, check=True, timeout=PATIENCE, stdout=subprocess.PIPE, text=True).stdout == printed
