"""What killed conversions left in a registry: find it, and mend what can be mended without losing anything."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus, RunStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from mlflow_trt.core.log import get_logger
from mlflow_trt.errors import ArtifactError, OptionError
from mlflow_trt.flavor.metrics import complete_metrics, metrics_from
from mlflow_trt.flavor.recognize import tags_missing
from mlflow_trt.flavor.register import check_version, complete_version, model_id_of
from mlflow_trt.flavor.tags import (
    CONVERSION_TAG,
    PREFIX,
    VERIFICATION_OF_TAG,
    converted_tag,
    fingerprint_in,
)
from mlflow_trt.flavor.tracking import check_server
from mlflow_trt.flavor.undo import Undo, exists, is_missing, versions_of
from mlflow_trt.registry.convert_version import logged_model_name
from mlflow_trt.registry.lineage import point_to
from mlflow_trt.store.record import Record

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is not as a conversion that ended well leaves it.

    `remedy` is what mending does, or did where `is_mended`; or else what to do, which loses something and so is left to
    whoever knows.
    """

    subject: str
    problem: str
    remedy: str
    is_mended: bool = False
    _mend: Callable[[], object] | None = None

    @property
    def can_be_mended(self) -> bool:
        return self._mend is not None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("subject", "problem", "remedy", "can_be_mended", "is_mended")
        return {name: getattr(self, name) for name in names}

    def mended(self) -> Finding:
        """Mend it, if that can be done. Raises what MLflow raises."""
        if self._mend is None:
            return self
        self._mend()
        return replace(self, is_mended=True)


def check_registered_model(name: str, *, mend: bool = False, minutes: float = 60) -> list[Finding]:
    """Look through a registered model, and the logged models and runs that conversions to it made.

    Args:
        name: of the registered model; `models:/name` will do as well.
        mend: mend what can be.
        minutes: what is unfinished and younger is taken for a conversion that is still at work.

    Raises OptionError where there is no such model.
    """
    check_server()
    name = name.removeprefix("models:/")
    client = MlflowClient()
    if not exists(client, name):
        raise OptionError(f"there is no registered model {name}; expected models:/NAME of one")
    before = (time.time() - 60 * minutes) * 1000
    versions = list(versions_of(client, name))
    findings = [*_of_versions(client, name, versions), *_of_logged(client, name, versions, before)]
    return [finding.mended() for finding in findings] if mend else findings


def _of_versions(client: MlflowClient, name: str, versions: list[ModelVersion]) -> Iterator[Finding]:
    if not versions:
        yield Finding(
            subject=f"models:/{name}",
            problem="it has no versions",
            remedy=f"if nobody needs it: MlflowClient().delete_registered_model({name!r})",
        )
    aliases = client.get_registered_model(name).aliases
    taken = {str(number): alias for alias, number in aliases.items()}
    extra = _extra(versions, set(taken))
    for version in extra:
        yield Finding(
            subject=f"version {version.version}",
            problem="another version was made of its logged model by the same conversion",
            remedy="delete it",
            _mend=partial(client.delete_model_version, name, str(version.version)),
        )
    for version in versions:
        number = str(version.version)
        if version in extra:
            continue
        try:
            record = check_version(client, version)
        except ArtifactError as error:
            if _is_ours(version.tags):
                alias = f", which the alias {taken[number]} points to" if number in taken else ""
                yield Finding(
                    subject=f"version {number}{alias}",
                    problem=f"it cannot be loaded: {error.message}",
                    remedy=f"convert again, then MlflowClient().delete_model_version({name!r}, '{number}')",
                )
            continue
        yield from _of_version(client, version, record)


def _extra(versions: list[ModelVersion], taken: set[str]) -> list[ModelVersion]:
    """One conversion makes one version; a request that was repeated after a lost answer makes two of the same."""
    left = Counter(version.tags.get(CONVERSION_TAG) for version in versions)
    extra = []
    for version in versions:  # the newest first
        token = version.tags.get(CONVERSION_TAG)
        if token is not None and left[token] > 1 and str(version.version) not in taken:
            left[token] -= 1
            extra.append(version)
    return extra


