"""Measurements of a slot, of the batch that was loaded into it last."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from mlflow_trt.runtime.engine.slot import EngineSlot


class Phases(NamedTuple):
    """Milliseconds on the GPU: copying the inputs there, running the engine, copying the outputs back."""

    copy_in: float
    engine: float
    copy_out: float


def replay(slot: EngineSlot) -> None:
    """Send the inputs once more, run, and fetch the outputs: a call without its copies in host memory."""
    with slot.engine.device.current():
        slot.start_again()
        slot.stream.synchronize()


def time_phases(slot: EngineSlot, runs: int) -> list[Phases]:
    """Of so many runs, after one that does not count."""
    _run(slot)
    times = []
    with slot.engine.device.current():
        events = [slot.engine.device.event() for _ in range(4)]
        for _ in range(runs):
            events[0].record(slot.stream)
            for name in slot.shapes:
                slot.upload(name)
            events[1].record(slot.stream)
            slot.execute()
            events[2].record(slot.stream)
            _download(slot)
            events[3].record(slot.stream)
            slot.stream.synchronize()
            times.append(Phases(*(later.milliseconds_since(e) for e, later in itertools.pairwise(events))))
        del events  # while the device is current, which pycuda wants
    return times


def time_layers(slot: EngineSlot, runs: int) -> dict[str, float]:
    """Mean milliseconds of each layer. TensorRT measures them without a CUDA graph, and slower than usual."""
    totals: dict[str, float] = {}

    def report(name: str, milliseconds: float) -> None:
        totals[name] = totals.get(name, 0.0) + milliseconds

    _run(slot)  # so that `layer_information` finds a context with these shapes
    profiler = slot.engine.tensorrt.profiler(report)
    with slot.engine.device.current():
        # Of its own, since a context cannot be told to stop profiling.
        context = slot.engine.new_context(cuda_graphs=False)
        slot.bindings.set_shapes(context, slot.profile, slot.shapes)
        slot.bindings.execute(context, slot.profile, slot.shapes)
        slot.stream.synchronize()
        context.raw.profiler = profiler
        for _ in range(runs):
            slot.bindings.execute(context, slot.profile, slot.shapes)
            slot.stream.synchronize()
        del context  # while the device is current
    return {name: total / runs for name, total in totals.items()}


def layer_information(slot: EngineSlot) -> str:
    """What TensorRT's engine inspector tells about the layers, as JSON."""
    with slot.engine.device.current():
        return slot.engine.layer_information(slot.context or slot.engine.new_context())


def _run(slot: EngineSlot) -> None:
    with slot.engine.device.current():
        slot.start_again()
    slot.finish()


def _download(slot: EngineSlot) -> None:
    if slot.context is not None:
        for name, shape in slot.bindings.output_shapes(slot.context).items():
            slot.download(name, shape)
