"""Which GPU a process takes for its own, with processes that end."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest

from mlflow_trt import RuntimeUnavailableError
from mlflow_trt.core.types import ComputeCapability, Gpu
from mlflow_trt.store import gpu_lease as own_gpu
from mlflow_trt.store.cache import DIRECTORY_VARIABLE

pytestmark = pytest.mark.slow

TAKE = """
import sys
from mlflow_trt.store.gpu_lease import own_gpu
from mlflow_trt.core.types import ComputeCapability, Gpu

kind = {"compute_capability": ComputeCapability(8, 6), "name": "RTX A", "memory": 1}
gpus = [Gpu(ordinal=ordinal, uuid=f"GPU-{ordinal}", **kind) for ordinal in range(2)]
print(own_gpu(gpus).ordinal, own_gpu(gpus[::-1]).ordinal, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def process():
    with subprocess.Popen(
        [sys.executable, "-c", TAKE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        first, second = process.stdout.readline().split()
        assert first == second  # the choice stays
        setattr(process, "ordinal", int(first))  # noqa: B010  # Popen knows none
        yield process
        process.kill()


@pytest.mark.exhaustive
def test_each_process_has_its_own():
    with process() as one, process() as other:
        assert {one.ordinal, other.ordinal} == {0, 1}
        with process() as third, process() as fourth:  # shared evenly
            assert {third.ordinal, fourth.ordinal} == {0, 1}


def test_what_a_killed_process_had_is_free_again():
    with process() as one, process() as other:
        one.kill()
        one.wait()
        with process() as next_one:
            assert next_one.ordinal == one.ordinal
            assert next_one.ordinal != other.ordinal


def test_where_nothing_can_be_locked(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "file" / "cache"))
    gpu = Gpu(ordinal=0, uuid="GPU-0", compute_capability=ComputeCapability(8, 6), name="RTX A", memory=1)
    with pytest.raises(RuntimeUnavailableError, match=f"Not a directory.*Set {DIRECTORY_VARIABLE}"):
        own_gpu.own_gpu([gpu])
