"""MLflow signatures and input examples for ONNX inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from mlflow_trt.core import types as spec
from mlflow_trt.core.types import BatchAxis, ShapeProfile


def signature_of(
    inputs: Sequence[spec.TensorSpec],
    outputs: Sequence[spec.TensorSpec],
    profiles: Sequence[ShapeProfile],
    batch_axis: BatchAxis | None,
) -> ModelSignature:
    """A signature of named tensors. A dimension that varies is -1, unless every profile fixes it to one size.

    The batch axis stays -1 even where it is fixed, since batches of other sizes are split and padded.
    """

    def narrowed(tensor: spec.TensorSpec) -> tuple[int, ...]:
        rows_vary = batch_axis is not None and batch_axis.splits and tensor.name in batch_axis.inputs
        return tuple(
            -1 if axis == 0 and rows_vary else size if size is not None else _only_size(tensor.name, axis, profiles)
            for axis, size in enumerate(tensor.fixed)
        )

    return ModelSignature(
        # MLflow knows no schema without inputs.
        inputs=Schema([TensorSpec(_numpy_native(tensor), narrowed(tensor), tensor.name) for tensor in inputs])
        if inputs
        else None,
        outputs=Schema(
            [
                TensorSpec(
                    _numpy_native(tensor), tuple(-1 if size is None else size for size in tensor.fixed), tensor.name
                )
                for tensor in outputs
            ]
        ),
    )


def _only_size(name: str, axis: int, profiles: Sequence[ShapeProfile]) -> int:
    ranges = [profile.ranges[name] for profile in profiles if name in profile.ranges]
    sizes = {size for limits in ranges if not limits.is_values for size in (limits.min[axis], limits.max[axis])}
    return sizes.pop() if len(sizes) == 1 else -1


def _numpy_native(tensor: spec.TensorSpec) -> np.dtype[np.generic]:
    """MLflow cannot read a signature with types that numpy lacks; float32 holds every bfloat16 value."""
    return np.dtype("float32" if tensor.dtype == "bfloat16" else tensor.dtype)
