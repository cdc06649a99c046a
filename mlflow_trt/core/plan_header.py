"""What the first bytes of a plan tell without TensorRT and without a GPU: which distribution and release built it."""

from __future__ import annotations

from mlflow_trt.core.types import Distribution
from mlflow_trt.errors import OptionError

_MAGIC = {b"ftrt": Distribution.TENSORRT, b"vtrt": Distribution.TENSORRT_RTX}
_VERSION = slice(24, 28)
"""Major, minor, patch and build, a byte each."""


def read_plan_header(plan: bytes) -> tuple[Distribution, str]:
    """The distribution that built a plan, and its version as Python's package has it.

    Raises OptionError for what is no plan.
    """
    distribution = _MAGIC.get(plan[:4])
    if distribution is None or len(plan) < _VERSION.stop:
        raise OptionError(
            "this is no plan of TensorRT or TensorRT-RTX: it begins with neither of their marks. Give the file that "
            "trtexec --saveEngine, build_serialized_network or `polygraphy convert` wrote",
            option="plan",
        )
    return distribution, ".".join(str(number) for number in plan[_VERSION])
