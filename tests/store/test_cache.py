from __future__ import annotations

import concurrent.futures
import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from engines import PLAN, RECORD
from helpers import gpu, wait_for

from mlflow_trt import RuntimeUnavailableError
from mlflow_trt.convert.engine.timing_cache import TimingCacheFile
from mlflow_trt.store import cache
from mlflow_trt.store.gpu_lease import own_gpu
from mlflow_trt.store.kernel_cache import KernelFile

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


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
    with cache.lock_key("key"):
        assert cache.find_engine("key") is None
        cache.store_engine("key", RECORD, plan)
    assert "The engine cannot be kept in /proc/no/cache/engines" in messages.text


def test_where_files_cannot_be_locked_it_goes_on(monkeypatch, plan):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with cache.lock_key("key"):
        cache.store_engine("key", RECORD, plan)
        assert cache.find_engine("key") == (RECORD, PLAN)


def test_one_builds_while_the_others_wait(plan):
    built, asking = [], []

    def load(_):
        asking.append(1)
        with cache.lock_key("key"):
            if cache.find_engine("key") is None:
                built.append(1)
                wait_for(lambda: len(asking) == 8)
                cache.store_engine("key", RECORD, plan)
            return cache.find_engine("key")

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(load, range(8))) == [(RECORD, PLAN)] * 8
    assert len(built) == 1


