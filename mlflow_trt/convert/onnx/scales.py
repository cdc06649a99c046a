"""Scales and zero points of Q/DQ in the shape of what they belong to.

Source: QuantizeLinear and DequantizeLinear, https://github.com/onnx/onnx/blob/main/docs/Operators.md.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def spread(values: npt.NDArray[np.generic], shape: tuple[int, ...], axis: int, block: int) -> npt.NDArray[np.float32]:
    """In float32, so that they broadcast with an array of `shape`.

    There is one value in all, one for each index of `axis`, or with a `block` one for so many of them.
    """
    numbers = values.astype(np.float32)
    if numbers.size == 1:
        return numbers.reshape(())
    along = axis % len(shape)
    if block:
        return np.repeat(numbers, block, along).take(np.arange(shape[along]), along)
    return numbers.reshape([-1 if index == along else 1 for index in range(len(shape))])


def dequantize(
    stored: npt.NDArray[np.generic],
    scale: npt.NDArray[np.generic],
    zero: npt.NDArray[np.generic] | None,
    *,
    axis: int,
    block: int,
) -> npt.NDArray[np.float32]:
    """The numbers that quantized ones stand for."""
    numbers = stored.astype(np.float32)
    if zero is not None:
        numbers = numbers - spread(zero, stored.shape, axis, block)
    return np.asarray(numbers * spread(scale, stored.shape, axis, block), np.float32)
