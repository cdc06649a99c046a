from __future__ import annotations

import concurrent.futures
import errno
import fcntl
import hashlib
import os
import signal
import time
import warnings
from pathlib import Path

import pytest

from mlflow_trt.core.types import Distribution, EngineRecord
from mlflow_trt.store import cache

PLAN = b"plan" * 1000
RECORD = EngineRecord(
    file="engine.plan",
    sha256=hashlib.sha256(PLAN).hexdigest(),
    size=len(PLAN),
    distribution=Distribution.TENSORRT_RTX,
    version="1.7.1.116",
)


@pytest.fixture
def plan(tmp_path) -> Path:
    (tmp_path / "engine.plan").write_bytes(PLAN)
    return tmp_path / "engine.plan"


def test_keeps_engines(plan):
    assert cache.find_engine("key") is None
    cache.store_engine("key", RECORD, plan)
    assert cache.find_engine("key") == (RECORD, PLAN)


def test_the_key_changes_with_every_part():
    assert cache.key_of({"a": 1, "b": (1, 2)}) == cache.key_of({"b": (1, 2), "a": 1})
    assert cache.key_of({"a": 1, "b": (1, 2)}) != cache.key_of({"a": 1, "b": (1, 3)})


@pytest.mark.parametrize("damage", [b"", b"plan", PLAN[:-1] + b"!"])
def test_a_damaged_engine_is_dropped(damage, plan, messages):
    cache.store_engine("key", RECORD, plan)
    stored = cache.directory() / "engines" / "key"
    (stored / "engine.plan").write_bytes(damage)
    assert cache.find_engine("key") is None
    assert "damaged" in messages.text
    assert not stored.exists()


def test_many_may_store_the_same_at_once(plan):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: cache.store_engine("key", RECORD, plan), range(32)))
    assert cache.find_engine("key") == (RECORD, PLAN)
    assert [path.name for path in (cache.directory() / "engines").iterdir()] == ["key"]


def test_the_users_cache_is_the_default(monkeypatch):
    monkeypatch.delenv(cache.DIRECTORY_VARIABLE)
    assert cache.directory().name == "mlflow-trt"


def test_where_nothing_can_be_kept_the_user_is_told(plan, messages, monkeypatch):
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, "/proc/no/cache")
    with cache.only_one("key"):
        assert cache.find_engine("key") is None
        cache.store_engine("key", RECORD, plan)
    assert "The engine cannot be kept in /proc/no/cache/engines" in messages.text


def test_where_files_cannot_be_locked_it_goes_on(monkeypatch, plan):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with cache.only_one("key"):
        cache.store_engine("key", RECORD, plan)
        assert cache.find_engine("key") == (RECORD, PLAN)


def test_one_builds_while_the_others_wait(plan):
    built = []

    def load(_):
        with cache.only_one("key"):
            if cache.find_engine("key") is None:
                built.append(1)
                time.sleep(0.05)
                cache.store_engine("key", RECORD, plan)
            return cache.find_engine("key")

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(load, range(8))) == [(RECORD, PLAN)] * 8
    assert len(built) == 1


def test_a_process_forked_meanwhile_does_not_keep_the_lock():
    pid = 0
    with cache.only_one("key"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of threads where a process forks
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
    try:
        with (cache.directory() / "locks" / "key").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_the_doctor_can_ask_whether_anything_can_be_kept(monkeypatch):
    assert cache.problem() is None
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, "/proc/no/cache")
    assert "cannot be written to" in cache.problem()
