"""Fetch a source for the length of a block: the ONNX file, what belongs to it, and where it came from."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.store.artifact.utils.models import get_model_name_and_version
from mlflow.tracking.artifact_utils import _download_artifact_from_uri

from mlflow_trt._logging import get_logger
from mlflow_trt.errors import ArtifactError

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """An ONNX file, and what the MLflow model that it is from carries over to what is made of it.

    `lineage` says where it came from, for the record. `tags` and `description` are those of a registered version.
    """

    path: Path
    lineage: Mapping[str, str]
    signature: ModelSignature | None = None
    input_example: Any = None
    metadata: dict[str, Any] | None = None
    description: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def opened_source(source: str | os.PathLike[str]) -> Iterator[SourceModel]:
    """An MLflow model of flavor onnx, downloaded for the length of the block, or an ONNX file.

    Raises ArtifactError for an MLflow model that has no flavor onnx.
    """
    source = os.fspath(source)
    if ":/" not in source and not Path(source, MLMODEL_FILE_NAME).is_file():
        yield SourceModel(path=Path(source), lineage={"source": Path(source).name})
        return
    with tempfile.TemporaryDirectory(prefix="mlflow-trt-") as workdir:
        lineage, description, tags = _registered(source)
        folder = Path(_download_artifact_from_uri(lineage["source"], output_path=workdir))
        model = Model.load(str(folder))
        flavor = model.flavors.get("onnx")
        if flavor is None:
            raise ArtifactError(
                f"{source} has the flavors {', '.join(model.flavors)}; expected one of flavor onnx. "
                "Export the model to ONNX and log it with mlflow.onnx.log_model, or convert the ONNX file itself."
            )
        identity = {key: value for key in ("model_id", "run_id") if (value := getattr(model, key))}
        yield SourceModel(
            path=folder / flavor["data"],
            lineage=lineage | identity,
            signature=model.signature,
            input_example=_input_example(model, folder),
            metadata=model.metadata or None,
            description=description,
            tags=tags,
        )


def _registered(source: str) -> tuple[dict[str, str], str | None, Mapping[str, str]]:
    """The lineage of a source, and the description and tags of the registered version that it is, if it is one."""
    version = registered_version(source)
    if version is None:
        return {"source": source}, None, {}
    # The version, not the alias that was given: that may point elsewhere tomorrow.
    name, number = version.name, str(version.version)
    return {"source": f"models:/{name}/{number}", "name": name, "version": number}, version.description, version.tags


def registered_version(uri: str) -> ModelVersion | None:
    """The registered version that a URI names, if it names one: `models:/` may be followed by a logged model's id."""
    if not uri.startswith("models:/"):
        return None
    client = MlflowClient()
    found = get_model_name_and_version(client, uri)
    return client.get_model_version(*map(str, found)) if len(found) == 2 else None


def _input_example(model: Model, folder: Path) -> Any:
    """The example that a model was logged with; one that MLflow cannot read back is left behind."""
    try:
        return model.load_input_example(str(folder))
    except Exception as error:  # noqa: BLE001  # whatever is wrong with it, the model does not depend on it
        _log.warning("The input example of the source is not carried over, since it cannot be read: %s", error)
        return None
