"""Which optimization profile runs an input, and whether as it is or in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mlflow_trt.core.arrays import Array, Feeds
from mlflow_trt.core.types import BatchAxis, InputRange, ShapeProfile
from mlflow_trt.errors import InputShapeError
from mlflow_trt.runtime.batching.sizes import batch_size


class Choice(NamedTuple):
    """A profile by its number; with `rows`, the smallest and largest piece that the batch must be cut into."""

    profile: int
    rows: tuple[int, int] | None = None


def choose_profile(profiles: Sequence[ShapeProfile], feeds: Feeds, axis: BatchAxis | None) -> Choice:
    """The profile that holds all shapes and whose usual ones are nearest; else one that does but for the rows.

    Raises InputShapeError where there is none, or where the model's batch cannot be cut.
    """
    fitting = [
        (_distance(profile, feeds), number)
        for number, profile in enumerate(profiles)
        if all(limits.contains(_extent(limits, feeds[name])) for name, limits in profile.ranges.items())
    ]
    if fitting:
        return Choice(min(fitting)[1])
    if axis is not None and axis.splits:
        rows, first = batch_size(feeds, axis), axis.inputs[0]
        fitting = [
            (abs(profile.ranges[first].opt[0] - rows), number)
            for number, profile in enumerate(profiles)
            if all(
                limits.row.contains(feeds[name].shape[1:]) if name in axis.inputs
                else limits.contains(_extent(limits, feeds[name]))
                for name, limits in profile.ranges.items()
            )
        ]  # fmt: skip
        if fitting:
            number = min(fitting)[1]
            limits = profiles[number].ranges[first]
            return Choice(number, (limits.min[0], limits.max[0]))
    raise InputShapeError(_no_profile(profiles, feeds, axis))


def _extent(limits: InputRange, array: Array) -> tuple[int, ...]:
    """What a range limits: the values of a shape tensor, the shape of any other input."""
    return tuple(int(value) for value in array.reshape(-1)) if limits.is_values else array.shape


def _distance(profile: ShapeProfile, feeds: Feeds) -> int:
    return sum(
        abs(usual - size)
        for name, limits in profile.ranges.items()
        for usual, size in zip(limits.opt, _extent(limits, feeds[name]), strict=True)
    )


def _no_profile(profiles: Sequence[ShapeProfile], feeds: Feeds, axis: BatchAxis | None) -> str:
    accepted = "; or ".join(map(str, profiles))
    got = ", ".join(f"{name} {_extent(limits, feeds[name])}" for name, limits in profiles[0].ranges.items())
    if axis is None:
        advice = " It has no batch axis that could be split; batch= declares one."
    elif not axis.splits and axis.dependence is not None:
        advice = f" Batches are not split, since rows depend on each other: {axis.dependence}."
    elif not axis.declared:
        advice = " Batches are not split, since rows may depend on each other; batch= declares that they do not."
    elif not axis.splits:
        advice = " Not every output carries the batch axis, so batches are not split."
    else:
        advice = ""
    return (
        f"the engine was built for {accepted} (min:opt:max), and got {got}.{advice} "
        "Send inputs within these ranges, or log the model with other batch= or shapes=."
    )
