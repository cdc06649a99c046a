"""`make test` leaves further cases to `make test-all`, and no kind of test altogether."""

from __future__ import annotations

from collections import defaultdict

import pytest
from tiers import COLLECTED, COSTS

SLOW = {*COSTS, "gpu"}
LEFT_OUT = {
    "test_commands_over_http.py",  # twelve commands in a row, each of which has tests of its own
    "test_endurance_benchmark.py",  # 13 s for the least run; that it sees wrong answers is tested without one
}


@pytest.fixture
def marks(request) -> dict[pytest.Item, set[str]]:
    return {test: {mark.name for mark in test.iter_markers()} for test in request.config.stash[COLLECTED]}


def test_only_slow_tests_are_left_out(marks):
    """What `make test-fast` runs, `make test` runs as well."""
    assert not [test.nodeid for test, own in marks.items() if "exhaustive" in own and not own & SLOW]


def test_of_the_slow_tests_of_each_file_some_are_run(marks):
    files = defaultdict[str, list[bool]](list)
    for test, own in marks.items():
        if own & SLOW:
            files[test.path.name].append("exhaustive" in own)
    assert {name for name, found in files.items() if all(found)} <= LEFT_OUT
