"""Compare numbers, not shapes."""

from __future__ import annotations

import numpy as np


def relative_error(outputs, reference) -> float:
    """The largest error of any output: the norm of the difference over the norm of the reference.

    Fails where outputs differ in names, shapes or dtypes, or the reference hardly varies and so could prove nothing.
    """
    assert outputs.keys() == reference.keys()
    errors = []
    for name, expected in reference.items():
        actual = outputs[name]
        assert actual.shape == expected.shape, name
        assert actual.dtype == expected.dtype, name
        wide = expected.astype(np.float64)
        assert wide.size == 1 or wide.std() > 1e-3 * np.abs(wide).max() > 0, f"the reference of {name} hardly varies"
        assert np.isfinite(actual.astype(np.float64)).all(), name
        errors.append(np.linalg.norm(actual.astype(np.float64) - wide) / np.linalg.norm(wide))
    return float(max(errors))
