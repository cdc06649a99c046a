"""The tags that this flavor puts on model versions, on the logged models behind them, and on runs.

A version has what people search for by hand, and two short ids. Everything else is in the record and, to be searched
for, in the params of the logged model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

PREFIX = "mlflow_trt."

SOURCE_TAG = f"{PREFIX}source"
PRECISION_TAG = f"{PREFIX}precision"

TARGET_TAG = f"{PREFIX}target"
"""On every version of this flavor, also on one that was logged and not converted: what its engines are for."""

FINGERPRINT_TAG = f"{PREFIX}fingerprint"
"""On a version that was converted: 12 hex digits of its source and recipe; see `fingerprint`."""

CONVERTED_TAG = f"{PREFIX}converted_to"
"""On a source version: a tag for each version that was made of it, whose value is its URI; see `converted_tag`."""

CONVERSION_TAG = f"{PREFIX}conversion"
"""On the version, the logged model and the run of one conversion: 12 hex digits that it alone has."""

VERIFICATION_OF_TAG = f"{PREFIX}verification_of"
"""On a run that holds the figures of a verification: the name of the logged model."""

EXTENDS_TAG = f"{PREFIX}extends"
"""On a version with one more engine: the URI of the version that it has all the others from."""

BENCHMARK_OF_TAG = f"{PREFIX}benchmark_of"
"""On a run that holds the figures of a benchmark: what was measured."""

_MAX_KEY = 250  # of MLflow

_OLD_SOURCE_NAME = f"{PREFIX}source_name"
_OLD_SOURCE_VERSION = f"{PREFIX}source_version"
_OLD_SOURCE_DIGEST = f"{PREFIX}source_digest"
_OLD_RECIPE_DIGEST = f"{PREFIX}recipe_digest"


def fingerprint(name: str | None, version: str | None, source_digest: str, recipe_digest: str) -> str:
    """The same for two conversions of one source, which is a version or a file of those bytes, by one recipe.

    Too short to prove that: it finds versions whose records are worth reading.
    """
    text = "\n".join((name or "", version or "", source_digest, recipe_digest))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fingerprint_in(tags: Mapping[str, str]) -> str | None:
    """The fingerprint that a version's tags have or, as those before there was one, tell; None without a source."""
    if FINGERPRINT_TAG in tags or _OLD_RECIPE_DIGEST not in tags:
        return tags.get(FINGERPRINT_TAG)
    return fingerprint(
        tags.get(_OLD_SOURCE_NAME),
        tags.get(_OLD_SOURCE_VERSION),
        tags.get(_OLD_SOURCE_DIGEST, ""),
        tags[_OLD_RECIPE_DIGEST],
    )


def converted_tag(name: str, version: str) -> str:
    """The tag of a source version for one that was made of it: `mlflow_trt.converted_to.<name>.<version>`.

    One tag for each, since MLflow cannot add to the value of one that others write to at the same time.
    """
    safe = re.sub(r"[^\w .-]", "-", name)
    key = f"{CONVERTED_TAG}.{safe}.{version}"
    if safe == name and len(key) <= _MAX_KEY:
        return key
    return f"{CONVERTED_TAG}.{safe[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.{version}"
