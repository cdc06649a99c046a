"""Models of this flavor by their URI, wherever MLflow keeps them."""

from __future__ import annotations

import os
import posixpath
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from mlflow import pyfunc
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking.artifact_utils import _download_artifact_from_uri
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.model_utils import _get_overridden_pyfunc_model_config

from mlflow_trt.core.log import get_logger
from mlflow_trt.core.scratch import scratch_folder
from mlflow_trt.errors import ArtifactError, OptionError
from mlflow_trt.flavor.tracking import check_server_of
from mlflow_trt.store.folder import ModelFolder, read_folder
from mlflow_trt.store.record import FLAVOR_NAME, RECORD_FILE, Record

_CONFIG_VARIABLE = "MLFLOW_PYFUNC_INFERENCE_CONFIG"
_log = get_logger(__name__)


def fetch_folder(model_uri: str, dst_path: str | os.PathLike[str] | None = None) -> ModelFolder:
    """The folder of a model, downloaded to `dst_path` or to a new folder; a local one stays where it is without it.

    Raises ArtifactError where it is no model of this flavor.
    """
    local = local_path(model_uri)
    if dst_path is None and local.is_dir():
        return read_folder(local)
    return read_folder(download(model_uri, dst_path), model_uri)


def download(model_uri: str, dst_path: str | os.PathLike[str] | None) -> Path:
    """The folder of a model of any flavor, copied to `dst_path` or to a new folder."""
    local = local_path(model_uri)
    if dst_path is not None and local.is_dir():
        # Not by MLflow, which takes a per cent sign in a path for that of an escape, also when it reads the copy.
        name = local.resolve().name.replace("%", "_")
        return Path(shutil.copytree(local, Path(dst_path, name), dirs_exist_ok=True))
    _check_exists(model_uri)
    check_server_of(model_uri)
    given = None if dst_path is None else os.fspath(dst_path)
    return Path(_download_artifact_from_uri(model_uri, output_path=given))


@contextmanager
def open_folder(model_uri: str) -> Iterator[ModelFolder]:
    """The folder of a model, which is downloaded for the length of the block unless it is a local one.

    Raises ArtifactError where it is no model of this flavor.
    """
    if local_path(model_uri).is_dir():
        yield fetch_folder(model_uri)
        return
    with scratch_folder() as workdir:
        yield fetch_folder(model_uri, workdir)


def read_record(model_uri: str) -> Record:
    """The record of a model, without downloading its weights and engines.

    Raises ArtifactError where it is no model of this flavor.
    """
    return read_record_and_digest(model_uri)[0]


def read_record_and_digest(model_uri: str) -> tuple[Record, str]:
    """The same, and the sha256 of its file, which is what the load setting `expected_digest` wants."""
    local = local_path(model_uri)
    if local.is_dir():
        return _record_and_digest(read_folder(local))
    if local.is_file():
        raise ArtifactError(f"{model_uri} is a file, not a model of MLflow; make one of it with `mlflow-trt convert`")
    check_server_of(model_uri)
    model = read_mlmodel(model_uri)
    if FLAVOR_NAME not in model.flavors:
        raise ArtifactError(
            f"{model_uri} has the flavors {', '.join(model.flavors)}, not {FLAVOR_NAME}; "
            "make a model of it with mlflow_trt.log_model or `mlflow-trt convert`"
        )
    # A run's URI leads to a logged model, whose files are elsewhere.
    repository = get_artifact_repository(f"models:/{model.model_id}" if model.model_id else model_uri)
    with scratch_folder() as workdir:
        repository.download_artifacts(RECORD_FILE, workdir)
        return _record_and_digest(read_folder(workdir))


def _record_and_digest(folder: ModelFolder) -> tuple[Record, str]:
    return folder.record, folder.digest


def read_mlmodel(model_uri: str) -> Model:
    """What the file `MLmodel` of a model says, wherever it is.

    Raises ArtifactError where it is damaged or a folder lacks it, and what MLflow raises where a store does.
    """
    try:
        model = _load_mlmodel(model_uri)
        _check_flavors(model.flavors)
    except (ArtifactError, MlflowException, OSError):
        raise
    # MLflow reads YAML, and believes all it says.
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ArtifactError(
            f"the {MLMODEL_FILE_NAME} of {model_uri} is damaged ({reason[:200]}); download the model again"
        ) from error
    return model


