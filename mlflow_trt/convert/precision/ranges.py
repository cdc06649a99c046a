"""How large the values inside a model become on sample inputs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from mlflow_trt.backends.onnxruntime_process import IsolatedModel
from mlflow_trt.convert.onnx.graph import FlatModel, positions_of
from mlflow_trt.convert.onnx.reference import brings_quantization
from mlflow_trt.convert.precision.calibration_cache import SavedRanges
from mlflow_trt.convert.precision.share import Share, share_of
from mlflow_trt.convert.samples import Samples
from mlflow_trt.core.arrays import Array, Feeds
from mlflow_trt.errors import ExecutionError

_PREFIX = "mlflow_trt_"
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_STEPS = ("wide", "magnitude", "is_finite", "finite", "largest", "is_not", "counted", "not_finite")
_WHERE_SINCE = 9
_AT_ONCE = 32
"""How many tensors are fetched from one run: they are all in memory together."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was seen. `largest` maps every float32 and float16 tensor to its largest finite magnitude on `samples`.

    `not_finite` counts the values that were NaN or infinite, of the tensors that had any. `positions` has the different
    values that floats computed from integers alone had. `cutoffs` has the magnitudes that a calibration method chose
    for some tensors, below which their values tell most. `share` tells how much of the arithmetic nodes do. `seen_on`
    are the samples that ranges come from and their sha256, where these are others: see CalibrationCache.
    """

    samples: Samples
    largest: Mapping[str, float]
    not_finite: Mapping[str, int]
    positions: Mapping[str, Array]
    share: Share
    cutoffs: Mapping[str, float] = field(default_factory=dict)
    seen_on: tuple[str, str] | None = None


@dataclass(frozen=True)
class _Range:
    """The largest finite magnitude of a tensor, and how many of its values are not finite."""

    largest: float = 0.0
    not_finite: int = 0

    @classmethod
    def of(cls, array: Array) -> _Range:
        magnitudes = np.abs(array)
        finite = magnitudes[np.isfinite(magnitudes)]
        return cls(float(finite.max()) if finite.size else 0.0, int(array.size - finite.size))

    def joined(self, other: _Range) -> _Range:
        return _Range(max(self.largest, other.largest), self.not_finite + other.not_finite)


def gather_evidence(model: FlatModel, samples: Samples, saved: SavedRanges | None = None) -> Evidence:
    """Run the model on all samples and note the range of every float tensor, constants included.

    With `saved` the ranges of what is computed are taken from there.

    Raises MissingDependencyError without ONNX Runtime, ExecutionError where it cannot run the model.
    """
    ranges = {name: _Range.of(array) for name, array in model.constants.items()}
    for name, seen in _seen(model, samples) if saved is None else _saved(saved):
        ranges[name] = ranges.get(name, _Range()).joined(seen)
    positions: dict[str, Array] = {}
    inside = Inside(model.proto, positions_of(model), model.folder / "positions.onnx")
    for feeds in samples.feeds:
        for name, values in inside.compute(feeds):
            positions[name] = np.union1d(positions.get(name, values), values)
    return Evidence(
        samples=samples,
        largest={name: seen.largest for name, seen in ranges.items()},
        not_finite={name: seen.not_finite for name, seen in ranges.items() if seen.not_finite},
        positions=positions,
        share=share_of(model, samples.feeds[0]),
        seen_on=None if saved is None else (saved.samples, saved.samples_sha256),
    )


def _seen(model: FlatModel, samples: Samples) -> Iterator[tuple[str, _Range]]:
    given = ((name, _Range.of(array)) for feeds in samples.feeds for name, array in feeds.items() if _is_float(array))
    yield from itertools.chain(given, _measured(model, measured_tensors(model), samples))


def _saved(saved: SavedRanges) -> Iterator[tuple[str, _Range]]:
    for name, largest in saved.largest.items():
        yield name, _Range(largest, saved.not_finite.get(name, 0))


def measured_tensors(model: FlatModel) -> list[str]:
    """The float tensors that the nodes of the graph compute."""
    return [name for name in computed_tensors(model.proto) if model.types.get(name) in _FLOATS]


def _is_float(array: Array) -> bool:
    return array.dtype in (np.float32, np.float16)


def computed_tensors(model: ModelProto) -> list[str]:
    """What the nodes of the graph compute, in their order."""
    return [name for node in model.graph.node for name in node.output if name]


class Inside:
    """Tensors inside a model, computed node by node; `path` is a file to use, beside its weights."""

    def __init__(self, model: ModelProto, names: Sequence[str], path: Path) -> None:
        self._model, self._names, self._path = model, names, path

    def compute(self, feeds: Feeds) -> Iterator[tuple[str, Array]]:
        """Their values for one feed, a few at a time. Raises ExecutionError where ONNX Runtime cannot run the model."""
        for start in range(0, len(self._names), _AT_ONCE):
            yield from self._runner.run(self._names[start : start + _AT_ONCE], feeds).items()

    @functools.cached_property
    def _runner(self) -> IsolatedModel:
        onnx.save_model(_with_outputs(self._model, self._names), self._path)
        return IsolatedModel(self._path, optimize=False)


def _measured(model: FlatModel, names: Sequence[str], samples: Samples) -> Iterator[tuple[str, _Range]]:
    path = model.folder / "ranges.onnx"
    outputs = [f"{_PREFIX}{what}_{number}" for number in range(len(names)) for what in ("largest", "not_finite")]
    runner = None
    if model.opset >= _WHERE_SINCE:
        onnx.save_model(_measuring(model, names), path)
        runner = IsolatedModel(path, optimize=not brings_quantization(model.proto))
    inside = Inside(model.proto, names, model.folder / "tensors.onnx")
    for feeds in samples.feeds:
        seen = None if runner is None else _try_run(runner, outputs, feeds)
        if seen is not None:
            for name, largest, count in zip(names, seen[::2], seen[1::2], strict=True):
                yield name, _Range(largest, int(count))
            continue
        # An empty tensor has no largest value: look at each tensor itself.
        yield from ((name, _Range.of(array)) for name, array in inside.compute(feeds))


def _try_run(runner: IsolatedModel, outputs: Sequence[str], feeds: Feeds) -> list[float] | None:
    try:
        return [float(number) for number in runner.run(outputs, feeds).values()]
    except ExecutionError:
        return None


def _measuring(model: FlatModel, names: Sequence[str]) -> ModelProto:
    """The model with the largest finite magnitude of each of these tensors as a further output, and what is not finite.

    Comparing with infinity is false for NaN; the maximum of an array that has one is whatever it happens to be.
    """
    measuring = _with_outputs(model.proto, [])
    graph = measuring.graph
    constants = {"infinity": np.array(np.inf, np.float32), "zero": np.zeros((), np.float32)}
    graph.initializer.extend(numpy_helper.from_array(array, f"{_PREFIX}{name}") for name, array in constants.items())
    for number, name in enumerate(names):
        made = {what: f"{_PREFIX}{what}_{number}" for what in _STEPS}
        source = name
        if model.types[name] != TensorProto.FLOAT:
            source = made["wide"]
            graph.node.append(helper.make_node("Cast", [name], [source], to=TensorProto.FLOAT))
        graph.node.extend(
            [
                helper.make_node("Abs", [source], [made["magnitude"]]),
                helper.make_node("Less", [made["magnitude"], f"{_PREFIX}infinity"], [made["is_finite"]]),
                helper.make_node("Where", [made["is_finite"], made["magnitude"], f"{_PREFIX}zero"], [made["finite"]]),
                helper.make_node("ReduceMax", [made["finite"]], [made["largest"]], keepdims=0),
                helper.make_node("Not", [made["is_finite"]], [made["is_not"]]),
                helper.make_node("Cast", [made["is_not"]], [made["counted"]], to=TensorProto.FLOAT),
                helper.make_node("ReduceSum", [made["counted"]], [made["not_finite"]], keepdims=0),
            ]
        )
        for output in ("largest", "not_finite"):
            graph.output.append(helper.make_tensor_value_info(made[output], TensorProto.FLOAT, []))
    return measuring


def _with_outputs(model: ModelProto, more: Sequence[str]) -> ModelProto:
    changed = ModelProto()
    changed.CopyFrom(model)
    present = {value.name for value in changed.graph.output}
    for name in more:
        if name not in present:
            changed.graph.output.append(helper.make_empty_tensor_value_info(name))
    return changed
