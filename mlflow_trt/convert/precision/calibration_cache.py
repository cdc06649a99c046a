"""The ranges that int8 and fp8 were calibrated with, in a file of JSON: saved once, and used again without the data."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mlflow_trt.core.files import write_whole
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.types import CalibrationMethod
from mlflow_trt.errors import RecipeError

_FORMAT = 1
_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class SavedRanges:
    """What was seen of the tensors of a model, on which samples.

    `largest` and `not_finite` are those of Evidence; `cutoffs` has by calibration method the magnitudes that it chose.
    """

    source_sha256: str
    samples: str
    samples_sha256: str
    largest: Mapping[str, float]
    not_finite: Mapping[str, int] = field(default_factory=dict)
    cutoffs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    format: int = _FORMAT

    def lacks(self, tensors: Collection[str], method: CalibrationMethod) -> str | None:
        """What is missing for these tensors by this method; None where it has everything."""
        missing = [name for name in tensors if name not in self.largest]
        if missing:
            return f"no range of {missing[0]!r}"
        if method is not CalibrationMethod.MINMAX and str(method) not in self.cutoffs:
            return f"no ranges by the method {method}"
        return None


_saved = TypeAdapter(SavedRanges)


class CalibrationCache:
    """A file of ranges of one source model.

    Raises RecipeError for a file of another model, or of anything else.
    """

    def __init__(self, path: Path, source_sha256: str) -> None:
        self.path = path
        self.source_sha256 = source_sha256
        self.saved = self._read()

    def usable(
        self, tensors: Collection[str], method: CalibrationMethod, samples_sha256: str | None
    ) -> SavedRanges | None:
        """The ranges, if they are of these tensors, by this method, and of these samples where there are some.

        Raises RecipeError where they are not and there are no samples to see ranges on.
        """
        if self.saved is None:
            return None
        lacks = self.saved.lacks(tensors, method)
        if lacks is None and samples_sha256 in {None, self.saved.samples_sha256}:
            _log.info("Calibrated with the ranges in %s, seen on %s", self.path, self.saved.samples)
            return self.saved
        if samples_sha256 is None:
            raise RecipeError(
                f"calibration_cache: {self.path} has {lacks}; give calibration_data, which it is filled from",
                option="calibration_cache",
            )
        return None

    def write(self, ranges: SavedRanges) -> None:
        """Write the file whole, together with what other methods chose on the same samples."""
        before = self.saved
        cutoffs: dict[str, Mapping[str, float]] = dict(ranges.cutoffs)
        if before is not None and before.samples_sha256 == ranges.samples_sha256:
            cutoffs = {**before.cutoffs, **cutoffs}
        content: dict[str, Any] = {**_saved.dump_python(ranges, mode="json"), "cutoffs": cutoffs}
        write_whole(self.path, json.dumps(content, indent=2).encode() + b"\n")
        _log.info("The ranges that were calibrated are kept in %s", self.path)

    def _read(self) -> SavedRanges | None:
        try:
            saved = _saved.validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it holds something else"
            raise self._error(f"{self.path} is no file of calibration ranges: {reason}") from None
        if saved.format > _FORMAT:
            raise self._error(f"{self.path} was written by a newer mlflow-trt, in format {saved.format}")
        if saved.source_sha256 != self.source_sha256:
            raise self._error(
                f"{self.path} has the ranges of another model, whose sha256 is {saved.source_sha256[:12]}, and this "
                f"one's is {self.source_sha256[:12]}; name another file"
            )
        return saved

    @staticmethod
    def _error(text: str) -> RecipeError:
        return RecipeError(f"calibration_cache: {text}", option="calibration_cache")
