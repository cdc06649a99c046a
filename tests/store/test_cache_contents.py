"""What the cache holds, and how it is kept from growing: through files alone, as processes leave them there."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace

import pytest
from command_line import run
from engines import PLAN, RECORD

from mlflow_trt.store import cache
from mlflow_trt.store.cache_contents import SIZE_VARIABLE, limit, list_entries, parse_size
from mlflow_trt.store.kernel_cache import KernelFile


def key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def store(name: str, folder, *, days: float = 0, size: int = len(PLAN)) -> None:
    """An engine of this size, last used so many days ago."""
    plan = folder / "engine.plan"
    plan.write_bytes(PLAN[:size].ljust(size, b"\0"))
    digest = hashlib.sha256(plan.read_bytes()).hexdigest()
    cache.store_engine(key(name), replace(RECORD, sha256=digest, size=size), plan)
    make_older(cache.root() / "engines" / key(name), days)


def make_older(path, days: float) -> None:
    for file in (path, *(path.iterdir() if path.is_dir() else ())):
        then = file.stat().st_mtime - days * 86400
        os.utime(file, (then, then))


def kept() -> list[str]:
    names = {key(name): name for name in "abcdefgh"}
    return [names[entry.key] for entry in list_entries(cache.root())]


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("2000", 2000), ("1.5K", 1536), ("20G", 20 << 30), ("3MiB", 3 << 20), ("1tb", 1 << 40)]
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "1e9", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is no size; write it like 20G"):
        parse_size(text)


def test_what_was_used_last_is_listed_first(tmp_path):
    store("a", tmp_path, days=2)
    store("b", tmp_path, days=1)
    KernelFile(key("c")).update(lambda _: b"kernels")
    make_older(cache.root() / "kernels" / key("c"), 3)
    assert kept() == ["b", "a", "c"]
    assert cache.find_engine(key("a")) is not None
    assert kept() == ["a", "b", "c"]
    make_older(cache.root() / "engines" / key("a"), 0.5)  # the kernel's clock for files may stand still meanwhile
    assert KernelFile(key("c")).read() == [b"kernels"]
    assert kept() == ["c", "a", "b"]
    sizes = {entry.kind: entry.size for entry in list_entries(cache.root())}
    assert sizes["kernels"] == 32 + len(b"kernels")
    assert sizes["engine"] > len(PLAN)


def test_a_cache_that_grew_too_large_loses_what_was_not_used_for_longest(tmp_path, monkeypatch, messages):
    monkeypatch.setenv(SIZE_VARIABLE, str(3 * len(PLAN)))
    for days, name in enumerate("dcba"):
        store(name, tmp_path, days=4 - days)
    assert kept() == ["a", "b"]  # with their records, three are more than that
    assert "Removed engine" in messages.text
    assert SIZE_VARIABLE in messages.text


def test_what_was_just_stored_stays_whatever_its_size(tmp_path, monkeypatch):
    store("a", tmp_path)
    monkeypatch.setenv(SIZE_VARIABLE, "1K")
    store("b", tmp_path, days=5)
    assert kept() == ["b"]
    KernelFile(key("c")).update(lambda _: b"k" * 5000)
    assert kept() == ["c"]


def test_the_limit_can_be_taken_off_and_mistakes_do_not_empty_the_cache(monkeypatch, messages):
    monkeypatch.setenv(SIZE_VARIABLE, "0")
    assert limit() is None
    monkeypatch.setenv(SIZE_VARIABLE, "a lot")
    assert limit() == 20 << 30
    assert "'a lot' is no size" in messages.text


def test_others_files_links_and_what_is_being_written_are_left_alone(tmp_path):
    store("a", tmp_path)
    engines = cache.root() / "engines"
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    (engines / key("b")).symlink_to(outside)
    (engines / "notes.txt").write_text("mine")
    (engines / ".partial-1-abcdef").mkdir()
    removed = cache.prune_cache(0, everything=True)
    assert [entry.key for entry in removed] == [key("a")]
    assert {path.name for path in engines.iterdir()} >= {key("b"), "notes.txt"}
    assert (outside / "precious").read_text() == "mine"


@pytest.mark.slow
def test_the_commands(tmp_path):
    store("a", tmp_path, days=40)
    store("b", tmp_path, days=3)
    store("c", tmp_path)
    cache.remember_pass(key("engine"))
    listed = json.loads(run("cache", "list", "--json")[1])
    assert [entry["key"] for entry in listed["entries"]] == [key("c"), key("b"), key("a")]
    assert listed["limit"] == 20 << 30
    assert key("c")[:12] in run("cache", "list")[1]
    removed = json.loads(run("cache", "prune", "--unused-for", "30", "--json")[1])["removed"]
    assert [entry["key"] for entry in removed] == [key("a")]
    assert "Removed 1 entries" in run("cache", "prune", "--max-size", "5K")[1]
    assert kept() == ["c"]
    assert cache.has_passed(key("engine"))
    assert "Removed 1 entries" in run("cache", "prune", "--all")[1]
    assert kept() == []
    assert not cache.has_passed(key("engine"))
    assert run("cache", "prune", "--max-size", "much")[0] == 2
