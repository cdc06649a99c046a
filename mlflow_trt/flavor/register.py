"""A model folder as a logged model and as a registered version, each taken back where something fails later."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.models.model import ModelInfo
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.tracking._model_registry import DEFAULT_AWAIT_MAX_SLEEP_SECONDS
from mlflow.tracking.fluent import _get_experiment_id, _last_logged_model_id
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS, MLFLOW_RUN_NOTE

from mlflow_trt.core.log import get_logger
from mlflow_trt.errors import ArtifactError
from mlflow_trt.flavor.fetch import check_files
from mlflow_trt.flavor.mlmodel import move_model
from mlflow_trt.flavor.recognize import is_refusal, tell_refused
from mlflow_trt.flavor.tags import CONVERSION_TAG, PREFIX
from mlflow_trt.flavor.undo import Undo, exists, is_missing, versions_of
from mlflow_trt.store.record import FLAVOR_NAME, Record

_MODEL_ID = re.compile(r"(?:^|[/\\:])(m-[0-9a-f]{32})(?:[/\\]|$)")
_log = get_logger(__name__)


def log_folder(
    undo: Undo,
    folder: Path,
    written: Model,
    *,
    name: str | None,
    params: Mapping[str, Any],
    tags: Mapping[str, Any],
    description: str | None = None,
    model_id: str | None = None,
    model_type: str | None = None,
    step: int = 0,
    validates: bool = False,
) -> ModelInfo:
    """Move a model folder, of which `written` is the MLmodel, into a new logged model, or the one of that id."""
    if description is not None:
        tags = {MLFLOW_RUN_NOTE: description, **tags}  # MLflow's pages show it as the description of models, too

    def save(path: str, mlflow_model: Model, validate_serving_input: bool) -> None:
        del validate_serving_input  # Model.log reads it, and passes on all its keywords
        move_model(written, folder, Path(path), mlflow_model)

    if model_id is None:
        model_id = _create_logged_model(undo, name, params, tags, model_type)
    info: ModelInfo = Model.log(
        artifact_path=None,
        name=name,
        flavor=SimpleNamespace(__name__=FLAVOR_NAME, save_model=save),
        model_id=model_id,
        step=step,
        validate_serving_input=validates,
    )
    return info


def _create_logged_model(
    undo: Undo, name: str | None, params: Mapping[str, Any], tags: Mapping[str, Any], model_type: str | None
) -> str:
    client, run = MlflowClient(), mlflow.active_run()
    experiment_id = _get_experiment_id() if run is None else run.info.experiment_id
    in_run = {} if run is None else client.get_run(run.info.run_id).data.params

    def request() -> str:
        made = mlflow.initialize_logged_model(
            name,
            source_run_id=None if run is None else run.info.run_id,
            tags={key: str(value) for key, value in tags.items()} | {CONVERSION_TAG: undo.token},
            params={key: str(value) for key, value in {**params, **in_run}.items()},
            model_type=model_type,
            experiment_id=experiment_id,
        )
        return str(made.model_id)

    def look() -> Iterator[str]:
        found = client.search_logged_models([str(experiment_id)], f"tags.`{CONVERSION_TAG}` = '{undo.token}'")
        yield from (model.model_id for model in found)

    made = undo.make(f"The logged model {name or ''}".strip(), request, take_back=client.delete_logged_model, look=look)
    _last_logged_model_id.set(made)  # what mlflow.last_logged_model() returns, which is kept by thread
    return made


def register_version(
    undo: Undo,
    registered_model_name: str,
    model_id: str,
    *,
    tags: Mapping[str, Any],
    description: str | None = None,
    await_registration_for: int | None = DEFAULT_AWAIT_MAX_SLEEP_SECONDS,
) -> ModelVersion:
    """Register a logged model, tags and description included, and create the registered model if need be."""
    client = MlflowClient()
    _create_registered_model(undo, client, registered_model_name)

    def create(tags: Mapping[str, str]) -> str:
        made = client.create_model_version(
            registered_model_name,
            f"models:/{model_id}",
            tags=dict(tags),
            description=description,
            await_creation_for=await_registration_for or 0,
            model_id=model_id,
        )
        return str(made.version)

    def request() -> str:
        texts = {key: str(value) for key, value in tags.items()}
        try:
            return create(texts | {CONVERSION_TAG: undo.token})
        except MlflowException as error:
            if not is_refusal(error):
                raise
            # Unity Catalog takes no dots in keys; where it is something else that is refused, it is again.
            return create({key: text for key, text in texts.items() if not key.startswith(PREFIX)})

    number = undo.make(
        f"The version of {registered_model_name}",
        request,
        take_back=lambda version: client.delete_model_version(registered_model_name, version),
        look=lambda: _made_by(client, registered_model_name, undo.token, model_id),
    )
    _log.info("Created version %s of the registered model %s", number, registered_model_name)
    version = client.get_model_version(registered_model_name, number)
    complete_version(undo, client, version, tags, description)
    _link(undo, client, version, model_id)
    return version


def _create_registered_model(undo: Undo, client: MlflowClient, name: str) -> None:
    if exists(client, name):
        return

    def request() -> str:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            # Somebody else did, or this client itself, and the first answer was lost.
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        return name

    def delete_if_empty(name: str) -> None:
        if next(versions_of(client, name), None) is None:
            client.delete_registered_model(name)

    undo.make(
        f"The registered model {name}",
        request,
        take_back=delete_if_empty,
        look=lambda: [name] if exists(client, name) else [],
    )


def _made_by(client: MlflowClient, name: str, token: str, model_id: str) -> Iterator[str]:
    if exists(client, name):
        for version in list(versions_of(client, name)):
            # Some registries drop tags; and a model_id that was given may have versions that were there before.
            if version.tags.get(CONVERSION_TAG, token if model_id_of(version) == model_id else None) == token:
                yield str(version.version)


def complete_version(
    undo: Undo, client: MlflowClient, version: ModelVersion, tags: Mapping[str, Any], description: str | None
) -> None:
    """Give a version the tags and the description that it should have and lacks.

    It lacks them where a registry drops what comes with the request for a version, or where something killed an
    earlier release between the two.
    """
    name, number = version.name, str(version.version)
    takes_ours = True
    for key in [key for key in tags if key not in version.tags]:
        is_ours = key.startswith(PREFIX)
        if is_ours and not takes_ours:
            continue
        try:
            undo.change(
                f"The tag {key} of version {number} of {name}",
                partial(client.set_model_version_tag, name, number, key, str(tags[key])),
                restore=partial(client.delete_model_version_tag, name, number, key),
            )
        except MlflowException as error:
            if not is_ours or not is_refusal(error):
                raise
            takes_ours = False
            tell_refused(name, number, key, error)
    if description and not version.description:
        undo.change(
            f"The description of version {number} of {name}",
            lambda: client.update_model_version(name, number, description),
            restore=lambda: client.update_model_version(name, number, ""),
        )


def _link(undo: Undo, client: MlflowClient, version: ModelVersion, model_id: str) -> None:
    """Name the version on its logged model, as `mlflow.register_model` does for MLflow's pages."""
    entry = {"name": version.name, "version": version.version}

    def linked() -> list[dict[str, Any]]:
        found = client.get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS)
        return [] if found is None else list(json.loads(found))

    def restore() -> None:
        if entry in (others := linked()):
            others.remove(entry)
            client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(others)})

    undo.change(
        f"The mention of version {version.version} on the logged model {model_id}",
        lambda: client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps([*linked(), entry])}),
        restore=restore,
    )


