"""Models that MLflow already has: convert them, and register the result."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.convert.onnx.model import read_onnx
from mlflow_trt.convert.recipe import BatchRequest, Recipe, ShapesRequest
from mlflow_trt.core.accuracy import Tolerance
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.progress_event import Progress
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.types import Gpu, Precision
from mlflow_trt.flavor.api import log_model, save_model
from mlflow_trt.flavor.mlmodel import check_names
from mlflow_trt.flavor.undo import set_alias, undo_logging, undone_on_failure
from mlflow_trt.pipeline.best import check_best
from mlflow_trt.pipeline.compile_kernels import check_kernels
from mlflow_trt.registry.lineage import asked, carried_tags, find_twin, point_to, recipe_digest, tags_of
from mlflow_trt.registry.sources.open import SourceModel, opened_source

_log = get_logger(__name__)


def convert_model_version(
    model_uri: str | os.PathLike[str],
    registered_model_name: str,
    *,
    precision: Precision | str | None = None,
    batch: BatchRequest | None = None,
    shapes: ShapesRequest | None = None,
    recipe: Recipe | None = None,
    targets: Sequence[str] | str | None = None,
    calibration_data: Any = None,
    verify: Tolerance | bool = True,
    store_kernels: bool = False,
    model_config: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    alias: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ModelVersion:
    """Convert a model and register the result as a new version of `registered_model_name`.

    The new version gets the source's signature, input example, description, metadata and tags. Its tags
    `mlflow_trt.source`, `.source_name`, `.source_version` and `.source_digest`, and its record, name the source, whose
    own tag `mlflow_trt.converted_to` lists what was made of it. What was made before, of the same source by the same
    recipe and TensorRT, is found and returned instead of made again.

    Args:
        model_uri: `models:/name/version`, `models:/name@alias`, `runs:/...`, or any other URI of an MLflow model; the
            path of an ONNX file will do as well.
        precision, batch, shapes, recipe, targets, calibration_data, verify, store_kernels, model_config, progress: as
            for `log_model`.
        tags: more tags of the new version; they come before those of the source.
        alias: set on the version once everything else succeeded.
        force: make a new version, even where there is one of the same source and recipe.

    Returns:
        The new version, or the one that was found.

    Raises:
        ArtifactError: the model is of no flavor that can be converted.
        Everything that `log_model` raises. After any failure or interruption the registry is as it was before.
    """
    request = Recipe.of(recipe, precision=precision, batch=batch, shapes=shapes, targets=targets)
    check_names(registered_model_name, tags, alias)
    kernels_for = refuse_early(request, model_config, verify, store_kernels=store_kernels)
    with opened_source(model_uri) as source:
        digest = recipe_digest(request, trt.load(), asked(model_config, calibration_data, verify, kernels_for))
        client = MlflowClient()
        with undone_on_failure() as undo:
            version = None
            if not force:
                version = find_twin(client, registered_model_name, source.lineage, source_digest(source), digest)
            if version is not None:
                _log.info(
                    "models:/%s/%s was made of the same source by the same recipe; force makes another version",
                    version.name,
                    version.version,
                )
            else:
                logged = undo_logging(undo, registered_model_name)
                info = log_model(
                    source.path,
                    name=logged_name(registered_model_name),
                    recipe=request,
                    calibration_data=calibration_data,
                    verify=verify,
                    store_kernels=store_kernels,
                    signature=source.signature,
                    input_example=source.input_example,
                    metadata=source.metadata,
                    model_config=model_config,
                    registered_model_name=registered_model_name,
                    tags={**carried_tags(source.tags), **tags_of(source.lineage, digest), **(tags or {})},
                    lineage=source.lineage,
                    progress=progress,
                )
                logged(str(info.model_id))
                version = client.get_model_version(registered_model_name, str(info.registered_model_version))
                if source.description:
                    client.update_model_version(version.name, str(version.version), source.description)
                point_to(undo, source.lineage, version)
            if alias is not None:
                set_alias(undo, registered_model_name, alias, str(version.version))
    return client.get_model_version(registered_model_name, str(version.version))


def convert_to_folder(
    model_uri: str | os.PathLike[str],
    path: str | os.PathLike[str],
    recipe: Recipe,
    *,
    calibration_data: Any = None,
    verify: Tolerance | bool = True,
    store_kernels: bool = False,
    model_config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Convert a model and write the result to a new folder, with all that `convert_model_version` carries over."""
    refuse_early(recipe, model_config, verify, store_kernels=store_kernels)
    with opened_source(model_uri) as source:
        save_model(
            source.path,
            path,
            recipe=recipe,
            calibration_data=calibration_data,
            verify=verify,
            store_kernels=store_kernels,
            signature=source.signature,
            input_example=source.input_example,
            metadata=source.metadata,
            model_config=model_config,
            lineage=source.lineage,
            progress=progress,
        )


def refuse_early(
    recipe: Recipe, model_config: Mapping[str, Any] | None, verify: Tolerance | bool, *, store_kernels: bool
) -> Gpu | None:
    """What cannot be measured or compiled here is said before a model is downloaded and exported.

    Returns the GPU that kernels are going to be stored for.
    """
    settings = LoadSettings.of(model_config)
    if recipe.precision is Precision.BEST:
        check_best(recipe, settings, verify)
    return check_kernels(recipe, settings).gpu if store_kernels else None


def logged_name(registered_model_name: str) -> str:
    """What a registered model may be called, a logged one may not."""
    return re.sub(r"[/:.%\"']", "-", registered_model_name)


def source_digest(source: SourceModel) -> str:
    """The sha256 that the record of what is made of this source is going to name."""
    with tempfile.TemporaryDirectory(prefix="mlflow-trt-") as workdir:
        return read_onnx(source.path, Path(workdir)).digest
