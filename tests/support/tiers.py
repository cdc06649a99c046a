"""What `make test` leaves to `make test-all`: further cases of what a quicker test covers, marked `exhaustive`."""

from __future__ import annotations

from typing import Any

import pytest

COSTS = {"server": 5, "slow": 3, "store": 2}
"""What a test with this mark takes, beside one without any."""
COLLECTED = pytest.StashKey[list[pytest.Item]]()
"""All tests of the files that were named, those that options leave out among them."""


def exhaustive(*cases: Any) -> list[pytest.ParameterSet]:
    """Further cases for `pytest.mark.parametrize`, behind those that `make test` runs. A tuple is of several values."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.exhaustive) for case in cases
    ]
