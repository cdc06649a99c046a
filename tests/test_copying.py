"""Threads that copy: whoever hands out copies gets back memory that none of them touches any more."""

from __future__ import annotations

import os
import signal
import threading
import warnings

import numpy as np
import pytest
from helpers import PATIENCE

from mlflow_trt.runtime.batching import host_copy as copying


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), KeyboardInterrupt()], ids=type)
def test_nothing_is_copied_any_more_after_handing_out_failed(error, monkeypatch):
    pool = copying._threads()
    submit, jobs, proceed = pool.submit, [], threading.Event()

    def slowly(*job):
        proceed.wait(PATIENCE)
        job[0](*job[1:])

    def submit_two(*job):
        jobs.append(submit(slowly, *job))
        if len(jobs) == 2:  # as the pool does: the job is in its queue when no thread can be started for it
            raise error

    monkeypatch.setattr(copying, "THREADS", 8)
    monkeypatch.setattr(pool, "submit", submit_two)
    source = np.ones((16, copying.LEAST_BYTES), np.uint8)
    target = np.zeros_like(source)
    with pytest.raises(type(error)):
        list(copying.copy_rows([(source, 0, len(source))], target))
    proceed.set()
    for job in jobs:
        job.result(timeout=PATIENCE)
    assert not target.any()


def test_a_forked_process_has_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(copying, "THREADS", 4)
    source = np.ones((4, copying.LEAST_BYTES), np.uint8)
    copying.copies([source])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of threads where a process forks
        child = os.fork()
    if child == 0:
        signal.alarm(10)
        os._exit(0 if np.array_equal(copying.copies([source])[0], source) else 1)
    assert os.waitpid(child, 0)[1] == 0
