"""Commands that run an engine of a model folder in NVIDIA's own tools: plans are stored as TensorRT wrote them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import NamedTuple

from mlflow_trt.core.types import Distribution, EngineRecord, Shape, ShapeProfile
from mlflow_trt.store.record import Record


class ToolCommand(NamedTuple):
    """A tool, and the command line that gives it the engine."""

    tool: str
    command: str


def commands_for(record: Record, engine: EngineRecord, plan: str) -> list[ToolCommand]:
    """How to run the engine that lies at `plan`, with the usual shapes of its first optimization profile.

    TensorRT-RTX has a program of its own in place of trtexec, and Polygraphy takes it by an environment variable.
    """
    shapes = _usual_shapes(record.profiles)
    is_rtx = engine.distribution is Distribution.TENSORRT_RTX
    trtexec = ["tensorrt_rtx" if is_rtx else "trtexec", f"--loadEngine={plan}"]
    if shapes:
        trtexec.append(f"--shapes={','.join(f'{name}:{_dims(shape)}' for name, shape in shapes.items())}")
    polygraphy = ["polygraphy", "run", plan, "--model-type=engine", "--trt"]
    if shapes:
        polygraphy += ["--input-shapes", *(f"{name}:[{','.join(map(str, shape))}]" for name, shape in shapes.items())]
    before = "POLYGRAPHY_USE_TENSORRT_RTX=1 " if is_rtx else ""
    return [
        ToolCommand(trtexec[0], shlex.join(trtexec)),
        ToolCommand("Polygraphy", f"{before}{shlex.join(polygraphy)}"),
        ToolCommand("Nsight Systems", f"nsys profile --output=engine {shlex.join(trtexec)}"),
    ]


def _usual_shapes(profiles: Sequence[ShapeProfile]) -> dict[str, Shape]:
    """Without those of shape tensors, whose profiles have values instead."""
    ranges = profiles[0].ranges if profiles else {}
    return {name: limits.opt for name, limits in ranges.items() if not limits.is_values}


def _dims(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "1"
