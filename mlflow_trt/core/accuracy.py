"""How far outputs are from a reference: the numbers, what is tolerated, and the verdict. `comparing` measures them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mlflow_trt.core.types import Precision, StrEnum
from mlflow_trt.errors import OptionError


class Verdict(StrEnum):
    """`INCONCLUSIVE`: nothing is wrong, but a reference that hardly varies, or is not finite, proves nothing either.

    `NOTHING_COMPARED`: both sides would have been the same bytes on the same runtime.
    """

    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"
    NOTHING_COMPARED = "nothing was compared"


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What a model may be off from its source model, each output by itself. None leaves a measure out.

    Whatever is tolerated: an output fails that is NaN or infinite where the reference is finite, or of another shape.

    Args:
        relative_error: upper limit of the norm of the difference over the norm of the reference.
        max_abs_error: upper limit of the largest difference of a single value, in the unit of the output.
        cosine_similarity: lower limit, -1 to 1.
        top_class_agreement: lower limit, 0 to 1, for outputs that look like scores of classes: the share of rows with
            the same best class. Rows whose two best classes are so close that the tolerated `relative_error` of the
            best score could swap them do not count. For outputs of bool, int32 and int64, such as classes, tokens and
            indices: the share of equal values, in place of all relative errors. Where that is too small and no value
            is off by more than 1, as rounding makes of coordinates and counts, relative errors decide.
        median_row_error: upper limit of the relative error of the row in the middle, where there are several rows: the
            norm over all of them is that of the loudest, beside which the others may be wrong altogether.
        worst_row_error: upper limit of the relative error of any row, for outputs that are floats.
    """

    relative_error: float | None = None
    max_abs_error: float | None = None
    cosine_similarity: float | None = None
    top_class_agreement: float | None = None
    median_row_error: float | None = None
    worst_row_error: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and not number:
                raise OptionError(f"{field.name} is {value!r}; expected a number or None", option=field.name)
        for name in ("relative_error", "max_abs_error", "median_row_error", "worst_row_error"):
            if (getattr(self, name) or 0) < 0:
                raise OptionError(f"{name} is {getattr(self, name)}; expected 0 or more", option=name)
        for name, low in (("cosine_similarity", -1), ("top_class_agreement", 0)):
            if not low <= (getattr(self, name) or 0) <= 1:
                raise OptionError(f"{name} is {getattr(self, name)}; expected {low} to 1", option=name)

    @classmethod
    def default(cls, precision: Precision) -> Tolerance:
        """What is usual for a precision. That of fp32 has room for TF32, which is what TensorRT-RTX computes in."""
        if precision not in _DEFAULTS:
            return cls()  # `best` has none of its own
        relative_error, agreement = _DEFAULTS[precision]
        return cls(
            relative_error=relative_error,
            top_class_agreement=agreement,
            median_row_error=relative_error,
            worst_row_error=_WORST_ROW * relative_error,
        )

    def with_relative_error(self, limit: float) -> Tolerance:
        """The same with another limit of the relative error; those of rows change in proportion."""
        if not self.relative_error:
            return replace(self, relative_error=limit)
        share = limit / self.relative_error
        rows = {name: getattr(self, name) for name in ("median_row_error", "worst_row_error")}
        scaled = {name: value * share for name, value in rows.items() if value is not None}
        return replace(self, relative_error=limit, **scaled)


_WORST_ROW = 5
"""How many times the usual relative error is tolerated of a single row."""

_DEFAULTS: Mapping[Precision, tuple[float, float]] = {
    Precision.FP32: (0.02, 0.99),
    Precision.TF32: (0.02, 0.99),
    Precision.FP16: (0.02, 0.99),
    Precision.BF16: (0.05, 0.98),
    Precision.INT8: (0.10, 0.95),
    Precision.FP8: (0.10, 0.95),
}


