"""What the CUDA driver tells of its GPUs, with a library that answers as the driver does."""

from __future__ import annotations

import uuid

import pytest

from mlflow_trt.backends import cuda_driver

WHOLE, INSTANCE = uuid.UUID(int=7), uuid.UUID(int=1 << 100)


class Library:
    """One GPU, or a MIG instance of it, whose own UUID only the second version of the function tells."""

    def __init__(self, instance, has_second_version=True):
        self.instance = instance
        self.has_second_version = has_second_version

    def call(self, function, *arguments):
        if function == "cuDeviceGetCount":
            arguments[0]._obj.value = 1
        elif function == "cuDeviceGetUuid":
            arguments[0][:] = WHOLE.bytes
        elif function == "cuDeviceGetUuid_v2":
            if not self.has_second_version:
                raise AttributeError(function)
            arguments[0][:] = self.instance.bytes


@pytest.mark.parametrize(
    ("status", "advice"),
    [(100, " (see whether nvidia-smi lists one here"), (803, " (its libraries are of another release"), (1, "")],
    ids=["no GPU", "another release", "what nobody can advise on"],
)
def test_a_driver_that_does_not_start_comes_with_advice(status, advice, monkeypatch):
    class Unstarted(Library):
        def call(self, function, *arguments):
            raise cuda_driver.DriverError(f"the CUDA driver answers {function} with: words", status)

    monkeypatch.setattr(cuda_driver, "DriverLibrary", lambda: Unstarted(WHOLE))
    found = cuda_driver.probe()
    assert found.gpus == ()
    assert found.problem is not None
    assert found.problem.startswith(f"the CUDA driver answers cuInit with: words{advice}")
    assert found.problem.endswith(")") == bool(advice)


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        (Library(WHOLE), f"GPU-{WHOLE}"),
        (Library(INSTANCE), f"MIG-{INSTANCE}"),
        (Library(INSTANCE, has_second_version=False), f"GPU-{WHOLE}"),
    ],
    ids=["a whole GPU", "a MIG instance", "an old driver"],
)
def test_gpus_are_called_as_cuda_visible_devices_takes_them(library, expected):
    (gpu,) = cuda_driver._ask(library).gpus
    assert gpu.uuid == expected
