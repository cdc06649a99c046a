"""Models that MLflow already has: convert them, and register the result."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from mlflow_trt.convert.onnx.model import OnnxModel
from mlflow_trt.convert.recipe import BatchRequest, Recipe, ShapesRequest
from mlflow_trt.core.accuracy import Tolerance
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.output_folder import check_target
from mlflow_trt.core.progress_event import Progress
from mlflow_trt.core.settings import ModelConfig
from mlflow_trt.core.types import Precision
from mlflow_trt.flavor.conversions import LoggingOptions, log_conversion, save_conversion
from mlflow_trt.flavor.describe import describe_version
from mlflow_trt.flavor.fetch import read_record
from mlflow_trt.flavor.metrics import complete_metrics
from mlflow_trt.flavor.mlmodel import PackagingOptions, check_names
from mlflow_trt.flavor.recognize import tags_missing
from mlflow_trt.flavor.register import complete_version, set_alias
from mlflow_trt.flavor.signatures import with_graph_names
from mlflow_trt.flavor.tracking import check_server
from mlflow_trt.flavor.undo import undo_on_failure
from mlflow_trt.pipeline.make import PreparedConversion, open_onnx, prepare_conversion
from mlflow_trt.pipeline.options import ConversionOptions
from mlflow_trt.registry.lineage import copied_tags, find_twin, point_to, recipe_digest
from mlflow_trt.registry.sources.belongings import Belongings
from mlflow_trt.registry.sources.open import SourceModel, open_source
from mlflow_trt.registry.sources.whole.convert import WholeOptions
from mlflow_trt.store import cache

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
    calibration_cache: str | os.PathLike[str] | None = None,
    verify: Tolerance | bool = True,
    store_kernels: bool = False,
    model_config: ModelConfig = None,
    allow_external_data_from: str | os.PathLike[str] | None = None,
    tags: Mapping[str, Any] | None = None,
    alias: str | None = None,
    force: bool = False,
    whole: bool = False,
    network: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ModelVersion:
    """Convert a model and register the result as a new version of `registered_model_name`.

    The new version gets the source's signature, without inputs that have no name there, its input example, description,
    metadata, tags, params, code, extra files, requirements of its own and options for ONNX Runtime; its description
    begins with a line of its own. What it cannot get is named in a remark. Its tag `mlflow_trt.source` and its record
    name the source, which has a tag `mlflow_trt.converted_to.<name>.<version>` for each version that was made of it.
    What was made before, of the same source by the same recipe and TensorRT, is found and returned instead
    of made again, if it can be loaded.

    Keywords that are not listed here are those of `save_model`.

    Args:
        model_uri: `models:/name/version`, `models:/name@alias`, `runs:/...`, or any other URI of an MLflow model; the
            path of an ONNX file will do as well.
        registered_model_name: the registered model that gets the new version; it is created if need be.
        tags: more tags of the new version; they come before those of the source.
        alias: set on the version once everything else succeeded.
        force: make a new version, even where there is one of the same source and recipe.
        whole: let the result of a scikit-learn model answer as its `predict` does, with labels and not probabilities.
            Models of transformers and sentence_transformers and PythonModels are always converted as a whole.
        network: which network of a PythonModel to convert, where it has several: `self.encoder`.
        trust_remote_code: convert a model that brings Python code of its own beside its weights, which loading it runs.

    Returns:
        The new version, or the one that was found.

    Raises:
        ArtifactError: the model is of no flavor that can be converted.
        MlflowTrtError: what `save_model` raises. After any failure or interruption the registry is as it was before.
    """
    options = ConversionOptions(
        recipe=Recipe.of(recipe, precision=precision, batch=batch, shapes=shapes, targets=targets),
        calibration_data=calibration_data,
        calibration_cache=calibration_cache,
        verify=verify,
        store_kernels=store_kernels,
        model_config=model_config,
        allow_external_data_from=allow_external_data_from,
        progress=progress,
        whole=whole,
        network=network,
        trust_remote_code=trust_remote_code,
    )
    check_names(registered_model_name, tags, alias)
    prepared = prepare_conversion(options)
    return convert_to_version(model_uri, registered_model_name, prepared, tags=tags, alias=alias, force=force)


def convert_to_version(
    model_uri: str | os.PathLike[str],
    registered_model_name: str,
    prepared: PreparedConversion,
    *,
    tags: Mapping[str, Any] | None = None,
    alias: str | None = None,
    force: bool = False,
) -> ModelVersion:
    """`convert_model_version`, with options that were checked before."""
    with converted_version(model_uri, registered_model_name, prepared, tags=tags, alias=alias, force=force) as version:
        return version


@contextmanager
def converted_version(
    model_uri: str | os.PathLike[str],
    registered_model_name: str,
    prepared: PreparedConversion,
    *,
    tags: Mapping[str, Any] | None = None,
    alias: str | None = None,
    force: bool = False,
) -> Iterator[ModelVersion]:
    """`convert_to_version`, for what is only done once the block has done what it has to do with the version."""
    check_names(registered_model_name, tags, alias)
    check_server()
    client = MlflowClient()
    # First, and so last to end: removing the temporary folders may be interrupted too.
    with (
        undo_on_failure() as undo,
        open_source(model_uri, whole_options(prepared.options)) as source,
        open_onnx(source.path, prepared.options) as model,
    ):
        digest = recipe_digest(prepared, source.whole)
        wanted = {**copied_tags(source.tags), **(tags or {})}
        find = partial(find_twin, client, registered_model_name, source.lineage, model.digest, digest)
        with nullcontext() if force else _alone(registered_model_name, source.lineage, model.digest, digest):
            version = None if force else find()
            if version is None:
                logging = LoggingOptions(
                    name=logged_model_name(registered_model_name),
                    registered_model_name=registered_model_name,
                    description=source.description,
                    tags=wanted,
                    params=source.belongings.params,
                    model_type=source.belongings.model_type,
                )
                packaging = _packaging_of(source, model, digest)
                own = _with_settings_of(source, with_network_of(prepared, source))
                info = log_conversion(model, own, packaging, logging, undo)
                version = client.get_model_version(registered_model_name, str(info.registered_model_version))
                # The lock is this machine's: somebody elsewhere may have been a moment earlier, and then keeps it.
                earlier = None if force else find(before=int(version.version))
                if earlier is not None:
                    undo.run()
                    version = earlier
                    _tell_found(version)
            else:
                _tell_found(version)
                record = read_record(f"models:/{version.name}/{version.version}")
                complete_version(
                    undo,
                    client,
                    version,
                    {**tags_missing(record, version.tags), **wanted},
                    describe_version(record, source.description),
                )
                complete_metrics(undo, client, version)
            point_to(undo, source.lineage, version)
            if alias is not None:
                set_alias(undo, registered_model_name, alias, str(version.version))
            yield client.get_model_version(registered_model_name, str(version.version))


def _alone(
    registered_model_name: str, lineage: Mapping[str, str], source_digest: str, digest: str
) -> AbstractContextManager[None]:
    """One conversion at a time, on this machine, of one source by one recipe to one name in one registry."""
    return cache.lock_key(
        cache.key_of(
            {
                "registry": mlflow.get_registry_uri(),
                "name": registered_model_name,
                "source": [lineage.get("name"), lineage.get("version"), source_digest],
                "recipe": digest,
            }
        )
    )


def _tell_found(version: ModelVersion) -> None:
    _log.info(
        "models:/%s/%s was made of the same source by the same recipe; force makes another version",
        version.name,
        version.version,
    )


def convert_to_folder(model_uri: str | os.PathLike[str], path: Path, options: ConversionOptions) -> None:
    """Convert a model and write the result to a new folder, with all that `convert_model_version` carries over."""
    check_target(path)
    prepared = prepare_conversion(options)
    with open_source(model_uri, whole_options(options)) as source, open_onnx(source.path, options) as model:
        own = _with_settings_of(source, with_network_of(prepared, source))
        save_conversion(model, path, own, _packaging_of(source, model, recipe_digest(prepared)))


def whole_options(options: ConversionOptions) -> WholeOptions:
    """What the options of a conversion say of a whole model."""
    return WholeOptions(
        whole=options.whole,
        network=options.network,
        data=options.calibration_data,
        recipe=options.recipe,
        trust_remote_code=options.trust_remote_code,
    )


def with_network_of(prepared: PreparedConversion, source: SourceModel) -> PreparedConversion:
    """The options for the network of a whole model: the data are what it was called with, and so are the shapes.

    For any other source they are what they were.
    """
    if source.whole is None:
        return prepared
    options = prepared.options
    recipe = options.recipe if options.recipe.shapes else replace(options.recipe, shapes=tuple(source.shapes))
    return replace(prepared, options=replace(options, recipe=recipe, calibration_data=source.samples))


def _packaging_of(source: SourceModel, model: OnnxModel, digest: str) -> PackagingOptions:
    """What the MLflow model of a source hands on to the one that is made of it, by the recipe of that digest.

    Where its signature gets the names of the graph, the lineage keeps it as it was.
    """
    before, lineage = source.signature, source.lineage
    signature = before
    if (
        before is not None and source.whole is None
    ):  # which takes and gives what the source does, not what the graph does
        signature = with_graph_names(before, model.inputs, model.outputs)
    if before is not None and signature != before:
        lineage = {**lineage, "signature": json.dumps(before.to_dict())}
    # Around the network of a whole model everything stays as it was: code, files and requirements are there already.
    belongings = source.belongings if source.whole is None else Belongings()
    return PackagingOptions(
        signature=signature,
        input_example=source.input_example,
        metadata=source.metadata,
        code_paths=belongings.code_paths,
        extra_files=belongings.extra_files,
        extra_pip_requirements=belongings.requirements,
        lineage={**lineage, "recipe_digest": digest},
        whole=source.whole,
        remarks=belongings.remarks if source.whole is None else source.whole.remarks,
    )


def _with_settings_of(source: SourceModel, prepared: PreparedConversion) -> PreparedConversion:
    """With the source's options for ONNX Runtime, where the user gave none."""
    options = prepared.options
    settings = source.belongings.settings(options.model_config)
    return replace(prepared, options=replace(options, model_config=settings))


def logged_model_name(registered_model_name: str) -> str:
    """What a registered model may be called, a logged one may not."""
    return re.sub(r"[/:.%\"']", "-", registered_model_name)
