"""What numbers depend on, besides the model."""

from __future__ import annotations

import importlib.metadata
import platform

from mlflow_trt._version import __version__
from mlflow_trt.backends.cuda_driver import probe

_PACKAGES = ("mlflow", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx")


def describe_machine() -> dict[str, str]:
    """The GPU, its driver, and the releases of what is installed; `none` where there is none."""
    hardware = probe()
    gpus = ", ".join(dict.fromkeys(gpu.name for gpu in hardware.gpus))
    facts = {"gpu": gpus or "none", "driver": hardware.driver or "none", "python": platform.python_version()}
    facts["mlflow-trt"] = __version__
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts
