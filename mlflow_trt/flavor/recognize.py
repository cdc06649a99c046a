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
from mlflow_trt.flavor.describe import batch_text, describe
from mlflow_trt.flavor.fetch import is_of_this_flavor, read_record
from mlflow_trt.flavor.tags import (
    EXTENDS_TAG,
    FINGERPRINT_TAG,
    PRECISION_TAG,
    PREFIX,
    SOURCE_TAG,
    TARGET_TAG,
    fingerprint,
    fingerprint_in,
)
from mlflow_trt.pipeline.verify import overall_verdict
from mlflow_trt.store.record import Record

_log = get_logger(__name__)


def tags_from(record: Record) -> dict[str, str]:
    """The tags of a version and of the logged model behind it, in the order in which they are worth reading."""
    lineage = record.lineage
    tags = {
        SOURCE_TAG: lineage.get("source"),
        PRECISION_TAG: None if record.is_engine_only else str(record.recipe.precision),
        TARGET_TAG: ", ".join(dict.fromkeys(engine.target for engine in record.engines)),
        EXTENDS_TAG: lineage.get("extends"),
        FINGERPRINT_TAG: fingerprint_of(record),
    }
    return {key: text for key, text in tags.items() if text is not None}


def fingerprint_of(record: Record) -> str | None:
    """The fingerprint of a conversion; None for a model that was logged and not converted."""
    lineage = record.lineage
    if "recipe_digest" not in lineage or record.is_engine_only:
        return None
    return fingerprint(lineage.get("name"), lineage.get("version"), record.source.digest, lineage["recipe_digest"])


def params_from(record: Record) -> dict[str, str]:
    """What models can be searched for, as params of the logged model."""
    engine = record.engines[0]
    params = {key: text for key, text in tags_from(record).items() if key in (PRECISION_TAG, TARGET_TAG)}
    params[f"{PREFIX}tensorrt"] = f"{engine.distribution} {engine.version}"
    batch = batch_text(record.batch_axis, record.profiles)
    if batch is not None:
        params[f"{PREFIX}batch"] = batch
    if record.is_engine_only:  # of which nobody told anything else
        return params
    params[f"{PREFIX}source_digest"] = record.source.digest
    share = record.precision_report.share
    if share is not None:
        params[f"{PREFIX}precision_share"] = f"{share:.4g}"
    if record.selection is not None:
        params[f"{PREFIX}precision_asked"] = str(record.selection.asked)
    verdict = overall_verdict(record.comparisons)
    if verdict is not None:
        params[f"{PREFIX}verification"] = str(verdict)
        params[f"{PREFIX}relative_error"] = f"{record.comparisons[-1].relative_error:.3g}"
    return params


def tags_missing(record: Record, tags: Mapping[str, str]) -> dict[str, str]:
    """Those of `tags_from` that a version with `tags` lacks; one that tells its fingerprint otherwise does not."""
    wanted = tags_from(record)
    if fingerprint_in(tags) is not None:
        wanted.pop(FINGERPRINT_TAG, None)
    return {key: text for key, text in wanted.items() if key not in tags}


def own_tags(client: MlflowClient, version: ModelVersion) -> Mapping[str, str] | None:
    """The tags that a version of this flavor has, or should have by its record; None for a version of another flavor.

    Those that it lacks are put on, where the registry takes them, and so is a description where it has none.
    """
    if TARGET_TAG in version.tags:
        return dict(version.tags)
    uri = f"models:/{version.name}/{version.version}"
    try:
        if not is_of_this_flavor(uri):
            return None
        record = read_record(uri)
    except (MlflowException, OSError) as error:
        _log.debug("%s cannot be read: %s", uri, error)
        return None
    tags = tags_from(record)
    put_tags(client, version, tags)
    if not version.description:
        _describe(client, version, describe(record))
    return {**tags, **version.tags}


def put_tags(client: MlflowClient, version: ModelVersion, tags: Mapping[str, str]) -> None:
    """Give a version those of these tags that it lacks, unless its registry refuses them."""
    for key in tags:
        if key in version.tags:
            continue
        try:
            client.set_model_version_tag(version.name, str(version.version), key, tags[key])
        except MlflowException as error:
            if not is_refusal(error):
                raise
            tell_refused(version.name, str(version.version), key, error)
            return  # a registry that takes none of such keys is not asked for each


def _describe(client: MlflowClient, version: ModelVersion, text: str) -> None:
    try:
        client.update_model_version(version.name, str(version.version), text)
    except MlflowException as error:
        if not is_refusal(error):
            raise
        _log.info("Version %s of %s gets no description: %s", version.version, version.name, error.message)


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
