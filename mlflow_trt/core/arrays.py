"""Arrays: what they are called in types, and their dtypes by the names in TensorSpec."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from mlflow_trt.core.types import BatchAxis

Array = npt.NDArray[np.generic]

Feeds = dict[str, Array]
"""A model's inputs by name."""

Outputs = dict[str, Array]
"""A model's outputs by name."""


def take_rows(feeds: Feeds, axis: BatchAxis, rows: slice) -> Feeds:
    """Some rows of a batch, and all of the inputs that have none: views, not copies."""
    return {name: array[rows] if name in axis.inputs else array for name, array in feeds.items()}


def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """The numpy dtype of that name; `bfloat16` is the one of ml_dtypes, which makes numpy know it."""
    if name == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype[np.generic] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)
