"""What a typed model has to compute."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlflow_trt.backends.onnxruntime_process import IsolatedModel
from mlflow_trt.convert.onnx.model import OnnxModel
from mlflow_trt.convert.onnx.reference import reference_outputs
from mlflow_trt.convert.samples import Samples
from mlflow_trt.core.accuracy import Comparison, Tolerance
from mlflow_trt.core.arrays import Feeds, Outputs, take_rows
from mlflow_trt.core.comparing import compare
from mlflow_trt.core.types import BatchAxis

_Pair = tuple[Feeds, Outputs]
"""Inputs, and what the source model makes of them."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The outputs of the source model on the samples, as many as there is room for, all by ONNX Runtime.

    `samples` are as a typed model takes them.
    """

    names: Sequence[str]
    samples: Samples
    outputs: tuple[Outputs, ...]

    @classmethod
    def of(cls, source: OnnxModel, samples: Samples) -> Reference:
        """Raises what running it raises: MissingDependencyError, ExecutionError, InputError."""
        return cls(
            names=[spec.name for spec in source.outputs],
            samples=samples.narrowed(),
            outputs=reference_outputs(source, samples.feeds),
        )

    def compare(
        self,
        subject: str,
        path: Path,
        tolerance: Tolerance,
        *,
        batch_axis: BatchAxis | None = None,
        most: int | None = None,
        optimize: bool = False,
    ) -> Comparison:
        """How far the model at `path` is off, on `most` of the samples. Raises ExecutionError where it does not run."""
        runner = IsolatedModel(path, optimize=optimize)
        pairs = itertools.islice(zip(self.samples.feeds, self.outputs, strict=False), most)
        return compare(
            subject,
            str(self.samples),
            ((runner.run(self.names, feeds), expected) for feeds, expected in pairs),
            tolerance,
            batch_axis=batch_axis,
        )

    def halves(self, batch_axis: BatchAxis | None) -> tuple[Reference, Reference] | None:
        """Every second row and the others, or samples where those have only one; None where there is a single one."""
        whole: list[_Pair] = []
        halves: tuple[list[_Pair], list[_Pair]] = [], []
        for feeds, outputs in zip(self.samples.feeds, self.outputs, strict=False):
            if batch_axis is None or not _has_rows(feeds, outputs, batch_axis):
                whole.append((feeds, outputs))
                continue
            for start, half in enumerate(halves):
                half.append(_every_second_row(feeds, outputs, batch_axis, start))
        for start, half in enumerate(halves):
            half.extend(whole[start::2])
        first, second = halves
        return (self._on(first), self._on(second)) if second else None

    def _on(self, pairs: Sequence[_Pair]) -> Reference:
        feeds = tuple(one for one, _ in pairs)
        samples = replace(self.samples, feeds=feeds, rows=self.samples.rows // 2)
        return replace(self, samples=samples, outputs=tuple(expected for _, expected in pairs))


def _has_rows(feeds: Feeds, outputs: Outputs, axis: BatchAxis) -> bool:
    """Whether there are several, and every output has them: what a model declares of its outputs may be wrong."""
    rows = len(feeds[axis.inputs[0]])
    return axis.splits and rows > 1 and all(array.shape[:1] == (rows,) for array in outputs.values())


def _every_second_row(feeds: Feeds, outputs: Outputs, axis: BatchAxis, start: int) -> _Pair:
    half = slice(start, None, 2)
    return take_rows(feeds, axis, half), {name: array[half] for name, array in outputs.items()}
