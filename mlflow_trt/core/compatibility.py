"""What was made for one machine and may serve another: which engines, and which compiled kernels, fit a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from packaging.version import Version

from mlflow_trt.core.types import (
    ComputeCapability,
    Distribution,
    EngineRecord,
    Gpu,
    HardwareCompatibility,
    KernelsRecord,
)
from mlflow_trt.errors import RecipeError

AMPERE = ComputeCapability(8, 0)
"""What TensorRT-RTX builds for by default, together with everything later."""


def why_not(engine: EngineRecord, distribution: Distribution, version: str, gpu: Gpu) -> str | None:
    """Why an engine cannot run on this TensorRT and GPU, or None where nothing speaks against it."""
    if engine.distribution is not distribution:
        return f"it was built by {engine.distribution.label}, and this is {distribution.label}"
    if not _version_fits(engine, version):
        return f"it was built by {engine.distribution.label} {engine.version}, and this is {version}"
    if not _gpu_fits(engine, gpu.compute_capability):
        return f"it was built for {engine.target}, and this GPU is {gpu}"
    if _wants_same_model(engine) and engine.gpu != gpu.name:
        return (
            f"it was built on {engine.gpu}, and this GPU is {gpu}; "
            "hardware_compatibility='same_compute_capability' makes engines that run on both"
        )
    return None


def check_targets(targets: Sequence[str], gpu: Gpu, *, what: str, otherwise: str) -> None:
    """Raise RecipeError where what TensorRT-RTX builds for these targets, or by default, does not run on `gpu`.

    Args:
        what: begins the text: what it is to be run for.
        otherwise: ends the text: what to do where it cannot run here.
    """
    here = gpu.compute_capability
    if targets and str(here) not in targets:
        problem = f"the targets are {', '.join(targets)}; add {here} to them, convert on a machine with such a GPU"
    elif not targets and here < AMPERE:
        problem = f"by default engines are built for {AMPERE} and later; give targets=['{here}']"
    else:
        return
    raise RecipeError(f"{what} on the GPU of this machine, {gpu}, and {problem}, or {otherwise}", option="targets")


def _version_fits(engine: EngineRecord, version: str) -> bool:
    if engine.version == version:
        return True
    if not engine.version_compatible:
        return False
    built, here = (Version(text).release[:2] for text in (engine.version, version))
    return built[0] == here[0] and built <= here


def _gpu_fits(engine: EngineRecord, compute_capability: ComputeCapability) -> bool:
    if engine.is_ampere_plus:
        return compute_capability >= AMPERE
    return str(compute_capability) in engine.compute_capabilities


def _wants_same_model(engine: EngineRecord) -> bool:
    """TensorRT tunes an engine for the very GPU it was built on, unless told otherwise; TensorRT-RTX does not."""
    return engine.distribution is Distribution.TENSORRT and engine.hardware_compatibility is HardwareCompatibility.NONE


def kernels_fit(kernels: KernelsRecord, version: str, gpu: Gpu) -> bool:
    """Whether kernels that come with an engine of TensorRT-RTX are for this release and GPU."""
    return (kernels.version, kernels.compute_capability) == (version, str(gpu.compute_capability))
