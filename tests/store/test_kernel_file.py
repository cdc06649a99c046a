"""The file of compiled kernels that processes share."""

from __future__ import annotations

import concurrent.futures
import threading
import types
from unittest.mock import MagicMock

import pytest

from mlflow_trt.backends.tensorrt import Contexts
from mlflow_trt.store import cache
from mlflow_trt.store.kernel_cache import KernelFile


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, str(tmp_path / "cache"))
    return KernelFile("a" * 64)


def test_nothing_is_there_at_first(file):
    assert file.read() == []
    assert not file.path.exists()


def test_what_was_kept_is_read_and_handed_to_the_next(file):
    file.update(lambda kept: b"one" if kept == [] else b"wrong")
    assert file.read() == [b"one"]
    file.update(lambda kept: kept[0] + b", two")
    assert KernelFile("a" * 64).read() == [b"one, two"]
    assert KernelFile("b" * 64).read() == []


def test_what_came_with_the_model_is_read_first_and_not_copied(file):
    shipped = KernelFile("a" * 64, [b"shipped"])
    shipped.update(lambda kept: b"own" if kept == [] else b"wrong")
    assert shipped.read() == [b"shipped", b"own"]
    assert file.read() == [b"own"]


def test_damage_is_found_and_forgotten(file, messages):
    file.update(lambda kept: b"kernels")
    content = bytearray(file.path.read_bytes())
    content[-1] ^= 1
    file.path.write_bytes(content)
    assert file.read() == []
    assert "are damaged and are compiled again" in messages.text
    assert not file.path.exists()


def test_nothing_to_keep_leaves_nothing(file):
    file.update(lambda kept: None)
    assert not file.path.exists()


def test_no_update_is_lost_among_many(file):
    started = threading.Barrier(8)

    def add(number):
        started.wait()
        for step in range(10):
            own = bytes([number * 10 + step])

            def merge(kept, own=own):
                return b"".join(kept) + own

            KernelFile("a" * 64).update(merge)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    assert sorted(file.read()[0]) == list(range(80))


def test_where_nothing_can_be_kept_nothing_fails(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, str(tmp_path / "file" / "cache"))
    file = KernelFile("a" * 64)
    file.update(lambda kept: b"kernels")
    assert file.read() == []


def test_what_is_there_already_is_not_written_again(file):
    file.update(lambda kept: b"kernels")
    written = file.path.stat().st_ino
    file.update(lambda kept: b"kernels")
    assert file.path.stat().st_ino == written
    file.update(lambda kept: kept[0] + b" and more")
    assert file.read() == [b"kernels and more"]


class Runtime:
    """Caches of kernels as those of TensorRT-RTX, which count how often kernels are read."""

    def __init__(self):
        self.reads = 0
        self.made = []

    def create_runtime_config(self):
        return types.SimpleNamespace(
            create_runtime_cache=self.create, set_runtime_cache=lambda _: None,
            set_execution_context_allocation_strategy=lambda _: None,
        )  # fmt: skip

    def create(self):
        kernels = set()

        def deserialize(blob):
            self.reads += 1
            kernels.update(blob.split(b","))

        made = types.SimpleNamespace(deserialize=deserialize, serialize=lambda: b",".join(sorted(kernels)))
        self.made.append(kernels)
        return made


def test_kernels_are_read_once_unless_others_have_added_some(file):
    """TensorRT-RTX keeps what it takes to read them."""
    file.update(lambda _: b"a")
    runtime = Runtime()
    contexts = Contexts(MagicMock(), runtime, "eager", file.read(), is_rtx=True)
    own, *_ = runtime.made
    for kernel in (b"b", b"c"):
        own.add(kernel)
        file.update(contexts.kernels)
    assert file.read() == [b"a,b,c"]
    assert runtime.reads == 1
    file.update(lambda kept: kept[0] + b",d")  # another process
    own.add(b"e")
    for _ in range(2):
        file.update(contexts.kernels)
        assert file.read() == [b"a,b,c,d,e"]