def test_a_process_forked_meanwhile_does_not_keep_the_lock():
    pid = 0
    with cache.lock_key("key"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of threads where a process forks
        pid = os.fork()
        if pid == 0:
            signal.pause()  # until it is killed
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
    assert "cannot be written to" in str(cache.problem())


class TestWhoseItIs:
    """Engines are executed, so what another user may have put into the cache does not count."""

    @pytest.fixture(autouse=True)
    def _told_anew(self, monkeypatch):
        monkeypatch.setattr(cache, "_told", set())

    def test_it_is_made_for_its_owner_alone(self, plan):
        umask = os.umask(0)
        try:
            cache.store_engine("key", RECORD, plan)
            cache.remember_pass("key")
            with cache.lock_key("key"):
                pass
        finally:
            os.umask(umask)
        folders = [cache.directory(), *(path for path in cache.directory().iterdir() if path.is_dir())]
        assert {path.name: mode_of(path) for path in folders} == dict.fromkeys(
            ["cache", "engines", "self_tests", "locks"], 0o700
        )

    def test_what_an_earlier_release_left_open_is_closed(self, plan):
        cache.store_engine("key", RECORD, plan)
        engines = cache.directory() / "engines"
        engines.chmod(0o777)
        assert cache.find_engine("key") == (RECORD, PLAN)
        assert mode_of(engines) == 0o700

    def test_in_a_folder_that_is_open_to_all_there_is_a_folder_of_ones_own(self, plan):
        cache.store_engine("key", RECORD, plan)
        cache.directory().chmod(0o777)
        assert cache.find_engine("key") is None  # somebody else may have put it there
        cache.store_engine("key", RECORD, plan)
        assert cache.find_engine("key") == (RECORD, PLAN)
        assert mode_of(cache.directory() / f"user-{os.geteuid()}") == 0o700

    @needs_root
    @pytest.mark.parametrize("whose", [".", "engines", "engines/key", "engines/key/engine.plan"])
    def test_what_another_user_owns_is_ignored(self, whose, plan, messages):
        cache.store_engine("key", RECORD, plan)
        os.chown(cache.directory() / whose, 12345, 12345)
        assert cache.find_engine("key") is None
        assert "belongs to another user, with the uid 12345, so it is ignored" in messages.text
        assert (cache.directory() / "engines" / "key" / "engine.plan").read_bytes() == PLAN  # nothing was removed

    @needs_root
    def test_nothing_is_kept_in_another_users_folder(self, plan, messages):
        cache.directory().mkdir()
        os.chown(cache.directory(), 12345, 12345)
        cache.store_engine("key", RECORD, plan)
        cache.remember_pass("key")
        with cache.lock_key("key"):
            assert not cache.has_passed("key")
        assert list(cache.directory().iterdir()) == []
        assert "belongs to another user" in messages.text
        assert "belongs to another user" in cache.problem()
        with pytest.raises(RuntimeUnavailableError, match="belongs to another user"):
            own_gpu([gpu("sm86")])

    @pytest.mark.parametrize("kind", ["engines", "engines/key", "engines/key/engine.plan", "engines/key/engine.json"])
    def test_a_link_is_not_followed(self, kind, plan, tmp_path, messages):
        cache.store_engine("key", RECORD, plan)
        planted = cache.directory() / kind
        planted.rename(tmp_path / "elsewhere")
        planted.symlink_to(tmp_path / "elsewhere")
        assert cache.find_engine("key") is None
        assert "is a symbolic link, so it is ignored" in messages.text
        assert (tmp_path / "elsewhere").exists()

    def test_a_lock_does_not_empty_what_a_link_leads_to(self, tmp_path):
        (tmp_path / "diary").write_text("dear diary")
        locks = cache.folder_of("locks")
        for name in ("key", f"{gpu('sm86').uuid}-0"):
            (locks / name).symlink_to(tmp_path / "diary")
        with cache.lock_key("key"):
            pass
        with pytest.raises(RuntimeUnavailableError, match="Too many levels of symbolic links"):
            own_gpu([gpu("sm86")])
        assert (tmp_path / "diary").read_text() == "dear diary"

    def test_a_lock_does_not_empty_a_file(self):
        (cache.folder_of("locks") / "key").write_text("dear diary")
        with cache.lock_key("key"):
            pass
        assert (cache.directory() / "locks" / "key").read_text() == "dear diary"

    @pytest.mark.parametrize("exists", [True, False])
    def test_a_pass_is_not_written_through_a_link(self, exists, tmp_path, messages):
        target = tmp_path / "target"
        if exists:
            target.touch()
        (cache.folder_of("self_tests") / "key").symlink_to(target)
        assert not cache.has_passed("key")
        assert "is a symbolic link" in messages.text
        cache.remember_pass("key")
        assert target.exists() == exists

    def test_a_pipe_is_not_waited_for(self):
        os.mkfifo(cache.folder_of("self_tests") / "key")
        os.mkfifo(cache.folder_of("locks") / "key")
        assert not cache.has_passed("key")
        with cache.lock_key("key"):
            pass

    def test_kernels_are_not_read_through_a_link(self, tmp_path, messages):
        file = KernelFile("key")
        file.update(lambda kept: b"kernels")
        file.path.rename(tmp_path / "planted")
        file.path.symlink_to(tmp_path / "planted")
        assert file.read() == []
        file.update(lambda kept: b"own")
        assert not file.path.is_symlink()
        assert file.read() == [b"own"]
        assert (tmp_path / "planted").read_bytes().endswith(b"kernels")


def test_the_lock_of_a_timing_cache_does_not_empty_what_a_link_leads_to(tmp_path):
    (tmp_path / "diary").write_text("dear diary")
    (tmp_path / "timing.cache.lock").symlink_to(tmp_path / "diary")
    with pytest.raises(OSError, match="symbolic links"), TimingCacheFile(tmp_path / "timing.cache")._lock():
        pass
    assert (tmp_path / "diary").read_text() == "dear diary"


def test_a_process_that_waits_says_so_and_a_thread_does_not(messages):
    script = (
        "from mlflow_trt.store import cache\nwith cache.lock_key('key'):\n    print('held', flush=True)\n    input()"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    order = []

    def third():
        with cache.lock_key("key"):
            order.append("third")

    threads = [threading.Thread(target=third) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_for(lambda: "waiting for it" in messages.text)
    order.append("first")
    other.communicate("\n")
    for thread in threads:
        thread.join()
    assert order == ["first", "third", "third", "third"]
    assert messages.text.count("waiting for it") == 1