@dataclass(frozen=True, kw_only=True)
class OutputComparison:
    """One output of a model against that of its reference, over all samples.

    Attributes:
        name: of the output.
        values: how many numbers were compared.
        max_abs_error: the largest difference of a single value, in the unit of the output.
        mean_abs_error: the mean of the differences, likewise.
        relative_error: the norm of the difference over the norm of the reference.
        cosine_similarity: -1 to 1.
        nans: values that are NaN where the reference is finite.
        infinities: values that are infinite where the reference is finite.
        lost_infinities: values that are not the same infinity where the reference is infinite, such as a masked score.
        other_shapes: samples for which the output has another shape than the reference.
        varies: whether the reference varies enough to prove anything.
        classes: where the output looks like scores of classes, how many there are.
        top_class_agreement: the share of rows with the same best class, 0 to 1; of equal values, where these are exact.
        clear_agreement: the same of those rows alone whose two best classes are further apart than the tolerated error.
        rows: how many rows were compared each by itself.
        median_row_error: the relative error of the row in the middle; None where there is only one row.
        worst_row_error: the largest relative error of a row; None where there is only one, or values are no floats.
    """

    name: str
    values: int
    max_abs_error: float
    mean_abs_error: float
    relative_error: float
    cosine_similarity: float
    nans: int = 0
    infinities: int = 0
    lost_infinities: int = 0
    other_shapes: int = 0
    varies: bool = True
    classes: int | None = None
    top_class_agreement: float | None = None
    clear_agreement: float | None = None
    rows: int = 0
    median_row_error: float | None = None
    worst_row_error: float | None = None

    @property
    def metric_part(self) -> str:
        """The name as a part of that of a metric, in which MLflow refuses some characters, and slashes at its ends."""
        return re.sub(r"[^\w\-. ]", "_", self.name)

    @property
    def is_exact(self) -> bool:
        """Whether values are equal or not, as those of bool, int32 and int64 are."""
        return self.classes is None and self.clear_agreement is not None

    def _judged_by(self, tolerance: Tolerance) -> Tolerance:
        """How far off a token is says nothing; that many numbers are off by 1 at most says that they were rounded."""
        equal, least = self.clear_agreement, tolerance.top_class_agreement
        if not self.is_exact or equal is None or least is None:
            return tolerance
        if equal < least and self.max_abs_error <= 1 and tolerance.relative_error is not None:
            return replace(tolerance, top_class_agreement=None)
        return replace(tolerance, relative_error=None, median_row_error=None, worst_row_error=None)

    def severity(self, tolerance: Tolerance) -> float:
        """The measured share of what is tolerated, of the worst measure: above 1 is too much."""
        tolerance = self._judged_by(tolerance)
        if self.nans or self.infinities or self.lost_infinities or self.other_shapes:
            return math.inf
        shares = [
            _share(self.relative_error, tolerance.relative_error),
            _share(self.max_abs_error, tolerance.max_abs_error),
            _share(_missing(self.cosine_similarity), _missing(tolerance.cosine_similarity)),
            _share(_missing(self.clear_agreement), _missing(tolerance.top_class_agreement)),
            _share(self.median_row_error, tolerance.median_row_error),
            _share(self.worst_row_error, tolerance.worst_row_error),
        ]
        return max(shares)

    def problems(self, tolerance: Tolerance) -> tuple[str, ...]:
        """What is beyond `tolerance`, in words."""
        found = []
        tolerance = self._judged_by(tolerance)
        agreement = "share of equal values" if self.is_exact else "agreement of the best class"
        if self.other_shapes:
            found.append(f"its shape is another than that of the reference for {self.other_shapes} of the samples")
        if self.nans or self.infinities:
            found.append(f"{self.nans} NaN and {self.infinities} infinite values where the reference is finite")
        if self.lost_infinities:
            found.append(f"where the reference is infinite, {self.lost_infinities} values are not, or another infinity")
        limits = (
            ("relative error", self.relative_error, tolerance.relative_error, 1),
            ("largest absolute error", self.max_abs_error, tolerance.max_abs_error, 1),
            ("cosine similarity", self.cosine_similarity, tolerance.cosine_similarity, -1),
            (agreement, self.clear_agreement, tolerance.top_class_agreement, -1),
            (f"relative error of the median of {self.rows} rows", self.median_row_error, tolerance.median_row_error, 1),
            (f"relative error of the worst of {self.rows} rows", self.worst_row_error, tolerance.worst_row_error, 1),
        )
        for label, measured, limit, sign in limits:
            # Written so that a NaN fails.
            if measured is not None and limit is not None and not sign * measured <= sign * limit:
                found.append(
                    f"{label} {measured:.3g}, {'at most' if sign > 0 else 'at least'} {limit:.3g} is tolerated"
                )
        return tuple(f"output {self.name!r}: {text}" for text in found)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All outputs of `subject` against those of the source model on ONNX Runtime, for the same inputs.

    Attributes:
        subject: what was compared: an engine on a GPU, or a typed model.
        inputs: what was run, and how much of it.
        tolerance: what the verdict is by.
        outputs: the errors of each output; none where nothing was compared.
        reason: why nothing was compared, else empty.
    """

    subject: str
    inputs: str
    tolerance: Tolerance
    outputs: tuple[OutputComparison, ...]
    reason: str = ""

    @classmethod
    def of_nothing(cls, subject: str, reason: str, tolerance: Tolerance) -> Comparison:
        """What stands in place of a comparison that would have been one of something with itself."""
        return cls(subject=subject, inputs="", tolerance=tolerance, outputs=(), reason=reason)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the verdict, what is beyond the tolerance, and the numbers."""
        return {"verdict": str(self.verdict), "problems": list(self.problems), **asdict(self)}

    @property
    def problems(self) -> tuple[str, ...]:
        """What is beyond the tolerance, in words."""
        return tuple(problem for output in self.outputs for problem in output.problems(self.tolerance))

    @property
    def verdict(self) -> Verdict:
        """`passed`, `failed`, `inconclusive` where the reference hardly varies, or `nothing was compared`."""
        if self.reason:
            return Verdict.NOTHING_COMPARED
        if self.problems:
            return Verdict.FAILED
        # One output that varies proves something about all that lie before it; one that does not is no failure.
        return Verdict.PASSED if any(output.varies for output in self.outputs) else Verdict.INCONCLUSIVE

    @property
    def metric_parts(self) -> dict[str, str]:
        """The `metric_part` of each output, numbered where several would share it."""
        parts = {output.name: output.metric_part for output in self.outputs}
        taken = {name for name, part in parts.items() if name == part}
        for name, part in parts.items():
            if name != part:
                numbered = (f"{part}-{number}" for number in itertools.count(2))
                parts[name] = next(free for free in itertools.chain((part,), numbered) if free not in taken)
                taken.add(parts[name])
        return parts

    @property
    def hidden_rows(self) -> tuple[str, ...]:
        """Outputs of which most rows are off by more than is tolerated of all together, where rows are not judged."""
        limit = self.tolerance.relative_error
        if limit is None or self.tolerance.median_row_error is not None:
            return ()
        rows = Tolerance(median_row_error=limit)
        return tuple(
            problem
            for output in self.outputs
            for problem in replace(output, nans=0, infinities=0, lost_infinities=0).problems(rows)
        )

    @property
    def severity(self) -> float:
        """That of the worst output."""
        return max((output.severity(self.tolerance) for output in self.outputs), default=0.0)

    @property
    def relative_error(self) -> float:
        """The largest of any output."""
        return max((output.relative_error for output in self.outputs), default=0.0)

    def __str__(self) -> str:
        if self.reason:
            return f"{self.subject}: {self.verdict}, since {self.reason}"
        numbers = "; ".join(
            f"{output.name}: relative error {output.relative_error:.2e}, largest absolute error "
            f"{output.max_abs_error:.2e}"
            + _agreement_text(output)
            + ("" if output.median_row_error is None else f", median row {output.median_row_error:.2e}")
            + ("" if output.worst_row_error is None else f", worst row {output.worst_row_error:.2e}")
            for output in self.outputs
        )
        return f"{self.subject} {self.verdict} against the source model on {self.inputs} ({numbers})"


def _agreement_text(output: OutputComparison) -> str:
    if output.top_class_agreement is None:
        return ""
    return f", {'values are equal' if output.is_exact else 'best class agrees'} in {output.top_class_agreement:.1%}"


def _missing(similarity: float | None) -> float | None:
    return None if similarity is None else 1 - similarity


def _share(measured: float | None, limit: float | None) -> float:
    if measured is None or limit is None or measured == 0:
        return 0.0
    return measured / limit if limit else math.inf
