"""The tags that this flavor puts on model versions, on the logged models behind them, and on runs of a benchmark."""

from __future__ import annotations

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
"""On a source version: the URIs of what was made of it, oldest first, each with a comma behind it."""

EXTENDS_TAG = f"{PREFIX}extends"
"""On a version with one more engine: the URI of the version that it has all the others from."""

BENCHMARK_OF_TAG = f"{PREFIX}benchmark_of"
"""On a run that holds the figures of a benchmark: what was measured."""
