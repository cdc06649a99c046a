"""Models of flavor onnx that MLflow already has: fetch them, convert them, register the result."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.store.artifact.utils.models import get_model_name_and_version
from mlflow.tracking.artifact_utils import _download_artifact_from_uri

from mlflow_trt.convert.builder import Progress
from mlflow_trt.convert.recipe import BatchRequest, Recipe, ShapesRequest
from mlflow_trt.errors import ArtifactError
from mlflow_trt.flavor import log_model
from mlflow_trt.spec import Precision

SOURCE_TAG = "mlflow_trt.source"


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """An ONNX file, the signature of the MLflow model it is from, and where that came from, for the record."""

    path: Path
    signature: ModelSignature | None
    lineage: Mapping[str, str]


def convert_model_version(
    model_uri: str | os.PathLike[str],
    registered_model_name: str,
    *,
    precision: Precision | str | None = None,
    batch: BatchRequest | None = None,
    shapes: ShapesRequest | None = None,
    recipe: Recipe | None = None,
    targets: Sequence[str] | str | None = None,
    model_config: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> ModelVersion:
    """Convert a model of flavor onnx and register the result as a new version of `registered_model_name`.

    Args:
        model_uri: `models:/name/version`, `models:/name@alias`, `runs:/...`, or any other URI of an MLflow model; the
            path of an ONNX file will do as well.
        precision, batch, shapes, recipe, targets, model_config, tags, progress: as for `log_model`.

    Returns:
        The new version. Its tag `mlflow_trt.source` and its record name the model it was made from.

    Raises:
        ArtifactError: the model has no flavor onnx.
        Everything that `log_model` raises; then nothing was logged or registered.
    """
    with opened_source(model_uri) as source:
        info = log_model(
            source.path,
            # What a registered model may be called, a logged one may not.
            name=re.sub(r"[/:.%\"']", "-", registered_model_name),
            precision=precision,
            batch=batch,
            shapes=shapes,
            recipe=recipe,
            targets=targets,
            signature=source.signature,
            model_config=model_config,
            registered_model_name=registered_model_name,
            tags={SOURCE_TAG: source.lineage["source"], **(tags or {})},
            lineage=source.lineage,
            progress=progress,
        )
    return MlflowClient().get_model_version(registered_model_name, str(info.registered_model_version))


@contextmanager
def opened_source(source: str | os.PathLike[str]) -> Iterator[SourceModel]:
    """An MLflow model of flavor onnx, downloaded for the length of the block, or an ONNX file.

    Raises ArtifactError for an MLflow model that has no flavor onnx.
    """
    source = os.fspath(source)
    if ":/" not in source and not Path(source, MLMODEL_FILE_NAME).is_file():
        yield SourceModel(path=Path(source), signature=None, lineage={"source": Path(source).name})
        return
    with tempfile.TemporaryDirectory(prefix="mlflow-trt-") as workdir:
        folder = Path(_download_artifact_from_uri(source, output_path=workdir))
        model = Model.load(str(folder))
        flavor = model.flavors.get("onnx")
        if flavor is None:
            raise ArtifactError(
                f"{source} has the flavors {', '.join(model.flavors)}; expected one of flavor onnx. "
                "Export the model to ONNX and log it with mlflow.onnx.log_model, or convert the ONNX file itself."
            )
        yield SourceModel(path=folder / flavor["data"], signature=model.signature, lineage=_lineage(source, model))


def _lineage(source: str, model: Model) -> dict[str, str]:
    lineage = {"source": source}
    if source.startswith("models:/"):
        found = get_model_name_and_version(MlflowClient(), source)
        if len(found) == 2:  # else the URI names a logged model by its id
            name, version = map(str, found)
            # The version, not the alias that was given: that may point elsewhere tomorrow.
            lineage |= {"source": f"models:/{name}/{version}", "name": name, "version": version}
    for key, value in (("model_id", model.model_id), ("run_id", model.run_id)):
        if value:
            lineage[key] = value
    return lineage
