"""Check what a caller passes against the model's inputs, and convert it where nothing is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mlflow_trt.core.arrays import Array, Feeds, numpy_dtype
from mlflow_trt.core.types import TensorSpec, is_placeholder
from mlflow_trt.errors import InputDtypeError, InputError, InputShapeError

_MOST_KNOWN = 1024


class InputCheck:
    """`prepare_feeds` for the inputs of one model, which remembers the dtypes and shapes that need nothing."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = tuple(specs)
        self._names = tuple(spec.name for spec in specs)
        self._known: set[tuple[object, ...]] = set()

    def prepare(self, inputs: Mapping[str, npt.ArrayLike]) -> Feeds:
        """What `prepare_feeds` returns and raises."""
        seen = self._seen(inputs)
        if seen is not None and seen in self._known:
            return {name: inputs[name] for name in self._names}  # type: ignore[misc]  # arrays, as _seen found
        feeds = prepare_feeds(inputs, self._specs)
        if seen is not None and all(feeds[name] is inputs[name] for name in self._names):
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known.add(seen)
        return feeds

    def _seen(self, inputs: Mapping[str, npt.ArrayLike]) -> tuple[object, ...] | None:
        """All that decides what is to be done with the inputs; None where it is more than dtypes and shapes."""
        if type(inputs) is not dict or len(inputs) != len(self._names):
            return None
        found: list[object] = []
        for name in self._names:
            array = inputs.get(name)
            if type(array) is not np.ndarray or not array.flags.c_contiguous:
                return None
            found += (array.dtype, array.shape)
        return tuple(found)


def prepare_feeds(inputs: Mapping[str, npt.ArrayLike], specs: Sequence[TensorSpec]) -> Feeds:
    """Contiguous arrays of the dtypes and ranks that the model wants, in the order of its inputs.

    Raises InputError for a missing or unknown input, InputDtypeError and InputShapeError for one that does not fit.
    """
    if not isinstance(inputs, Mapping):
        raise InputError(f"expected a mapping from input names to arrays, got {type(inputs).__name__}")
    names = [spec.name for spec in specs]
    missing = [name for name in names if name not in inputs]
    if missing:
        raise InputError(f"input {missing[0]!r} is missing; the model wants {_listing(specs)}", tensor=missing[0])
    unknown = [str(name) for name in inputs if name not in names]
    if unknown:
        raise InputError(f"there is no input {unknown[0]!r}; the model wants {_listing(specs)}", tensor=unknown[0])
    feeds = {spec.name: _prepare(inputs[spec.name], spec) for spec in specs}
    _check_shared_dimensions(feeds, specs)
    return feeds


def _listing(specs: Sequence[TensorSpec]) -> str:
    return "; ".join(map(str, specs))


def array_of(value: npt.ArrayLike, name: str) -> Array:
    """The value of an input as an array. Raises InputShapeError for rows of different lengths."""
    try:
        return np.asarray(value)
    except ValueError as error:
        raise InputShapeError(f"input {name!r} is no regular array: {error}", tensor=name) from None


def _prepare(value: npt.ArrayLike, spec: TensorSpec) -> Array:
    array = array_of(value, spec.name)
    shape, fixed = array.shape, spec.fixed
    if len(shape) != len(fixed):
        raise InputShapeError(
            f"input {spec.name!r} has {len(shape)} dimensions, {shape}; expected {len(fixed)}: {spec}", tensor=spec.name
        )
    for axis, (size, wanted) in enumerate(zip(shape, fixed, strict=True)):
        if wanted is not None and size != wanted:
            raise InputShapeError(
                f"input {spec.name!r} has the shape {shape}; expected {wanted} at axis {axis}: {spec}", tensor=spec.name
            )
    converted = convert(array, spec)
    return converted if converted.flags.c_contiguous else np.ascontiguousarray(converted).reshape(shape)


def convert(array: Array, spec: TensorSpec) -> Array:
    """`array` in the dtype that `spec` wants, where that loses nothing but a float's last digits.

    A float may become a narrower float unless a finite value would turn into infinity; an integer may become another
    integer type or a float that holds each of its values exactly; a bool may become a number. Nothing else may change.
    """
    wanted = numpy_dtype(spec.dtype)
    if array.dtype == wanted:
        return array
    source, target = _kind(array.dtype), _kind(wanted)
    if source == "f" and target == "f":
        with np.errstate(over="ignore"):
            converted = array.astype(wanted)
        lost = np.isfinite(array) & ~np.isfinite(converted.astype(np.float64))
        if lost.any():
            raise InputDtypeError(
                f"input {spec.name!r}: the value at {_first(lost)} is too large for {spec.dtype}", tensor=spec.name
            )
        return converted
    if source == "b" and target in "iuf":
        return array.astype(wanted)
    if source in "iu" and target in "iuf":
        with np.errstate(over="ignore", invalid="ignore"):
            converted = array.astype(wanted)
            changed = converted.astype(array.dtype) != array
        if target == "f":
            # Back from what no integer equals, the cast gives whatever the processor does: the lowest integer on x86,
            # the nearest one on ARM. Either may be the very value that was lost.
            reached = converted.astype(np.float64)
            changed |= ~np.isfinite(reached) | (reached >= 2.0 ** (8 * array.itemsize - (source == "i")))
        elif source != target:
            changed |= np.less(array if source == "i" else converted, 0)
        if changed.any():
            raise InputDtypeError(
                f"input {spec.name!r}: the value at {_first(changed)} cannot be represented in {spec.dtype}",
                tensor=spec.name,
            )
        return converted
    raise InputDtypeError(
        f"input {spec.name!r} is of dtype {array.dtype}; expected {spec.dtype}, or one that converts without loss",
        tensor=spec.name,
    )


def _first(mask: npt.NDArray[np.bool_]) -> list[int]:
    """Where the first one is. Errors name places, not values: a server must not quote what it was sent."""
    return [int(index) for index in np.unravel_index(int(np.argmax(mask)), mask.shape)]


def _kind(dtype: np.dtype[np.generic]) -> str:
    # ml_dtypes registers its types as void.
    return "f" if dtype.name == "bfloat16" else dtype.kind


def _check_shared_dimensions(feeds: Feeds, specs: Sequence[TensorSpec]) -> None:
    """Axes of one name have one size: say so before a runtime fails with less to say."""
    seen: dict[str, tuple[str, int]] = {}
    for spec in specs:
        for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=True):
            if not isinstance(dim, str) or is_placeholder(dim):
                continue
            other, expected = seen.setdefault(dim, (spec.name, size))
            if size != expected:
                raise InputShapeError(
                    f"input {spec.name!r} has {size} where input {other!r} has {expected}; "
                    f"the model calls both {dim!r}, so they must be equal",
                    tensor=spec.name,
                )
