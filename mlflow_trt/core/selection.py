"""Which of several precisions is the best: what was found out about each, and the rule that chooses.

1. Only engines that passed the accuracy gate can win.
2. The fastest is the one whose median over all rounds is lowest.
3. Another is as fast if it takes longer by no more than the noise: by 2 %, or, where that is more, by the interquartile
   range of the ratio of the two, round by round. All candidates run in every round, so that what slows the whole
   machine down does not count.
4. Of those that are as fast, the one with the smallest relative error wins; of equals, the wider number format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mlflow_trt.core.types import Precision, Shape, StrEnum

NOISE = 0.02
"""The share of a latency that counts as noise even on the quietest of machines."""

CANDIDATES = (Precision.FP32, Precision.TF32, Precision.FP16, Precision.BF16, Precision.INT8, Precision.FP8)
"""What `best` tries, the widest number format first."""


class Fate(StrEnum):
    """What became of a candidate. `PASSED` the accuracy gate, and is not chosen from yet."""

    PASSED = "passed"
    WON = "won"
    SLOWER = "slower"
    LESS_ACCURATE = "less accurate"
    FAILED_GATE = "failed the gate"
    NOT_BUILT = "not built"
    NOT_RUN = "not run"
    LEFT_OUT = "left out"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One precision. Errors are relative, against the source model, and None where nothing was compared.

    `typed_error` is that of the typed model on ONNX Runtime, 0 where this is the source model's own graph;
    `engine_error` is that of the engine. `milliseconds` has, for each round, the median time of a run of the engine
    alone; it is empty where nothing could be measured. `reason` says why it won or lost.
    """

    precision: Precision
    fate: Fate
    reason: str = ""
    typed_error: float | None = None
    engine_error: float | None = None
    milliseconds: tuple[float, ...] = ()
    engine_bytes: int | None = None

    @property
    def relative_error(self) -> float | None:
        """That of the engine, or where it was not compared that of the typed model."""
        return self.typed_error if self.engine_error is None else self.engine_error

    @property
    def latency(self) -> float | None:
        """Milliseconds: the median over the rounds."""
        return float(np.median(self.milliseconds)) if self.milliseconds else None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How `best` was decided: the winner, why, on which GPU, with which shapes, and every candidate."""

    asked: Precision = Precision.BEST
    winner: Precision
    reason: str
    measured_on: str
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    candidates: tuple[Candidate, ...]

    @property
    def headings(self) -> tuple[str, ...]:
        return ("precision", "", "latency, ms", "relative error", "engine, MB", "why")

    def rows(self) -> list[tuple[str, ...]]:
        """A table of the candidates, as text."""
        return [table_row(candidate) for candidate in self.candidates]

    def metrics(self) -> dict[str, float]:
        """The numbers as MLflow metrics."""
        found: dict[str, float] = {}
        for candidate in self.candidates:
            prefix = f"mlflow_trt/candidates/{candidate.precision}"
            values = {"latency_ms": candidate.latency, "relative_error": candidate.relative_error}
            found |= {f"{prefix}/{name}": value for name, value in values.items() if value is not None}
        return found


def table_row(candidate: Candidate) -> tuple[str, ...]:
    """The cells under `Selection.headings`."""
    latency, error = candidate.latency, candidate.relative_error
    return (
        str(candidate.precision),
        str(candidate.fate),
        "" if latency is None else f"{latency:.4g}",
        "" if error is None else f"{error:.2e}",
        "" if candidate.engine_bytes is None else f"{candidate.engine_bytes / 1e6:.3g}",
        candidate.reason,
    )


def choose(candidates: Sequence[Candidate]) -> tuple[tuple[Candidate, ...], Candidate] | None:
    """The candidates with what became of them, and the winner of those that `PASSED`; None where none did."""
    passed = [candidate for candidate in candidates if candidate.fate is Fate.PASSED and candidate.milliseconds]
    if not passed:
        return None
    fastest = min(passed, key=_latency)
    tied = [candidate for candidate in passed if is_as_fast(candidate, fastest)]
    winner = min(tied, key=lambda candidate: (_error(candidate), CANDIDATES.index(candidate.precision)))
    judged = []
    for candidate in candidates:
        fate, reason = candidate.fate, candidate.reason
        if candidate is winner:
            fate, reason = Fate.WON, _why_it_won(winner, fastest, tied, passed)
        elif candidate in tied:
            fate = Fate.LESS_ACCURATE
            reason = (
                f"as fast as {winner.precision} within the noise, and no more accurate: {_errors(candidate, winner)}"
            )
        elif candidate in passed:
            fate, reason = Fate.SLOWER, _times(candidate, fastest)
        judged.append(replace(candidate, fate=fate, reason=reason))
    return tuple(judged), next(candidate for candidate in judged if candidate.fate is Fate.WON)


def is_as_fast(candidate: Candidate, fastest: Candidate) -> bool:
    """Whether the fastest is faster by no more than the noise, see rule 3."""
    if candidate is fastest:
        return True
    ratios = np.divide(candidate.milliseconds, fastest.milliseconds)
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    return bool(middle - 1 <= max(NOISE, high - low))


def _why_it_won(winner: Candidate, fastest: Candidate, tied: Sequence[Candidate], passed: Sequence[Candidate]) -> str:
    time = f"{_latency(winner):.4g} ms"
    if len(passed) == 1:
        return f"the only one that passed, at {time}"
    if winner is not fastest:
        return (
            f"as fast as {fastest.precision} within the noise, {_times(winner, fastest)}, and at least as accurate: "
            f"{_errors(winner, fastest)}"
        )
    if len(tied) > 1:
        others = ", ".join(str(candidate.precision) for candidate in tied if candidate is not winner)
        return f"the fastest at {time}, and at least as accurate as {others}, as fast within the noise"
    second = min((candidate for candidate in passed if candidate is not winner), key=_latency)
    return f"the fastest: {_times(winner, second)}"


def _times(candidate: Candidate, other: Candidate) -> str:
    return f"{_latency(candidate):.4g} ms against {_latency(other):.4g} ms of {other.precision}"


def _errors(candidate: Candidate, other: Candidate) -> str:
    return f"relative error {_error(candidate):.2e} against {_error(other):.2e} of {other.precision}"


def _latency(candidate: Candidate) -> float:
    return float(np.median(candidate.milliseconds))


def _error(candidate: Candidate) -> float:
    error = candidate.relative_error
    return float("inf") if error is None else error
