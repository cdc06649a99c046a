"""Masks of attention in what float16 holds: exporters write the smallest float32 for minus infinity."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import ModelProto, numpy_helper

from mlflow_trt.convert.onnx.graph import FlatModel, consumers_of

_ON_THE_WAY = frozenset(
    {
        "Add", "Cast", "Concat", "Expand", "Gather", "Identity", "Max", "Min", "Mul", "Reshape", "Slice", "Squeeze",
        "Sub", "Tile", "Transpose", "Unsqueeze", "Where",
    }
)  # fmt: skip


def clamp_masks(model: FlatModel, largest: float) -> tuple[FlatModel, tuple[str, ...]]:
    """The model with the constants of its masks no larger than `largest`, and their names; itself where there are none.

    1. The constant has values that are finite and larger than `largest`.
    2. Whatever it goes into ends in a Softmax, which makes 0 of all that is far below the largest value.

    Whether the results are the same is for the caller to measure: for rows in which everything is masked they are not.
    """
    names = tuple(
        name
        for name, array in model.constants.items()
        if model.is_float32(name)
        and array.size
        and (np.isfinite(array) & (np.abs(array) > largest)).any()
        and _ends_in_softmax(model, name)
    )
    if not names:
        return model, ()
    clamped = ModelProto()
    clamped.CopyFrom(model.proto)
    for tensor in clamped.graph.initializer:
        if tensor.name in names:
            array = model.constants[tensor.name]
            limited = np.where(np.isfinite(array), np.clip(array, -largest, largest), array).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(limited, tensor.name))
    return replace(model, proto=clamped), names


def _ends_in_softmax(model: FlatModel, name: str) -> bool:
    consumers = consumers_of(model)
    outputs = {value.name for value in model.proto.graph.output}
    tensors, ends = [name], 0
    for tensor in tensors:  # which grows
        if tensor in outputs:
            return False
        for node in consumers.get(tensor, ()):
            if node.op_type == "Softmax":
                ends += 1
            elif node.op_type in _ON_THE_WAY and not node.domain:
                tensors.extend(output for output in node.output if output not in tensors)
            else:
                return False
    return ends > 0
