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
