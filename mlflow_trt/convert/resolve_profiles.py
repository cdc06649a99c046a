"""Optimization profiles: from what the user asked for and what the graph says, the range of every input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlflow_trt.convert.onnx.batch_axis import find_batch_axis
from mlflow_trt.convert.onnx.model import OnnxModel
from mlflow_trt.convert.recipe import BatchRange, Recipe, ShapeRequest, ShapeTriple
from mlflow_trt.core.types import (
    LARGEST_DIMENSION,
    BatchAxis,
    InputRange,
    Shape,
    ShapeProfile,
    TensorSpec,
    is_placeholder,
)
from mlflow_trt.errors import RecipeError

DEFAULT_BATCH = BatchRange(1, 8, 32)
"""What a batch axis gets where neither the user nor the model says more."""

_Limits = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Profiles:
    """The resolved profiles (none for a model of fixed shapes), the batch axis, and what the user should be told."""

    profiles: tuple[ShapeProfile, ...]
    batch_axis: BatchAxis | None
    remarks: tuple[str, ...]


def resolve_profiles(model: OnnxModel, recipe: Recipe, example_shapes: Mapping[str, Shape] | None = None) -> Profiles:
    """Fill in the recipe's batch and shapes from the model, and check them against it.

    Axes that share a name share their range. `example_shapes`, the shapes of the user's input example, fix the axes
    that nothing else says anything about.

    Raises RecipeError for an unknown input, a shape that the graph contradicts, min above opt above max, a batch for a
    model without a batch axis, and an axis for which there is no range.
    """
    inputs = {spec.name: spec for spec in model.inputs}
    for request in recipe.shapes:
        for name, triple in request.items():
            _check_request(name, triple, inputs)
    axis = find_batch_axis(model, declared=recipe.batch is not None)
    batch = recipe.batch
    if batch is not None and axis is None:
        if not _is_fixed_to(model, batch):
            raise RecipeError(_no_batch_axis(model), option="batch")
        batch = None
    remarks: list[str] = []
    resolved = [
        _Resolution(model.inputs, axis, request, example_shapes or {}, remarks).profile(batch)
        for request in recipe.shapes or ({},)
    ]
    profiles = tuple(profile for profile in resolved if profile.ranges)
    return Profiles(profiles=profiles, batch_axis=axis, remarks=tuple(dict.fromkeys(remarks)))


def _is_fixed_to(model: OnnxModel, batch: BatchRange) -> bool:
    """Whether the model has no other batch than the one that was asked for."""
    return batch.min == batch.max and all(spec.shape[:1] == (batch.max,) for spec in model.inputs)


def _no_batch_axis(model: OnnxModel) -> str:
    listing = "; ".join(map(str, (*model.inputs, *model.outputs)))
    return (
        "batch= was given, but this model has no batch axis, one that varies at axis 0 of its inputs and reaches every "
        f"output ({listing}). Leave batch= out and give shapes= for other axes that vary, "
        "or export the model with a dynamic batch axis."
    )


def _check_request(name: str, triple: ShapeTriple, inputs: Mapping[str, TensorSpec]) -> None:
    spec = inputs.get(name)
    if spec is None:
        raise RecipeError(f"shapes names {name!r}, but the inputs are {', '.join(inputs)}", option="shapes")
    if _is_values(spec, triple):
        _check_order(name, triple)
        return
    if len(triple[0]) != len(spec.shape):
        raise RecipeError(f"shapes[{name!r}] has {len(triple[0])} dimensions, but the input is {spec}", option="shapes")
    for role, shape in zip(("min", "opt", "max"), triple, strict=True):
        for axis, (asked, dim) in enumerate(zip(shape, spec.shape, strict=True)):
            if asked > LARGEST_DIMENSION:
                raise RecipeError(
                    f"shapes[{name!r}]: {role} is {shape}; dimensions of 2**31 and more are not supported",
                    option="shapes",
                )
            if asked != -1 and (asked < 0 or (isinstance(dim, int) and asked != dim)):
                raise RecipeError(
                    f"shapes[{name!r}]: {role} is {shape}, but axis {axis} of the input {spec} is {dim}",
                    option="shapes",
                )
    for axis, sizes in enumerate(zip(*triple, strict=True)):
        if -1 in sizes and set(sizes) != {-1}:
            raise RecipeError(
                f"shapes[{name!r}] mixes -1 and numbers at axis {axis}: -1 in min, opt and max takes all three from "
                "batch= or the model",
                option="shapes",
            )


def _check_order(name: str, triple: ShapeTriple) -> None:
    for low, usual, high in zip(*triple, strict=True):
        if not low <= usual <= high:
            raise RecipeError(
                f"shapes[{name!r}]: expected min <= opt <= max everywhere, got {triple[0]}, {triple[1]}, {triple[2]}",
                option="shapes",
            )


def _is_values(spec: TensorSpec, triple: ShapeTriple) -> bool:
    """Whether a request gives the values of a shape tensor: an integer scalar, or a vector of as many elements."""
    if spec.dtype not in ("int32", "int64") or set(triple) == {spec.shape}:
        return False
    if not spec.shape:
        return len(triple[0]) == 1
    return len(spec.shape) == 1 and spec.shape == (len(triple[0]),) and set(map(len, triple)) == {len(triple[0])}


class _Resolution:
    """Finds the range of every axis of one profile."""

    def __init__(
        self,
        inputs: Sequence[TensorSpec],
        batch_axis: BatchAxis | None,
        request: ShapeRequest,
        example_shapes: Mapping[str, Shape],
        remarks: list[str],
    ) -> None:
        self._inputs = inputs
        self._batched = batch_axis.inputs if batch_axis is not None else ()
        self._splits = batch_axis is not None and batch_axis.splits
        self._request = request
        self._example_shapes = example_shapes
        self._remarks = remarks
        self._by_name: dict[str, _Limits] = {}

    def profile(self, batch: BatchRange | None) -> ShapeProfile:
        limits = self._requested_limits()
        if batch is not None:
            self._apply_batch(limits, batch)
        for key in self._unknown(limits):
            self._fill_from_name_or_default(limits, *key)
        missing = [(spec, axis) for spec, axis in self._unknown(limits)]
        if missing:
            raise RecipeError(self._missing_text(missing), option="shapes")
        return ShapeProfile(ranges=self._ranges(limits))

    def _requested_limits(self) -> dict[tuple[str, int], _Limits]:
        limits: dict[tuple[str, int], _Limits] = {}
        for spec in self._inputs:
            triple = self._request.get(spec.name)
            if triple is None or _is_values(spec, triple):
                continue
            for axis, (low, usual, high) in enumerate(zip(*triple, strict=True)):
                if -1 not in (low, usual, high):
                    self._set(limits, spec, axis, (low, usual, high))
        return limits

    def _apply_batch(self, limits: dict[tuple[str, int], _Limits], batch: BatchRange) -> None:
        for spec in self._inputs:
            if spec.name in self._batched:
                asked = limits.get((spec.name, 0))
                if asked is not None and asked != tuple(batch):
                    raise RecipeError(
                        f"batch is {batch}, but shapes[{spec.name!r}] asks for {asked} at axis 0; "
                        "give one of them, or -1 in the shapes",
                        option="batch",
                    )
                self._set(limits, spec, 0, (batch.min, batch.opt, batch.max))

    def _fill_from_name_or_default(self, limits: dict[tuple[str, int], _Limits], spec: TensorSpec, axis: int) -> None:
        dim = spec.shape[axis]
        if isinstance(dim, str) and dim in self._by_name:
            limits[spec.name, axis] = self._by_name[dim]
        elif axis == 0 and spec.name in self._batched:
            self._set(limits, spec, axis, (DEFAULT_BATCH.min, DEFAULT_BATCH.opt, DEFAULT_BATCH.max))
            self._remarks.append(
                f"axis 0 of input {spec.name!r} is taken as the batch axis, for {DEFAULT_BATCH.min} to "
                f"{DEFAULT_BATCH.max} rows, {DEFAULT_BATCH.opt} usually; change that with shapes=, or with "
                "batch=(min, opt, max), which also says that the rows do not depend on each other"
                + ("" if self._splits else ", so that larger batches can be split")
            )
        elif len(self._example_shapes.get(spec.name, ())) == len(spec.shape):
            size = self._example_shapes[spec.name][axis]
            self._set(limits, spec, axis, (size, size, size))
            self._remarks.append(
                f"axis {axis} of input {spec.name!r} is fixed to {size}, as in the input example; "
                "say otherwise with shapes="
            )

    def _set(self, limits: dict[tuple[str, int], _Limits], spec: TensorSpec, axis: int, value: _Limits) -> None:
        limits[spec.name, axis] = value
        dim = spec.shape[axis]
        if isinstance(dim, str) and not is_placeholder(dim):
            self._by_name.setdefault(dim, value)

    def _unknown(self, limits: Mapping[tuple[str, int], _Limits]) -> list[tuple[TensorSpec, int]]:
        return [
            (spec, axis)
            for spec in self._inputs
            for axis, dim in enumerate(spec.shape)
            if not isinstance(dim, int) and (spec.name, axis) not in limits
        ]

    def _ranges(self, limits: Mapping[tuple[str, int], _Limits]) -> dict[str, InputRange]:
        ranges: dict[str, InputRange] = {}
        for spec in self._inputs:
            triple = self._request.get(spec.name)
            if triple is not None and _is_values(spec, triple):
                ranges[spec.name] = InputRange(min=triple[0], opt=triple[1], max=triple[2], is_values=True)
            elif any(not isinstance(dim, int) for dim in spec.shape):
                dims = [
                    (dim, dim, dim) if isinstance(dim, int) else limits[spec.name, axis]
                    for axis, dim in enumerate(spec.shape)
                ]
                low, usual, high = zip(*dims, strict=True)
                _check_order(spec.name, (low, usual, high))
                ranges[spec.name] = InputRange(min=low, opt=usual, max=high)
        return ranges

    def _missing_text(self, missing: Sequence[tuple[TensorSpec, int]]) -> str:
        axes = ", ".join(
            f"axis {axis}{'' if is_placeholder(spec.shape[axis]) else f' ({spec.shape[axis]})'} of {spec}"
            for spec, axis in missing
        )
        spec = missing[0][0]
        pattern = ", ".join(str(dim) if isinstance(dim, int) else "..." for dim in spec.shape)
        return (
            f"no range is known for {axes}. Give its smallest, usual and largest shape: "
            f"shapes={{{spec.name!r}: (({pattern}), ({pattern}), ({pattern}))}}"
            + (", or batch=(min, opt, max) if all of them are one batch" if self._may_be_a_batch(missing) else "")
        )

    def _may_be_a_batch(self, missing: Sequence[tuple[TensorSpec, int]]) -> bool:
        return not self._batched and len(missing) > 1 and all(axis == 0 for _, axis in missing)
