"""A model of this flavor in one line, for lists of versions and the first line of a report."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mlflow_trt.core.types import BatchAxis, ShapeProfile
from mlflow_trt.store.record import Record


def describe(record: Record) -> str:
    """Like `fp16, batch 1:8:64, sm80plus, from models:/cnn/1, error 9e-4`."""
    batch = batch_text(record.batch_axis, record.profiles)
    targets = dict.fromkeys(engine.target for engine in record.engines)
    source = record.lineage.get("source")
    error = short_number(record.comparisons[-1].relative_error) if record.comparisons else None
    parts = (
        "imported engine" if record.is_engine_only else str(record.recipe.precision),
        batch and f"batch {batch}",
        ", ".join(targets),
        source and f"from {source}",
        f"error {error}" if error is not None else "error not measured",
    )
    return ", ".join(part for part in parts if part)


def describe_version(record: Record, text: str | None = None) -> str:
    """The description of a registered version: the line, and below it what its source says of itself."""
    return "\n\n".join(filter(None, (describe(record), text)))


def text_below(record: Record, description: str | None) -> str | None:
    """What a version's description says below the line of its record."""
    line, _, text = (description or "").partition("\n\n")
    return text if line == describe(record) else description


def batch_text(axis: BatchAxis | None, profiles: Sequence[ShapeProfile]) -> str | None:
    """Like `1:8:64`; None for a model without a batch axis."""
    if axis is None or not profiles:
        return None
    ranges = [profile.ranges[axis.inputs[0]] for profile in profiles]
    return f"{min(r.min[0] for r in ranges)}:{ranges[0].opt[0]}:{max(r.max[0] for r in ranges)}"


def short_number(value: float) -> str:
    """With one digit, like 9e-4: enough to tell good from bad."""
    return re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{value:.0e}") if value else "0"
