"""Tell dimension names apart that collide.

TensorRT takes two axes of one name for axes of one size. Some exporters write the same name (`?`, say) for every
unknown axis; then the build fails with "Input dimensions with this name have different constant values or have
contradictory ... constraints", or the engine refuses inputs that the model accepts.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

from onnx import ModelProto

from mlflow_trt.core.types import ShapeProfile, is_placeholder

_Axis = tuple[str, int]


def name_dimensions_apart(model: ModelProto, profiles: Sequence[ShapeProfile]) -> ModelProto:
    """Return `model`, or a copy in which the input axes with colliding names have names of their own.

    1. A name without a letter or digit means nothing: each of several axes that carry it gets its own name.
    2. A name whose axes have different ranges in some profile means different things: likewise.
    3. Elsewhere in the graph a name that was told apart is removed, since it can no longer be said which is meant.
    """
    colliding = _colliding_names(model, profiles)
    if not colliding:
        return model
    renamed = ModelProto()
    renamed.CopyFrom(model)
    graph = renamed.graph
    for value in graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param in colliding:
                dim.dim_param = f"{value.name}_axis_{axis}"
    for value in (*graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in colliding:
                dim.ClearField("dim_param")
    return renamed


def _colliding_names(model: ModelProto, profiles: Sequence[ShapeProfile]) -> set[str]:
    axes: dict[str, list[_Axis]] = collections.defaultdict(list)
    for value in model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                axes[dim.dim_param].append((value.name, axis))
    return {
        name
        for name, places in axes.items()
        if len(places) > 1 and (is_placeholder(name) or any(_differ(profile, places) for profile in profiles))
    }


def _differ(profile: ShapeProfile, places: Sequence[_Axis]) -> bool:
    limits = {
        (given.min[axis], given.opt[axis], given.max[axis])
        for name, axis in places
        if (given := profile.ranges.get(name)) is not None and not given.is_values
    }
    return len(limits) > 1
