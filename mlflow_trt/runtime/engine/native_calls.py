"""The batcher in C for an engine, where its calls can go around Python."""

from __future__ import annotations

from mlflow_trt.core import nvtx
from mlflow_trt.core.arrays import numpy_dtype
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.types import BatchAxis
from mlflow_trt.errors import ExecutionError
from mlflow_trt.runtime import native
from mlflow_trt.runtime.batching.native_batches import NativeBatches
from mlflow_trt.runtime.batching.slots import Slots
from mlflow_trt.runtime.engine import slot
from mlflow_trt.runtime.engine.engine import Engine
from mlflow_trt.runtime.engine.slot import EngineSlot

_MOST_TENSORS = 64  # as the extension has it
_log = get_logger(__name__)


def native_batches(
    engine: Engine, max_batch_delay: float, slots: Slots[EngineSlot], axis: BatchAxis
) -> NativeBatches[EngineSlot] | None:
    """None without the extension, and where no call can be a graph, some input has no rows, or phases are marked."""
    if (
        native.extension is None
        or nvtx.wanted
        or not engine.uses_cuda_graphs
        or set(axis.inputs) != set(engine.inputs)
        or len(engine.inputs) + len(engine.outputs) > _MOST_TENSORS
    ):
        return None
    try:
        points = engine.device.entry_points()
    except (ExecutionError, AttributeError) as error:  # a driver that lacks one of them
        _log.warning("Calls go through Python: %s", error)
        return None
    batcher = native.extension.Batcher(
        len(engine.inputs), len(engine.outputs), max_batch_delay,
        points.push, points.pop, points.upload, points.launch, points.synchronize, points.context,
    )  # fmt: skip
    outputs = {name: numpy_dtype(engine.dtypes[name]) for name in engine.outputs}
    return NativeBatches(
        slots, axis, batcher, inputs=engine.inputs, outputs=outputs, graph_bytes=slot.GRAPH_INPUT_BYTES, keep=points
    )