def _of_version(client: MlflowClient, version: ModelVersion, record: Record) -> Iterator[Finding]:
    """What a version that can be loaded lacks. Its logged model has the tags of the user that it was to be given."""
    subject, undo = f"version {version.version}", Undo()
    model_id = model_id_of(version)
    if model_id is None:
        return
    logged = client.get_logged_model(model_id)
    wanted = tags_missing(record, version.tags) | {
        key: text
        for key, text in logged.tags.items()
        if key == CONVERSION_TAG or not key.startswith(("mlflow.", PREFIX))
    }
    missing = sorted(key for key in wanted if key not in version.tags)
    if missing:
        yield Finding(
            subject=subject,
            problem=f"it lacks the tags {', '.join(missing)}",
            remedy="set them",
            _mend=lambda: complete_version(undo, client, version, wanted, None),
        )
    is_extended = "extends" in record.lineage  # the figures are of the engine that the other version has, too
    if metrics_from(record) and not logged.metrics and not is_extended:
        yield Finding(
            subject=subject,
            problem="its logged model lacks the metrics of its verification",
            remedy="log them from its record",
            _mend=lambda: complete_metrics(undo, client, version),
        )
    yield from _of_lineage(client, version, record, undo)


def _of_lineage(client: MlflowClient, version: ModelVersion, record: Record, undo: Undo) -> Iterator[Finding]:
    lineage = record.lineage
    if "extends" in lineage:  # then it is the other version of this model that points to it
        name, _, number = lineage["extends"].removeprefix("models:/").rpartition("/")
        lineage = {"source": lineage["extends"], "name": name, "version": number}
    if "version" not in lineage:
        return
    try:
        source = client.get_model_version(lineage["name"], lineage["version"])
    except MlflowException as error:
        if is_missing(error):  # since then
            return
        raise
    key = converted_tag(version.name, str(version.version))
    if key not in source.tags:
        yield Finding(
            subject=f"version {version.version}",
            problem=f"its source {lineage['source']} lacks the tag {key}",
            remedy="set it",
            _mend=lambda: point_to(undo, lineage, version),
        )


def _of_logged(client: MlflowClient, name: str, versions: list[ModelVersion], before: float) -> Iterator[Finding]:
    """Logged models and runs of conversions to this name that were killed before they registered anything."""
    tokens = {version.tags.get(CONVERSION_TAG) for version in versions}
    known = {model_id_of(version) for version in versions}
    for experiment_id in _experiments(client):
        for model in _logged_models(client, experiment_id, logged_model_name(name)):
            # Only a conversion to a registered version has a fingerprint.
            is_left = fingerprint_in(model.tags) is not None and model.tags.get(CONVERSION_TAG) not in tokens
            if model.creation_timestamp > before or model.model_id in known:
                continue
            if model.status == LoggedModelStatus.PENDING and CONVERSION_TAG in model.tags:
                problem = "it was never finished"
            elif is_left:
                problem = "it was never registered"
            else:
                continue
            yield Finding(
                subject=f"the logged model {model.model_id}",
                problem=problem,
                remedy="delete it",
                _mend=partial(client.delete_logged_model, model.model_id),
            )
        condition = f"attributes.status = 'RUNNING' and tags.`{VERIFICATION_OF_TAG}` = '{logged_model_name(name)}'"
        for run in client.search_runs([experiment_id], condition):
            if run.info.start_time <= before:
                yield Finding(
                    subject=f"the run {run.info.run_id}",
                    problem="it was left running",
                    remedy="end it as killed",
                    _mend=partial(client.set_terminated, run.info.run_id, status=RunStatus.to_string(RunStatus.KILLED)),
                )


def _is_ours(tags: dict[str, str]) -> bool:
    return any(key.startswith(PREFIX) and not key.startswith(f"{PREFIX}converted_to") for key in tags)


def _experiments(client: MlflowClient) -> Iterator[str]:
    token = None
    while True:
        page = client.search_experiments(page_token=token)
        yield from (experiment.experiment_id for experiment in page)
        token = page.token
        if not token:
            return


def _logged_models(client: MlflowClient, experiment_id: str, name: str) -> Iterator[LoggedModel]:
    token = None
    while True:
        page = client.search_logged_models([experiment_id], f"name = '{name}'", page_token=token)
        yield from page
        token = page.token
        if not token:
            return