def _load_mlmodel(model_uri: str) -> Model:
    local = local_path(model_uri)
    if local.is_dir():  # not by MLflow, which takes a per cent sign in a path for that of an escape
        if not (local / MLMODEL_FILE_NAME).is_file():
            raise ArtifactError(f"{model_uri} has no {MLMODEL_FILE_NAME}; download the model again", path=local)
        return Model.from_dict(yaml.safe_load((local / MLMODEL_FILE_NAME).read_text()))
    _check_exists(model_uri)
    return Model.load(model_uri)


def _check_exists(model_uri: str) -> None:
    """Raise ArtifactError for the path of nothing, of which MLflow speaks as of an artifact."""
    if ":/" not in model_uri and not local_path(model_uri).exists():
        raise ArtifactError(
            f"{model_uri} does not exist; expected the folder of a model, or a URI like models:/NAME/VERSION"
        )


def _check_flavors(flavors: Any) -> None:
    if not isinstance(flavors, dict) or not all(isinstance(fields, dict) for fields in flavors.values()):
        raise TypeError("its flavors are no mappings")
    if not isinstance(flavors.get(pyfunc.FLAVOR_NAME, {}).get(pyfunc.MODEL_CONFIG) or {}, dict):
        raise TypeError("its settings are no mapping")


def model_config_of(model: Model) -> dict[str, Any]:
    """The load settings that a model was logged with. Raises ArtifactError where it is no model for pyfunc."""
    if pyfunc.FLAVOR_NAME not in model.flavors:
        raise ArtifactError(
            f"its {MLMODEL_FILE_NAME} has the flavors {', '.join(map(str, model.flavors))}, not {pyfunc.FLAVOR_NAME}"
        )
    return model.flavors[pyfunc.FLAVOR_NAME].get(pyfunc.MODEL_CONFIG) or {}


def model_config_here(model: Model) -> dict[str, Any]:
    """The same, and over them what MLflow's environment variable says, as `mlflow.pyfunc.load_model` takes it.

    Raises OptionError where the variable holds no JSON object.
    """
    logged = dict(model_config_of(model))
    try:
        return _get_overridden_pyfunc_model_config(logged, {}, _log) or {}
    except (ValueError, TypeError) as error:
        raise OptionError(
            f"the environment variable {_CONFIG_VARIABLE} holds no load settings as a JSON object: {error}",
            option=_CONFIG_VARIABLE,
        ) from error


def check_files(model_uri: str) -> Record:
    """The record of a model in a store, after every file that it names was found to be there, by name and size.

    Nothing else is downloaded. Raises ArtifactError where it is no model of this flavor, or lacks a file.
    """
    repository = get_artifact_repository(model_uri)
    listed: dict[str, dict[str, int | None]] = {}

    def check(name: str, size: int | None = None) -> None:
        parent = posixpath.dirname(name)
        if parent not in listed:
            listed[parent] = {file.path: file.file_size for file in repository.list_artifacts(parent or None)}
        if name not in listed[parent]:
            raise ArtifactError(f"{model_uri} lacks its file {name}, which was deleted or never uploaded")
        if None not in (size, found := listed[parent][name]) and size != found:
            raise ArtifactError(f"{model_uri}: its file {name} has {found} bytes, and had {size} when it was logged")

    for name in (MLMODEL_FILE_NAME, RECORD_FILE):
        check(name)
    record = read_record(model_uri)
    for name, size in record.file_sizes().items():
        check(name, size)
    return record


def is_of_this_flavor(model_uri: str) -> bool:
    """Whether it is a model of this flavor, and neither an ONNX file nor a model of another one."""
    local = local_path(model_uri)
    if local.exists():
        return (local / RECORD_FILE).is_file()
    return ":/" in model_uri and FLAVOR_NAME in read_mlmodel(model_uri).flavors


def local_path(model_uri: str) -> Path:
    """What a path, or a URI of the scheme `file`, leads to; for any other URI, nothing that exists."""
    # A path may have a per cent sign, which is none of an escape.
    return Path(local_file_uri_to_path(model_uri) if model_uri.startswith("file:") else model_uri)
