"""Threads that copy: whoever hands out copies gets back memory that none of them touches any more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
from helpers import PATIENCE

from mlflow_trt.runtime import native
from mlflow_trt.runtime.batching import host_copy as copying


def use(in_c, monkeypatch):
    """Copy by the extension, or without it."""
    if not in_c:
        monkeypatch.setattr(native, "extension", None)
    elif native.extension is None:
        pytest.skip(native.why_not)


class HandedOut:
    """What the pool was given: it begins with none of it before it may, and fails with the second."""

    def __init__(self, error, monkeypatch):
        self.jobs = []
        self._error = error
        self._may_begin = threading.Event()
        pool = copying._threads()
        self._submit = pool.submit
        monkeypatch.setattr(native, "extension", None)
        monkeypatch.setattr(copying, "THREADS", 8)
        monkeypatch.setattr(pool, "submit", self._submit_two)

    def end(self):
        self._may_begin.set()
        for job in self.jobs:
            job.result(timeout=PATIENCE)

    def _submit_two(self, *job):
        self.jobs.append(self._submit(self._slowly, *job))
        if len(self.jobs) == 2:  # as the pool does: the job is in its queue when no thread can be started for it
            raise self._error

    def _slowly(self, do, *arguments):
        assert self._may_begin.wait(PATIENCE)
        do(*arguments)


def test_nothing_is_copied_any_more_after_handing_out_was_interrupted(monkeypatch):

    handed_out = HandedOut(KeyboardInterrupt(), monkeypatch)
    source = np.ones((16, copying.LEAST_BYTES), np.uint8)
    target = np.zeros_like(source)
    with pytest.raises(KeyboardInterrupt):
        list(copying.copy_rows([(source, 0, len(source))], target))
    handed_out.end()
    assert not target.any()


def test_the_caller_copies_what_the_system_has_no_thread_for(monkeypatch):
    handed_out = HandedOut(RuntimeError("can't start new thread"), monkeypatch)
    source = np.random.default_rng(0).integers(0, 255, (16, copying.LEAST_BYTES), np.uint8)
    target = np.zeros_like(source)
    assert list(copying.copy_rows([(source, 0, len(source))], target)) == list(range(2, 17, 2))
    assert np.array_equal(target, source)
    copied = target.copy()
    source[:] = 0
    handed_out.end()
    assert len(handed_out.jobs) == 2
    assert np.array_equal(target, copied)


@pytest.mark.parametrize("in_c", [True, False], ids=["in C", "in Python"])
def test_a_forked_process_has_threads_of_its_own(in_c, monkeypatch):
    use(in_c, monkeypatch)
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


def test_nothing_is_copied_any_more_for_who_stops_listening():
    if native.extension is None:
        pytest.skip(native.why_not)
    source = np.ones((64, copying.LEAST_BYTES), np.uint8)
    target = np.zeros_like(source)
    arriving = copying.copy_rows([(source, 0, len(source))], target)
    arrived = next(arriving)
    assert target[:arrived].all()
    arriving.close()  # type: ignore[attr-defined]  # a generator
    now = target.copy()
    source[:] = 2
    copying.copies([source])  # the same threads did this, after what they were at
    assert np.array_equal(target, now)


@pytest.mark.parametrize(
    ("value", "said"), [("0", "none, Python does its work more slowly: MLFLOW_TRT_NATIVE is 0"), (None, "in C")]
)
def test_the_environment_turns_the_extension_off(value, said):
    if native.extension is None:
        pytest.skip(native.why_not)
    environment = {name: kept for name, kept in os.environ.items() if name != native.VARIABLE}
    if value is not None:
        environment[native.VARIABLE] = value
    program = "from mlflow_trt.runtime import native; print(native.description())"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == said


class TestCopiesInC:
    @pytest.fixture
    def extension(self):
        if native.extension is None:
            pytest.skip(native.why_not)
        return native.extension

    def test_what_has_arrived_is_told(self, extension):
        source = np.random.default_rng(0).integers(0, 255, 7 << 20, np.uint8)
        target = np.zeros_like(source)
        half = len(source) // 2
        job = extension.Copying([native.address(target), native.address(source), half, 0, 0, 0,
                                 native.address(target) + half, native.address(source) + half, half])  # fmt: skip
        assert half <= job.advance(half) <= len(source)
        assert np.array_equal(target[:half], source[:half])
        assert job.advance(1 << 60) == len(source)
        assert np.array_equal(target, source)
        job.close()
        job.close()
        with pytest.raises(ValueError, match="closed"):
            job.advance(1)

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [(([1, 2],), ValueError), ((["a", 0, 0],), TypeError), (([0, 0, -1],), OverflowError), (((),), TypeError)],
    )
    def test_what_are_no_copies(self, extension, arguments, error):
        with pytest.raises(error):
            extension.Copying(*arguments)
