"""Two models side by side: how far their outputs are apart, and how fast each is."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow_trt.convert.samples import SampleOrigin
from mlflow_trt.core.accuracy import Comparison, Tolerance
from mlflow_trt.core.arrays import Feeds
from mlflow_trt.core.comparing import compare as compare_outputs
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.progress_event import BuildProgress
from mlflow_trt.core.types import BatchAxis, Precision
from mlflow_trt.errors import InputShapeError
from mlflow_trt.measure.benchmark import Benchmark, Steps, describe_settings, measure_runnables
from mlflow_trt.measure.inputs import rows_of
from mlflow_trt.measure.machine import describe_machine
from mlflow_trt.measure.runnable import Runnable, open_runnable

_log = get_logger(__name__)
_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """Two models, compared and measured.

    Attributes:
        reference: the URI of the first model.
        subject: the URI of the second.
        compared: what of each was run: an engine and the GPU, or what stands in for it where there is none.
        comparison: of the second model's outputs against the first one's.
        benchmark: the times of both.
    """

    reference: str
    subject: str
    compared: tuple[str, str]
    comparison: Comparison
    benchmark: Benchmark

    def to_dict(self) -> dict[str, Any]:
        return {
            "reference": self.reference,
            "subject": self.subject,
            "comparison": {**self.comparison.to_dict(), "compared": list(self.compared)},
            **self.benchmark.to_dict(),
        }


def compare_models(
    reference_uri: str | os.PathLike[str],
    subject_uri: str | os.PathLike[str],
    *,
    batches: Sequence[int] = (1, 8),
    data: Any = None,
    tolerance: Tolerance | None = None,
    seconds: float = 1.0,
    device: int = 0,
    progress: Callable[[BuildProgress], None] | None = None,
) -> SideBySide:
    """Run both models on the same inputs and measure both.

    Without a GPU the typed model of a model of this flavor is compared in place of its engine, emulated as when it was
    logged, and its speed is not measured; `problems` of the benchmark says so. Where both sides come to the same file
    on the same runtime, nothing is compared, and the verdict is that.

    Args:
        reference_uri: a model of this flavor, which runs on TensorRT, or of one that it can be made from, which runs on
            ONNX Runtime.
        subject_uri: another one.
        batches: how many rows at once, 1 or more each.
        data: inputs, in any form that `benchmark` takes, all of which are compared; else the second model's input
            example, else noise, which proves less.
        tolerance: what the second model may be off; None takes what is usual for its precision.
        seconds: how long each row of the table is measured, after a warm-up.
        device: CUDA device ordinal.
        progress: called before each measurement.

    Returns:
        How far the outputs are apart, with a verdict, and the latencies of both in milliseconds.

    Raises:
        InputError: the data does not fit the second model.
        InputShapeError: the models do not have the same outputs.
        ArtifactError: one of them is no model that can be run.
    """
    problems: list[str] = []
    with (
        open_runnable(os.fspath(reference_uri), device=device, emulates=True) as reference,
        open_runnable(os.fspath(subject_uri), device=device, emulates=True) as subject,
    ):
        models = (reference, subject)
        for model in models:
            if model.problem is not None:
                problems.append(f"{model.problem}. In its place, {model.session.description} is compared")
                _log.warning("%s", problems[-1])
        given = subject.given(data)
        _report(progress, "comparing outputs", 0.0)
        comparison = _compare_rows(reference, subject, given, tolerance, is_example=data is None)
        timed = [model for model in models if model.is_timed]
        rows = measure_runnables(timed, batches, given, seconds, Steps(progress, len(batches)), problems)
        descriptions = tuple(dict.fromkeys(model.session.description for model in timed))
    benchmark = Benchmark(
        measurements=tuple(rows),
        runtimes=descriptions,
        problems=tuple(problems),
        machine=describe_machine(),
        settings=describe_settings(batches, seconds, data),
    )
    return SideBySide(
        reference=reference.name,
        subject=subject.name,
        compared=(reference.session.description, subject.session.description),
        comparison=comparison,
        benchmark=benchmark,
    )


def _compare_rows(
    reference: Runnable, subject: Runnable, given: Feeds | None, tolerance: Tolerance | None, *, is_example: bool
) -> Comparison:
    precision = subject.record.recipe.precision if subject.record is not None else Precision.FP32
    tolerance = tolerance or Tolerance.default(precision)
    if (reason := _why_nothing(reference, subject)) is not None:
        return Comparison.of_nothing(subject.name, reason, tolerance)
    rows, origin = _ROWS, SampleOrigin.GENERATED
    if given is not None:
        rows = _ROWS if is_example else rows_of(given, subject.batch_axis)
        origin = SampleOrigin.INPUT_EXAMPLE if is_example else SampleOrigin.GIVEN_DATA
    (size,) = subject.sizes([rows])
    feeds = subject.inputs(size, given)
    expected = reference.session.run(feeds)
    try:
        return compare_outputs(
            subject.name,
            f"{size} rows of {origin}",
            [(subject.session.run(feeds), expected)],
            tolerance,
            batch_axis=_batch_axis_of(subject, reference),
        )
    except ValueError as error:
        raise InputShapeError(f"{subject.name} and {reference.name} cannot be compared: {error}") from error


def _batch_axis_of(*models: Runnable) -> BatchAxis | None:
    """The one that a model's record tells: an ONNX file alone does not say that its rows are independent."""
    return next((model.record.batch_axis for model in models if model.record is not None), None)


def _why_nothing(reference: Runnable, subject: Runnable) -> str | None:
    """Why a comparison would be one of something with itself; None where it would not."""
    is_same = reference.digest and reference.digest == subject.digest
    if not is_same or reference.session.description != subject.session.description:
        return None
    return f"both are the same file (sha256 {subject.digest[:12]}) on {subject.session.description}"


def _report(progress: Callable[[BuildProgress], None] | None, phase: str, fraction: float) -> None:
    if progress is not None:
        progress(BuildProgress(phase=phase, fraction=fraction))
