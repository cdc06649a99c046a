"""Versions of this flavor, whoever registered them: known by their flavor and record, and not by tags alone.

A model that was logged and registered later, by `mlflow.register_model` or on MLflow's pages, has no tags on its
version, and Unity Catalog takes none with a dot in the key.
"""

from __future__ import annotations

from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, INVALID_PARAMETER_VALUE, ErrorCode

from mlflow_trt.core.log import get_logger
from mlflow_trt.core.types import BatchAxis, ShapeProfile
from mlflow_trt.flavor.fetch import is_of_this_flavor, read_record
from mlflow_trt.flavor.tags import (
    BATCH_TAG,
    PRECISION_ASKED_TAG,
    PRECISION_SHARE_TAG,
    PRECISION_TAG,
    RECIPE_DIGEST_TAG,
    RELATIVE_ERROR_TAG,
    SOURCE_DIGEST_TAG,
    SOURCE_NAME_TAG,
    SOURCE_TAG,
    SOURCE_VERSION_TAG,
    TARGET_TAG,
    TENSORRT_TAG,
    VERIFICATION_TAG,
)
from mlflow_trt.pipeline.verify import overall_verdict
from mlflow_trt.store.record import Record

_LINEAGE = {
    SOURCE_TAG: "source",
    SOURCE_NAME_TAG: "name",
    SOURCE_VERSION_TAG: "version",
    RECIPE_DIGEST_TAG: "recipe_digest",
}
_log = get_logger(__name__)


def facts_from(record: Record) -> dict[str, str]:
    """What is worth searching for, as it appears in params and tags."""
    engine = record.engines[0]
    facts = {
        TENSORRT_TAG: f"{engine.distribution} {engine.version}",
        TARGET_TAG: ", ".join(dict.fromkeys(engine.target for engine in record.engines)),
    }
    if record.is_engine_only:  # of which nobody told anything else
        return facts
    facts |= {PRECISION_TAG: str(record.recipe.precision), SOURCE_DIGEST_TAG: record.source.digest}
    share = record.precision_report.share
    if share is not None:
        facts[PRECISION_SHARE_TAG] = f"{share:.4g}"
    if record.selection is not None:
        facts[PRECISION_ASKED_TAG] = str(record.selection.asked)
    verdict = overall_verdict(record.comparisons)
    if verdict is not None:
        facts[VERIFICATION_TAG] = str(verdict)
        facts[RELATIVE_ERROR_TAG] = f"{record.comparisons[-1].relative_error:.3g}"
    if record.batch_axis is not None:
        facts[BATCH_TAG] = _batch_of(record.profiles, record.batch_axis)
    return facts


def _batch_of(profiles: tuple[ShapeProfile, ...], axis: BatchAxis) -> str:
    ranges = [profile.ranges[axis.inputs[0]] for profile in profiles]
    return f"{min(r.min[0] for r in ranges)}:{ranges[0].opt[0]}:{max(r.max[0] for r in ranges)}"


def lineage_tags(lineage: Mapping[str, str]) -> dict[str, str]:
    """What the lineage in a record says, as tags of the version."""
    return {tag: lineage[key] for tag, key in _LINEAGE.items() if key in lineage}


def own_tags(client: MlflowClient, version: ModelVersion) -> Mapping[str, str] | None:
    """The tags that a version of this flavor has, or should have by its record; None for a version of another flavor.

    Those that it lacks are put on, where the registry takes them.
    """
    if TENSORRT_TAG in version.tags:
        return dict(version.tags)
    uri = f"models:/{version.name}/{version.version}"
    try:
        if not is_of_this_flavor(uri):
            return None
        record = read_record(uri)
    except (MlflowException, OSError) as error:
        _log.debug("%s cannot be read: %s", uri, error)
        return None
    tags = {**facts_from(record), **lineage_tags(record.lineage)}
    put_tags(client, version, tags)
    return {**tags, **version.tags}


def put_tags(client: MlflowClient, version: ModelVersion, tags: Mapping[str, str]) -> None:
    """Give a version those of these tags that it lacks, unless its registry refuses them."""
    for key in sorted(set(tags) - set(version.tags)):
        try:
            client.set_model_version_tag(version.name, str(version.version), key, tags[key])
        except MlflowException as error:
            if not is_refusal(error):
                raise
            tell_refused(version.name, str(version.version), key, error)
            return  # a registry that takes none of such keys is not asked for each


def is_refusal(error: MlflowException) -> bool:
    """Whether a server says that it does not take what it was given, and not that it cannot be reached, or failed."""
    return bool(error.error_code in (ErrorCode.Name(INVALID_PARAMETER_VALUE), ErrorCode.Name(BAD_REQUEST)))


def tell_refused(name: str, version: str, key: str, error: MlflowException) -> None:
    _log.info(
        "The registry takes no tag %s, so version %s of %s has none of this kind, and searches by them do not find it; "
        "the record in the model has what they say (%s)",
        key,
        version,
        name,
        error.message,
    )
