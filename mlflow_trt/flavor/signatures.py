"""MLflow signatures for ONNX inputs and outputs.

MLflow enforces what a signature says of inputs, and how it does so loses values without an error: it casts 1.5 to 1 for
an integer, 300 to 44 for a uint8, makes a number of what is missing, reshapes images of another layout, and refuses
DataFrames whose index has no 0. So the signature that is derived says nothing of inputs unless it is asked to: the
model checks them itself, and the MLmodel file lists them with the flavor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema, TensorSpec
from mlflow.types.schema import Array

from mlflow_trt.core import types as spec
from mlflow_trt.core.types import BatchAxis, ShapeProfile

_COLUMN_TYPES = {
    "bool": DataType.boolean, "int8": DataType.integer, "uint8": DataType.integer, "int16": DataType.integer,
    "uint16": DataType.integer, "int32": DataType.integer, "uint32": DataType.long, "int64": DataType.long,
    "uint64": DataType.long, "float16": DataType.float, "bfloat16": DataType.float, "float32": DataType.float,
    "float64": DataType.double,
}  # fmt: skip


def output_signature(outputs: Sequence[spec.TensorSpec]) -> ModelSignature:
    """What comes back for a DataFrame: a column for each output, of numbers or of arrays.

    Unity Catalog wants outputs in a signature, and Spark makes types of them.
    """
    return ModelSignature(outputs=Schema([ColSpec(_column_type(tensor), tensor.name) for tensor in outputs]))


def _column_type(tensor: spec.TensorSpec) -> DataType | Array:
    kind: DataType | Array = _COLUMN_TYPES[tensor.dtype]
    if tensor.fixed[1:] == (1,):
        return kind
    for _ in tensor.shape[1:]:
        kind = Array(kind)
    return kind


def with_graph_names(
    signature: ModelSignature, inputs: Sequence[spec.TensorSpec], outputs: Sequence[spec.TensorSpec]
) -> ModelSignature | None:
    """A source model's signature, with the names that the graph has: callers and clients name tensors by it.

    A tensor with another name gets the graph's where the graph has one such tensor, and so does an output without one.
    An input without a name is left out: with one, MLflow would refuse every DataFrame whose columns are the rows of
    that input, which callers and `mlflow.models.evaluate` pass to such a source. Where names and graph cannot be
    brought together, inputs are left out, too, and outputs are derived. The model checks by itself what is left out.
    Columns of a table stay: that is how callers of such a model call it. None where nothing is left of the signature.
    """
    named = signature.inputs
    if named is not None and named.is_tensor_spec():
        named = _with_names(named, inputs) if named.has_input_names() else None
    answers = signature.outputs
    if answers is not None and answers.is_tensor_spec():
        answers = _with_names(answers, outputs) or output_signature(outputs).outputs
    if named is None and answers is None and signature.params is None:
        return None
    return ModelSignature(inputs=named, outputs=answers, params=signature.params)


def _with_names(schema: Schema, tensors: Sequence[spec.TensorSpec]) -> Schema | None:
    names = [tensor.name for tensor in tensors]
    if sorted(column.name or "" for column in schema.inputs) == sorted(names):
        return schema
    if len(names) != 1 or len(schema.inputs) != 1:
        return None
    (column,) = schema.inputs
    return (
        Schema([TensorSpec(np.dtype(column.type), column.shape, names[0])])
        if isinstance(column, TensorSpec)
        else schema
    )


def without_params(signature: ModelSignature) -> tuple[ModelSignature | None, tuple[str, ...]]:
    """A signature without the params that no model of this flavor can use, and their names.

    None where nothing is left of it. With params in it, MLflow would pass their defaults to every call.
    """
    if signature.params is None:
        return signature, ()
    names = tuple(param.name for param in signature.params.params)
    if signature.inputs is None and signature.outputs is None:
        return None, names
    return ModelSignature(inputs=signature.inputs, outputs=signature.outputs), names


def tensor_signature(
    inputs: Sequence[spec.TensorSpec],
    outputs: Sequence[spec.TensorSpec],
    profiles: Sequence[ShapeProfile],
    batch_axis: BatchAxis | None,
) -> ModelSignature:
    """A signature of named tensors, which MLflow enforces.

    A dimension that varies is -1, unless every profile fixes it to one size. The batch axis stays -1 even where it is
    fixed, since batches of other sizes are split and padded.
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
