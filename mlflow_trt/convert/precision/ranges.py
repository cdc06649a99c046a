"""How large the values inside a model become on sample inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, helper

from mlflow_trt.backends.onnxruntime import CpuModel
from mlflow_trt.convert.onnx.graph import FlatModel, positions_of, save
from mlflow_trt.convert.samples import Samples
from mlflow_trt.core.arrays import Array, Feeds
from mlflow_trt.errors import ExecutionError

_PREFIX = "mlflow_trt_"
_AT_ONCE = 32
"""How many tensors are fetched from one run: they are all in memory together."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was seen. `largest` maps every float32 tensor to its largest magnitude on `samples`.

    `positions` has the different values that floats computed from integers alone had. `cutoffs` has
    the magnitudes that a calibration method chose for some tensors, below which their values tell most.
    """

    samples: Samples
    largest: Mapping[str, float]
    positions: Mapping[str, Array]
    cutoffs: Mapping[str, float] = field(default_factory=dict)


def gather_evidence(model: FlatModel, samples: Samples, workdir: Path) -> Evidence:
    """Run the model on all samples and note the largest magnitude of every float32 tensor, constants included.

    Raises MissingDependencyError without ONNX Runtime, ExecutionError where it cannot run the model.
    """
    largest = {name: _magnitude(array) for name, array in model.constants.items()}
    floats = {spec for feeds in samples.feeds for spec in feeds if feeds[spec].dtype == np.float32}
    for name in floats:
        largest[name] = max(_magnitude(feeds[name]) for feeds in samples.feeds)
    computed = [name for name in computed_tensors(model.proto) if model.is_float32(name)]
    for name, seen in _measured(model.proto, computed, samples, workdir):
        largest[name] = max(largest.get(name, 0.0), seen)
    positions: dict[str, Array] = {}
    for feeds in samples.feeds:
        for name, values in fetch(model.proto, positions_of(model), feeds, workdir / "positions.onnx"):
            positions[name] = np.union1d(positions.get(name, values), values)
    return Evidence(samples=samples, largest=largest, positions=positions)


def computed_tensors(model: ModelProto) -> list[str]:
    """What the nodes of the graph compute, in their order."""
    return [name for node in model.graph.node for name in node.output if name]


def fetch(model: ModelProto, names: Sequence[str], feeds: Feeds, path: Path) -> Iterator[tuple[str, Array]]:
    """Tensors inside a model, for one feed, computed node by node; `path` is a file to use for it."""
    if not names:
        return
    exposed = _with_outputs(model, names)
    save(exposed, path)
    runner = CpuModel(path, optimize=False)
    for start in range(0, len(names), _AT_ONCE):
        yield from runner.run(names[start : start + _AT_ONCE], feeds).items()


def _measured(model: ModelProto, names: Sequence[str], samples: Samples, workdir: Path) -> Iterator[tuple[str, float]]:
    path = workdir / "ranges.onnx"
    save(_measuring(model, names), path)
    outputs = [f"{_PREFIX}largest_{number}" for number in range(len(names))]
    runner = CpuModel(path)
    for feeds in samples.feeds:
        try:
            seen = runner.run(outputs, feeds)
            yield from ((name, float(seen[output])) for name, output in zip(names, outputs, strict=True))
        except ExecutionError:
            # An empty tensor has no largest value: look at each tensor itself.
            tensors = fetch(model, names, feeds, workdir / "tensors.onnx")
            yield from ((name, _magnitude(array)) for name, array in tensors)


def _measuring(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """The model with the largest magnitude of each of these tensors as a further output."""
    measuring = _with_outputs(model, [])
    for number, name in enumerate(names):
        magnitude, largest = f"{_PREFIX}magnitude_{number}", f"{_PREFIX}largest_{number}"
        measuring.graph.node.append(helper.make_node("Abs", [name], [magnitude]))
        measuring.graph.node.append(helper.make_node("ReduceMax", [magnitude], [largest], keepdims=0))
        measuring.graph.output.append(helper.make_tensor_value_info(largest, TensorProto.FLOAT, []))
    return measuring


def _with_outputs(model: ModelProto, more: Sequence[str]) -> ModelProto:
    changed = ModelProto()
    changed.CopyFrom(model)
    present = {value.name for value in changed.graph.output}
    for name in more:
        if name not in present:
            changed.graph.output.append(helper.make_empty_tensor_value_info(name))
    return changed


def _magnitude(array: Array) -> float:
    """The largest magnitude; infinity where there is anything that is no number."""
    if not array.size:
        return 0.0
    largest = float(np.abs(array).max())
    return float("inf") if np.isnan(largest) else largest
