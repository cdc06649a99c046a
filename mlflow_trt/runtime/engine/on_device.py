"""Runs whose inputs and outputs stay on the GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlflow_trt.core.types import BatchAxis, TensorSpec
from mlflow_trt.errors import ExecutionError, InputError, InputShapeError
from mlflow_trt.runtime.batching.sizes import Piece, Sizes, check_row_shape, pieces
from mlflow_trt.runtime.cuda.device_array import DeviceArray, View, view
from mlflow_trt.runtime.engine.slot import EngineSlot


def views(slot: EngineSlot, inputs: Mapping[str, Any], specs: Sequence[TensorSpec]) -> dict[str, View]:
    """The inputs' memory. Raises InputError for a missing or unknown one, and what `view` raises."""
    names = [spec.name for spec in specs]
    wrong = [name for name in names if name not in inputs] or [name for name in inputs if name not in names]
    if wrong:
        raise InputError(f"input {wrong[0]!r} is missing or unknown; the model wants {', '.join(names)}",
                         tensor=wrong[0])  # fmt: skip
    if slot.engine.on_host:
        raise ExecutionError(f"TensorRT has {', '.join(sorted(slot.engine.on_host))} on the host: use `run`")
    found: dict[str, View] = {}
    try:
        for spec in specs:
            found[spec.name] = view(inputs[spec.name], spec, slot.engine.device, slot.stream)
    except BaseException:
        for taken in found.values():
            taken.release()
        raise
    return found


def run(
    slot: EngineSlot,
    given: Mapping[str, View],
    profile: int,
    axis: BatchAxis | None,
    sizes: Sizes | None,
) -> dict[str, DeviceArray]:
    """New arrays on the GPU. Without sizes the batch runs as it is."""
    if axis is None or sizes is None:
        axis, rows, cut = None, 0, [Piece(0, 0, 0)]
    else:
        counts = {given[name].shape[0] for name in axis.inputs}
        if len(counts) > 1:
            raise InputShapeError(f"the inputs {', '.join(axis.inputs)} have different numbers of rows: {counts}")
        (rows,) = counts
        if not rows:
            raise InputShapeError("a batch on the GPU needs at least one row")
        cut = list(pieces(rows, sizes))
    results: dict[str, DeviceArray] = {}
    for piece in cut:
        _load(slot, given, axis, piece, profile)
        slot.execute()
        context = slot.context
        shapes = slot.bindings.output_shapes(context) if context is not None else {}
        for name, shape in shapes.items():
            if axis is not None and (not shape or shape[0] != piece.size):
                raise InputShapeError(f"output {name!r} has the shape {shape} for {piece.size} rows of input")
            if name not in results:
                whole = shape if axis is None else (rows, *shape[1:])
                results[name] = DeviceArray(slot.engine.device, slot.engine.dtypes[name], whole)
            check_row_shape(name, shape, results[name].shape)
            row = slot.buffers.nbytes(name, shape if axis is None else shape[1:])
            first, count = (0, 1) if axis is None else (piece.start, piece.stop - piece.start)
            slot.stream.copy(slot.buffers.memory[name].address, results[name].address + first * row, count * row)
    slot.wait()
    return results


def _load(slot: EngineSlot, given: Mapping[str, View], axis: BatchAxis | None, piece: Piece, profile: int) -> None:
    """Copy the rows of a piece to where the contexts read them, and its last row again as padding."""
    batched = axis.inputs if axis else ()
    slot.profile = profile
    slot.shapes = {name: (piece.size, *one.shape[1:]) if name in batched else one.shape for name, one in given.items()}
    for name in slot.engine.inputs:
        source, shape = given[name].address, slot.shapes[name]
        target = slot.buffers.memory[name].reserve(slot.buffers.nbytes(name, shape))
        if name not in batched:
            slot.stream.copy(source, target, slot.buffers.nbytes(name, shape))
            continue
        row, rows = slot.buffers.nbytes(name, shape[1:]), piece.stop - piece.start
        slot.stream.copy(source + piece.start * row, target, rows * row)
        for padding in range(rows, piece.size):
            slot.stream.copy(source + (piece.stop - 1) * row, target + padding * row, row)
