"""The tags that this flavor puts on model versions, on the logged models behind them, and on runs of a benchmark."""

from __future__ import annotations

import hashlib
import re

PREFIX = "mlflow_trt."

TENSORRT_TAG = f"{PREFIX}tensorrt"
"""On every version of this flavor, also on one that was logged and not converted: what built its engine."""

PRECISION_TAG = f"{PREFIX}precision"
PRECISION_ASKED_TAG = f"{PREFIX}precision_asked"
PRECISION_SHARE_TAG = f"{PREFIX}precision_share"
"""How much of the model's arithmetic runs in that precision, 0 to 1; not for fp32 and tf32."""

BATCH_TAG = f"{PREFIX}batch"
TARGET_TAG = f"{PREFIX}target"
VERIFICATION_TAG = f"{PREFIX}verification"
RELATIVE_ERROR_TAG = f"{PREFIX}relative_error"

SOURCE_TAG = f"{PREFIX}source"
SOURCE_NAME_TAG = f"{PREFIX}source_name"
SOURCE_VERSION_TAG = f"{PREFIX}source_version"
SOURCE_DIGEST_TAG = f"{PREFIX}source_digest"
RECIPE_DIGEST_TAG = f"{PREFIX}recipe_digest"

CONVERTED_TAG = f"{PREFIX}converted_to"
"""On a source version: a tag for each version that was made of it, whose value is its URI; see `converted_tag`."""

CONVERSION_TAG = f"{PREFIX}conversion"
"""On the version, the logged model and the run of one conversion: an id that it alone has."""

VERIFICATION_OF_TAG = f"{PREFIX}verification_of"
"""On a run that holds the figures of a verification: the name of the logged model."""

EXTENDS_TAG = f"{PREFIX}extends"
"""On a version with one more engine: the URI of the version that it has all the others from."""

BENCHMARK_OF_TAG = f"{PREFIX}benchmark_of"
"""On a run that holds the figures of a benchmark: what was measured."""

_MAX_KEY = 250  # of MLflow


def converted_tag(name: str, version: str) -> str:
    """The tag of a source version for one that was made of it: `mlflow_trt.converted_to.<name>.<version>`.

    One tag for each, since MLflow cannot add to the value of one that others write to at the same time.
    """
    safe = re.sub(r"[^\w .-]", "-", name)
    key = f"{CONVERTED_TAG}.{safe}.{version}"
    if safe == name and len(key) <= _MAX_KEY:
        return key
    return f"{CONVERTED_TAG}.{safe[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.{version}"
