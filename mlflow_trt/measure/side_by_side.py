"""Two models side by side: how far their outputs are apart, and how fast each is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlflow_trt.core.accuracy import Comparison, Tolerance
from mlflow_trt.core.accuracy import compare as compare_outputs
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.progress_event import BuildProgress
from mlflow_trt.core.types import Precision
from mlflow_trt.errors import InputShapeError
from mlflow_trt.measure.benchmark import Benchmark, Runnable, measure_runnable, open_runnable

_log = get_logger(__name__)
_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """`comparison` is of the second model's outputs against the first one's; `benchmark` has the times of both."""

    reference: str
    subject: str
    comparison: Comparison
    benchmark: Benchmark

    def to_dict(self) -> dict[str, Any]:
        comparison = asdict(self.comparison) | {
            "verdict": str(self.comparison.verdict),
            "problems": list(self.comparison.problems),
        }
        return {
            "reference": self.reference,
            "subject": self.subject,
            "comparison": comparison,
            **self.benchmark.to_dict(),
        }


def compare_models(
    reference_uri: str,
    subject_uri: str,
    *,
    batches: Sequence[int] = (1, 8),
    data: Any = None,
    tolerance: Tolerance | None = None,
    seconds: float = 1.0,
    device: int = 0,
    progress: Callable[[BuildProgress], None] | None = None,
) -> SideBySide:
    """Run both models on the same inputs and measure both.

    Args:
        reference_uri, subject_uri: models of this flavor, which run on TensorRT, or of one that it can be made from,
            which run on ONNX Runtime.
        batches, seconds, device, progress: as for `benchmark`.
        data: inputs by name, all of which are compared; else the second model's input example, else noise, which
            proves less.
        tolerance: what the second model may be off; None takes what is usual for its precision.

    Raises InputShapeError where the models do not have the same outputs.
    """
    problems: list[str] = []
    with open_runnable(reference_uri, device=device) as reference, open_runnable(subject_uri, device=device) as subject:
        models = (reference, subject)
        for model in models:
            if model.problem is not None:
                problems.append(model.problem)
                _log.warning("%s", model.problem)
        _report(progress, "comparing outputs", 0.0)
        comparison = _compare_rows(reference, subject, data, tolerance)
        rows = []
        for number, model in enumerate(models):
            _report(progress, f"measuring {model.name}", (number + 1) / 3)
            rows += measure_runnable(model, batches, data, seconds, problems=problems)
        descriptions = tuple(dict.fromkeys(model.session.description for model in models))
    benchmark = Benchmark(measurements=tuple(rows), runtimes=descriptions, problems=tuple(problems))
    return SideBySide(reference=reference.name, subject=subject.name, comparison=comparison, benchmark=benchmark)


def _compare_rows(reference: Runnable, subject: Runnable, data: Any, tolerance: Tolerance | None) -> Comparison:
    rows = _ROWS
    if data is not None:
        shape = np.shape(next(iter(data.values())) if isinstance(data, Mapping) else data)
        rows = shape[0] if shape else 1
    origin = "the given data" if data is not None else "the input example" if subject.example else "generated noise"
    (size,) = subject.sizes([rows])
    feeds = subject.inputs(size, data)
    precision = subject.record.recipe.precision if subject.record is not None else Precision.FP32
    expected = reference.session.run(feeds)
    try:
        return compare_outputs(
            subject.name,
            f"{size} rows of {origin}",
            [(subject.session.run(feeds), expected)],
            tolerance or Tolerance.default(precision),
            batch_axis=None if subject.record is None else subject.record.batch_axis,
        )
    except ValueError as error:
        raise InputShapeError(f"{subject.name} and {reference.name} cannot be compared: {error}") from error


def _report(progress: Callable[[BuildProgress], None] | None, phase: str, fraction: float) -> None:
    if progress is not None:
        progress(BuildProgress(phase=phase, fraction=fraction))
