"""Check what a caller passes against the model's inputs, and convert it where nothing is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from mlflow_trt.core.arrays import Array, Feeds, numpy_dtype
from mlflow_trt.core.nvtx import marked
from mlflow_trt.core.types import TensorSpec, is_placeholder
from mlflow_trt.errors import InputDtypeError, InputError, InputShapeError

_MOST_KNOWN = 1024


class InputCheck:
    """`prepare_feeds` for the inputs of one model, which remembers the dtypes and shapes that need nothing."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = tuple(specs)
        self._names = tuple(spec.name for spec in specs)
        self._known: set[tuple[object, ...]] = set()

    @marked("check inputs")
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
    """The value of an input as an array.

    Raises InputShapeError for rows of different lengths, InputDtypeError for a value that is masked.
    """
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        position = np.unravel_index(int(np.argmax(np.ma.getmaskarray(value))), value.shape)
        raise InputDtypeError(f"{_place_in_input(name)(tuple(map(int, position)))} is missing", tensor=name)
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
    converted = convert_array(array, spec)
    return converted if converted.flags.c_contiguous else np.ascontiguousarray(converted).reshape(shape)


Place = Callable[[tuple[int, ...]], str]
"""What errors call the value at a position. They name places, not values: a server must not quote what it was sent."""


def _place_in_input(name: str) -> Place:
    def place(position: tuple[int, ...]) -> str:
        row = f", row {position[0]}" if position else ""
        return f"input {name!r}{row}: the value at {list(position)}"

    return place


def convert_array(array: Array, spec: TensorSpec, place: Place | None = None) -> Array:
    """`array` in the dtype that `spec` wants, where that loses nothing but a float's last digits.

    A float may become a narrower float unless a finite value would turn into infinity; an integer may become another
    integer type or a float that holds each of its values exactly; a float that is a whole number may become an integer;
    a bool may become a number. Nothing else may change, and what is missing is no number.

    `place` says where a value is, for errors; without it, in an input.
    """
    wanted = numpy_dtype(spec.dtype)
    if array.dtype == wanted:
        return array
    source, target = _kind(array.dtype), _kind(wanted)
    if source == "O":
        return _convert_objects(array, spec, place or _place_in_input(spec.name))
    if source == "b" and target in "iuf":
        return array.astype(wanted)
    if source not in "iuf" or target not in "iuf":
        where = place((0,) * array.ndim) if place is not None and array.size else f"input {spec.name!r}"
        raise InputDtypeError(
            f"{where} is of dtype {array.dtype}; expected {spec.dtype}, or one that converts without loss",
            tensor=spec.name,
        )
    place = place or _place_in_input(spec.name)
    if source == "f" and target in "iu":
        _check(~np.isfinite(array), spec, place, "is missing or infinite, which no {} is")
        _check(array != np.trunc(array), spec, place, "is no whole number, which every {} is")
        # From here on a float may be any of several integers: beside a float, numpy makes 2**53 of 2**53 + 1.
        _check(np.abs(array) >= 2.0 ** (_mantissa(array.dtype) + 1), spec, place, _UNFIT)
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(wanted)
        changed = converted.astype(array.dtype) != array
    if target == "f" and source == "f":
        _check(np.isfinite(array) & ~np.isfinite(converted.astype(np.float64)), spec, place, "is too large for {}")
        return converted
    if target == "f":
        # Back from what no integer equals, the cast gives whatever the processor does: the lowest integer on x86, the
        # nearest one on ARM. Either may be the very value that was lost.
        reached = converted.astype(np.float64)
        changed |= ~np.isfinite(reached) | (reached >= 2.0 ** (8 * array.itemsize - (source == "i")))
    elif {source, target} == {"i", "u"}:
        changed |= np.less(converted if source == "u" else array, 0)
    _check(changed, spec, place, _UNFIT)
    return converted


def check_bools(array: Array, spec: TensorSpec, place: Place | None = None) -> Array:
    """`array`, a view of bytes from outside. Where they are bools, each has to be 0 or 1: a runtime may take any other
    for true in one operator and for something else in the next.

    Raises InputDtypeError.
    """
    if array.dtype == np.bool_:
        place = place or _place_in_input(spec.name)
        _check(array.view(np.uint8) > 1, spec, place, "is neither 0 nor 1, which every {} is")
    return array


_UNFIT = "cannot be represented in {}"


def _check(wrong: npt.NDArray[np.bool_], spec: TensorSpec, place: Place, what: str) -> None:
    """Raise InputDtypeError for the first value that is wrong."""
    if wrong.any():
        position = tuple(int(index) for index in np.unravel_index(int(np.argmax(wrong)), wrong.shape))
        raise InputDtypeError(f"{place(position)} {what.format(spec.dtype)}", tensor=spec.name)


def _convert_objects(array: Array, spec: TensorSpec, place: Place) -> Array:
    """Python's own numbers, as lists with something else among them, and columns of any type, become arrays of."""
    flat = array.reshape(-1).tolist()
    for index, value in enumerate(flat):
        if is_missing(value):
            raise InputDtypeError(f"{place(_position(index, array))} is missing", tensor=spec.name)
        if not isinstance(value, (bool, int, float, Decimal, np.bool_, np.number)):
            raise InputDtypeError(
                f"{place(_position(index, array))} is of type {type(value).__name__}; expected {spec.dtype}",
                tensor=spec.name,
            )
    kinds = set(map(type, flat))
    together = _numbers(flat) if len(kinds) == 1 else None
    if together is not None:
        return convert_array(together.reshape(array.shape), spec, place)
    converted = np.empty(array.size, numpy_dtype(spec.dtype))
    for index, value in enumerate(flat):
        number = _numbers([value])
        if number is None:  # an integer of more than 64 bits, or a number of many digits
            raise InputDtypeError(f"{place(_position(index, array))} {_UNFIT.format(spec.dtype)}", tensor=spec.name)
        where = _position(index, array)
        converted[index] = convert_array(number, spec, lambda _, where=where: place(where))[0]  # type: ignore[misc]
    return converted.reshape(array.shape)


def is_missing(value: Any) -> bool:
    """Whether it is None, or what pandas, which is not imported here, calls NA or NaT."""
    return value is None or type(value).__name__ in {"NAType", "NaTType"}


def _numbers(values: list[Any]) -> Array | None:
    """Numbers of one type as an array that holds each exactly, but for a float's last digits; None where none does."""
    if isinstance(values[0], Decimal):
        whole = all(value.is_finite() and value == value.to_integral_value() for value in values)
        values = [int(value) if whole else float(value) for value in values]
    try:
        array: Array = np.array(values)
    except OverflowError:
        return None
    # Of integers, some within 63 bits and others not, numpy makes floats.
    is_lossy = array.dtype.kind == "f" and isinstance(values[0], int)
    return None if is_lossy or array.dtype == object else array


def _position(index: int, array: Array) -> tuple[int, ...]:
    return tuple(int(part) for part in np.unravel_index(index, array.shape))


def _mantissa(dtype: np.dtype[np.generic]) -> int:
    return 7 if dtype.name == "bfloat16" else int(np.finfo(dtype.name).nmant)


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