def set_alias(undo: Undo, registered_model_name: str, alias: str, version: str) -> None:
    """Point an alias at a version. Taken back, it points to where it did before, unless somebody moved it meanwhile."""
    client = MlflowClient()

    def target() -> str | None:
        found = client.get_registered_model(registered_model_name).aliases.get(alias)
        return None if found is None else str(found)

    before = target()
    if before == version:
        return

    def restore() -> None:
        if target() != version:
            return
        if before is not None:
            client.set_registered_model_alias(registered_model_name, alias, before)
        else:
            client.delete_registered_model_alias(registered_model_name, alias)

    undo.change(
        f"The alias {alias}",
        lambda: client.set_registered_model_alias(registered_model_name, alias, version),
        restore=restore,
    )


def model_id_of(version: ModelVersion) -> str | None:
    """The logged model behind a version. A search over HTTP leaves its id out; the source is a URI or path of it."""
    found = _MODEL_ID.search(version.source or "")
    return version.model_id or (found[1] if found else None)


def check_version(client: MlflowClient, version: ModelVersion) -> Record:
    """The record of a version, after it was found to be one that can be loaded; no engine is downloaded.

    Raises ArtifactError where it, or the logged model behind it, is deleted or unfinished, or lacks a file.
    """
    uri = f"models:/{version.name}/{version.version}"
    if version.status != "READY":
        raise ArtifactError(f"{uri} is {version.status}, and not READY")
    model_id = model_id_of(version)
    if model_id is not None:  # else it was registered from elsewhere
        try:
            status = client.get_logged_model(model_id).status
        except MlflowException as error:
            if is_missing(error):
                raise ArtifactError(f"the logged model {model_id} behind {uri} was deleted") from error
            raise
        if status != LoggedModelStatus.READY:
            raise ArtifactError(f"the logged model {model_id} behind {uri} is {status}, and not READY")
    return check_files(uri)
