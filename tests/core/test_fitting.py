"""Which engines fit a GPU, and which GPUs targets leave out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import gpu

from mlflow_trt import RecipeError
from mlflow_trt.core.compatibility import check_targets, why_not
from mlflow_trt.core.types import Distribution, EngineRecord, HardwareCompatibility

RTX = EngineRecord(file="e.plan", sha256="", size=1, distribution=Distribution.TENSORRT_RTX, version="1.7.1.116")
TRT = replace(RTX, distribution=Distribution.TENSORRT, version="10.13.2.6", compute_capabilities=("sm86",), gpu="a GPU")
SAME = HardwareCompatibility.SAME_COMPUTE_CAPABILITY


@pytest.mark.parametrize(
    ("engine", "version", "capability", "reason"),
    [
        (RTX, "1.7.1.116", "sm86", None),
        (RTX, "1.7.1.116", "sm120", None),
        (RTX, "1.7.1.116", "sm75", "it was built for sm80plus, and this GPU is a GPU (sm75)"),
        (RTX, "1.6.1.120", "sm86", "it was built by TensorRT-RTX 1.7.1.116, and this is 1.6.1.120"),
        (replace(RTX, compute_capabilities=("sm86", "sm89")), "1.7.1.116", "sm89", None),
        (replace(RTX, compute_capabilities=("sm86",)), "1.7.1.116", "sm89", "built for sm86, and this GPU is"),
        (TRT, "10.13.2.6", "sm86", None),
        (TRT, "10.13.2.6", "sm89", "it was built for sm86"),
        (replace(TRT, gpu="another"), "10.13.2.6", "sm86", "it was built on another, and this GPU is a GPU (sm86)"),
        (replace(TRT, gpu="another", hardware_compatibility=SAME), "10.13.2.6", "sm86", None),
        (replace(RTX, gpu="another"), "1.7.1.116", "sm86", None),
        (TRT, "10.14.0.1", "sm86", "it was built by TensorRT 10.13.2.6, and this is 10.14.0.1"),
        (replace(TRT, version_compatible=True), "10.14.0.1", "sm86", None),
        (replace(TRT, version_compatible=True), "10.12.0.1", "sm86", "it was built by"),
        (replace(TRT, version_compatible=True), "11.0.0.1", "sm86", "it was built by"),
        (replace(TRT, version="8.6.1.post1", version_compatible=True), "8.6.2", "sm86", None),
        (replace(TRT, hardware_compatibility=HardwareCompatibility.AMPERE_PLUS), "10.13.2.6", "sm120", None),
        (replace(TRT, hardware_compatibility=HardwareCompatibility.AMPERE_PLUS), "10.13.2.6", "sm75", "sm80plus"),
    ],
)
def test_which_engine_fits(engine, version, capability, reason):
    found = why_not(engine, engine.distribution, version, gpu(capability))
    assert found is None if reason is None else reason in found


def test_the_other_distribution_does_not_fit():
    assert why_not(RTX, Distribution.TENSORRT, "1.7.1.116", gpu("sm86")) == (
        "it was built by TensorRT-RTX, and this is TensorRT"
    )


@pytest.mark.parametrize(
    ("targets", "capability", "problem"),
    [
        (("sm86", "sm89"), "sm86", None),
        (("sm89", "sm120"), "sm86", "the targets are sm89, sm120; add sm86 to them"),
        ((), "sm120", None),
        ((), "sm75", "by default engines are built for sm80 and later; give targets=['sm75']"),
    ],
)
def test_targets_that_leave_a_gpu_out(targets, capability, problem):
    if problem is None:
        check_targets(targets, gpu(capability), what="It runs", otherwise="leave it")
        return
    with pytest.raises(RecipeError) as caught:
        check_targets(targets, gpu(capability), what="It runs", otherwise="leave it")
    assert caught.value.message.startswith(f"It runs on the GPU of this machine, a GPU ({capability}), and {problem}")
    assert caught.value.message.endswith(", or leave it")
    assert caught.value.option == "targets"
