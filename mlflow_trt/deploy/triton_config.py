"""What Triton Inference Server is told of a model: its config.pbtxt, from the record.

The fields are those of Triton's model_config.proto. Shapes in it have no batch axis where `max_batch_size` is not 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlflow_trt.core.types import InputRange, ShapeProfile, TensorSpec
from mlflow_trt.errors import UnsupportedModelError
from mlflow_trt.store.record import Record

_TYPES = {
    "bool": "TYPE_BOOL", "uint8": "TYPE_UINT8", "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32",
    "int64": "TYPE_INT64", "float16": "TYPE_FP16", "float32": "TYPE_FP32", "float64": "TYPE_FP64",
    "bfloat16": "TYPE_BF16",
}  # fmt: skip
_FLOATS = {"float16", "float32", "float64"}

Fields = dict[str, Any]


class Symbol(str):
    """A name of an enumeration, which stands in the text without quotes."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model lies in the repository, and how Triton is to run it.

    Args:
        name: of the model, and of its folder.
        backend: `tensorrt` or `onnxruntime`.
        default_file: in the version's folder: what a GPU gets that is not in `files_by_capability`.
        files_by_capability: engines by compute capability, written like `8.6`.
        instances: how many requests may run at the same time, on each GPU.
        queue_delay: microseconds for which a request may wait for others.
    """

    name: str
    backend: str
    default_file: str
    files_by_capability: Mapping[str, str] = field(default_factory=dict)
    instances: int = 1
    queue_delay: int = 0


def max_batch_size(record: Record, backend: str) -> int:
    """The largest batch that Triton may put together, or 0 where it must leave requests as they are.

    It can put together what has rows on axis 0 of every input and output, from a single row on: Triton does not pad.
    It does so without a look at the profiles of an engine, so there must be one for each batch up to this, whatever
    the other dimensions are.
    """
    axis = record.batch_axis
    if axis is None or not axis.splits or {spec.name for spec in record.inputs} != set(axis.inputs):
        return 0
    if any(spec.fixed[:1] != (None,) for spec in (*record.inputs, *record.outputs)):
        return 0
    if backend == "tensorrt":
        return min((_rows_from_1_on(profile, record.profiles) for profile in record.profiles), default=0)
    return largest_batch(record)


def largest_batch(record: Record) -> int:
    """What any of the profiles takes; 0 without profiles."""
    return max((rows for profile in record.profiles for rows in _largest(profile)), default=0)


def _rows_from_1_on(profile: ShapeProfile, profiles: Sequence[ShapeProfile]) -> int:
    """How many rows of the shapes of `profile` there may be, if each smaller number must fit one of `profiles`, too."""
    rows = 0
    for smallest, largest in sorted(_limits_of_rows(other) for other in profiles if _takes_rows_of(other, profile)):
        if smallest <= rows + 1:
            rows = max(rows, largest)
    return rows


def _limits_of_rows(profile: ShapeProfile) -> tuple[int, int]:
    return max(limits.min[0] for limits in profile.ranges.values()), min(_largest(profile))


def _takes_rows_of(profile: ShapeProfile, other: ShapeProfile) -> bool:
    return all(
        limits.row.contains(shape[1:])
        for name, limits in profile.ranges.items()
        for shape in (other.ranges[name].min, other.ranges[name].max)
    )


def config_text(record: Record, layout: Layout) -> str:
    """The config.pbtxt. Raises UnsupportedModelError for a type or a shape that Triton does not have."""
    batch = max_batch_size(record, layout.backend)
    shape_tensors = {name for profile in record.profiles for name, limits in profile.ranges.items() if limits.is_values}
    tensorrt = layout.backend == "tensorrt"
    scalar = next((spec for spec in (*record.inputs, *record.outputs) if not spec.shape), None)
    if tensorrt and scalar is not None:
        raise UnsupportedModelError(
            f"{scalar.name!r} has no dimensions, which Triton has for ONNX Runtime only: give it one in the model, or "
            "take backend='onnxruntime'"
        )
    fields: Fields = {
        "name": layout.name,
        "backend": layout.backend,
        "max_batch_size": batch,
        "default_model_filename": layout.default_file,
        "cc_model_filenames": [{"key": key, "value": file} for key, file in layout.files_by_capability.items()],
        "input": [
            tensor_fields(spec, batch, is_shape=tensorrt and spec.name in shape_tensors) for spec in record.inputs
        ],
        "output": [tensor_fields(spec, batch) for spec in record.outputs],
        "instance_group": [_instances(record, layout)],
        "model_warmup": list(_warmups(record, batch)),
    }
    if batch > 1:
        fields["dynamic_batching"] = {
            "preferred_batch_size": _preferred(record, batch),
            "max_queue_delay_microseconds": layout.queue_delay,
        }
    return to_text(fields)


def warmup_files(record: Record) -> dict[str, bytes]:
    """What the warm-up reads, by name of file: the values of shape tensors, which cannot be anything."""
    return {
        _values_file(index, spec): _values(spec, profile.ranges[spec.name])
        for index, profile in enumerate(record.profiles)
        for spec in record.inputs
        if spec.name in profile.ranges and profile.ranges[spec.name].is_values
    }


def tensor_fields(spec: TensorSpec, batch: int, *, is_shape: bool = False) -> Fields:
    """An input or output, without its batch axis where Triton puts together a `batch` of more than 0."""
    dims = [-1 if size is None else size for size in spec.fixed[1 if batch else 0 :]]
    fields: Fields = {"name": spec.name, "data_type": _type(spec), "dims": dims or [1]}
    if batch and not dims:  # Triton has no tensors without dimensions, and no empty reshape without batches
        fields["reshape"] = {"shape": []}
    if is_shape:
        fields["is_shape_tensor"] = True
    return fields


def _type(spec: TensorSpec) -> Symbol:
    if spec.dtype not in _TYPES:
        raise UnsupportedModelError(
            f"{spec.name!r} is of dtype {spec.dtype}, which Triton does not have; cast it in the model"
        )
    return Symbol(_TYPES[spec.dtype])


def _instances(record: Record, layout: Layout) -> Fields:
    if layout.backend != "tensorrt":
        return {"count": layout.instances, "kind": Symbol("KIND_AUTO")}
    fields: Fields = {"count": layout.instances, "kind": Symbol("KIND_GPU")}
    if len(record.profiles) > 1:
        fields["profile"] = [str(index) for index in range(len(record.profiles))]
    return fields


def _preferred(record: Record, batch: int) -> list[int]:
    """What the engine was optimized for, and the most it takes."""
    usual = {limits.opt[0] for profile in record.profiles for limits in profile.ranges.values()}
    return sorted(size for size in {*usual, batch} if 1 < size <= batch)


def _warmups(record: Record, batch: int) -> Iterator[Fields]:
    """A request of the usual and of the largest batch of each profile: no caller waits for what is done once."""
    for index, profile in enumerate(record.profiles or (ShapeProfile(ranges={}),)):
        usual = {limits.opt[0] for limits in profile.ranges.values()}
        rows = {min(size, batch) for size in usual | _largest(profile)} if batch else {1}
        for size in sorted(rows):
            yield {
                "name": f"profile {index}, batch {size}" if batch else f"profile {index}",
                "batch_size": size,
                "inputs": [
                    {"key": spec.name, "value": _warmup_input(spec, index, profile, batch)} for spec in record.inputs
                ],
            }


def _largest(profile: ShapeProfile) -> set[int]:
    return {limits.max[0] for limits in profile.ranges.values()}


def _warmup_input(spec: TensorSpec, index: int, profile: ShapeProfile, batch: int) -> Fields:
    limits = profile.ranges.get(spec.name)
    if limits is not None and limits.is_values:
        dims = [size or 1 for size in spec.fixed]
        return {"data_type": _type(spec), "dims": dims or [1], "input_data_file": _values_file(index, spec)}
    shape = list(limits.opt) if limits is not None else [size or 1 for size in spec.fixed]
    # Zeros are valid where numbers index something.
    data = {"random_data": True} if spec.dtype in _FLOATS else {"zero_data": True}
    return {"data_type": _type(spec), "dims": shape[1 if batch else 0 :] or [1], **data}


def _values_file(index: int, spec: TensorSpec) -> str:
    return f"profile-{index}-{spec.name.replace('/', '_')}"


def _values(spec: TensorSpec, limits: InputRange) -> bytes:
    import numpy as np

    return np.asarray(limits.opt[: math.prod(size or 1 for size in spec.fixed)], spec.dtype).tobytes()


def to_text(fields: Fields) -> str:
    """Fields as the text of a config.pbtxt."""
    return "\n".join(_lines(fields)) + "\n"


def _lines(fields: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Fields in protobuf's text format; a list stands for a repeated field."""
    for name, value in fields.items():
        for one in value if isinstance(value, list) and value and isinstance(value[0], Mapping) else [value]:
            if isinstance(one, Mapping):
                yield f"{indent}{name} {{"
                yield from _lines(one, indent + "  ")
                yield f"{indent}}}"
            elif one != [] or name == "shape":
                yield f"{indent}{name}: {_scalar(one)}"


def _scalar(value: Any) -> str:
    if isinstance(value, Symbol):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
