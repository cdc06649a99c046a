"""Fetch a source for the length of a block: the ONNX file, what belongs to it, and where it came from."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.store.artifact.utils.models import get_model_name_and_version

from mlflow_trt.convert.recipe import ShapeRequest
from mlflow_trt.core.arrays import Feeds
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.scratch import scratch_folder
from mlflow_trt.errors import ArtifactError
from mlflow_trt.flavor.fetch import download, local_path, read_mlmodel
from mlflow_trt.flavor.tracking import check_server
from mlflow_trt.flavor.whole.package import WholeSource
from mlflow_trt.registry.sources.belongings import Belongings, find_belongings
from mlflow_trt.registry.sources.exporting import Export
from mlflow_trt.registry.sources.whole.convert import NEEDS as NEEDS_OF_WHOLE
from mlflow_trt.registry.sources.whole.convert import OpenedWhole, WholeOptions, open_whole
from mlflow_trt.registry.sources.whole.estimators import SKLEARN, open_estimator
from mlflow_trt.registry.sources.whole.find import check_flavor_conf, whole_flavor

ONNX = "onnx"
EXPORTED = "exported"
EXPORTERS = {"pytorch": "pytorch", "sklearn": "sklearn", "tensorflow": "tensorflow", "keras": "tensorflow"}
"""The flavors that are exported to ONNX first, and the modules here that do it."""

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """An ONNX file, and what the MLflow model that it is from carries over to what is made of it.

    `belongings` is what else was logged with it. `lineage` says where it came from, for the record. `tags` and
    `description` are those of a registered version. `whole` is what surrounds the network of a whole model, whose
    `shapes` are to be built for where nobody says otherwise, and `samples` are what it was seen to be called with.
    """

    path: Path
    lineage: Mapping[str, str]
    belongings: Belongings = field(default_factory=Belongings)
    signature: ModelSignature | None = None
    input_example: Any = None
    metadata: dict[str, Any] | None = None
    description: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    whole: WholeSource | None = None
    shapes: Sequence[ShapeRequest] = ()
    samples: Sequence[Feeds] | None = None


@contextmanager
def open_source(source: str | os.PathLike[str], options: WholeOptions | None = None) -> Iterator[SourceModel]:
    """An MLflow model, downloaded for the length of the block and exported to ONNX if need be, or an ONNX file.

    `options` are for whole models. Raises ArtifactError for an MLflow model of no flavor that can be converted,
    MissingDependencyError where its exporter is not installed, OnnxModelError where that fails.
    """
    source = os.fspath(source)
    local = local_path(source)
    if local.is_file() or (":/" not in source and not (local / MLMODEL_FILE_NAME).is_file()):
        yield SourceModel(path=local, lineage={"source": local.name})
        return
    with scratch_folder() as workdir:
        lineage, description, tags = _registered(source)
        if not local.exists():
            # A registry hands out the MLmodel file alone: what cannot be converted is not downloaded.
            _check_flavor(source, read_mlmodel(lineage["source"]))
        folder = download(lineage["source"], workdir)
        model = read_mlmodel(str(folder))
        identity = {key: value for key in ("model_id", "run_id") if (value := getattr(model, key))}
        path, exported, whole = _onnx_file(source, model, folder, options or WholeOptions())
        signature = model.signature
        if signature is not None and "left_out" in exported:
            signature = ModelSignature(inputs=signature.inputs, params=signature.params)
        yield SourceModel(
            path=path,
            lineage=lineage | identity | exported,
            belongings=find_belongings(model, folder),
            signature=signature,
            input_example=_input_example(model, folder),
            metadata=model.metadata or None,
            description=description,
            tags=tags,
            whole=whole.source if whole is not None else None,
            shapes=whole.shapes if whole is not None else (),
            samples=whole.samples if whole is not None else None,
        )


def _onnx_file(
    source: str, model: Model, folder: Path, options: WholeOptions
) -> tuple[Path, dict[str, str], OpenedWhole | None]:
    """The ONNX file of a downloaded model, exported where it has none, and what the lineage says about the export.

    For a whole model it is that of its network, and what surrounds that is there, too.
    """
    flavor = _check_flavor(source, model)
    if flavor == ONNX:
        path = folder / _data_of(source, model)
        if not path.exists():
            raise ArtifactError(f"{source} lacks the ONNX file {path.name} that its {MLMODEL_FILE_NAME} names")
        return path, {}, None
    target = folder / EXPORTED
    target.mkdir()
    if flavor == SKLEARN and options.whole:
        opened = open_estimator(model, folder, target, options)
        return opened.export.path, opened.export.lineage(flavor), opened
    if flavor == whole_flavor(model):
        opened = open_whole(source, model, folder, target, flavor, options)
        return opened.export.path, opened.export.lineage(flavor), opened
    export: Export = _exporter_of(flavor).export(model, folder, target)
    return export.path, export.lineage(flavor), None


def _data_of(source: str, model: Model) -> str:
    """The name of the ONNX file, which the MLmodel may not lead out of the folder with."""
    data = model.flavors[ONNX].get("data")
    path = PurePosixPath(data if isinstance(data, str) else "")
    if not path.parts or "\0" in str(path) or path.is_absolute() or ".." in path.parts:
        raise ArtifactError(
            f"the {MLMODEL_FILE_NAME} of {source} is damaged: its ONNX file is {data!r}, which is no file of the model"
        )
    return str(path)


def _check_flavor(source: str, model: Model) -> str:
    """The flavor to convert a model by.

    Raises ArtifactError where there is none, MissingDependencyError where its exporter is not installed.
    """
    flavor = next((flavor for flavor in (ONNX, *EXPORTERS) if flavor in model.flavors), None) or whole_flavor(model)
    if flavor is None:
        raise ArtifactError(
            f"{source} has the flavors {', '.join(model.flavors)}; expected onnx or one of {', '.join(EXPORTERS)}, "
            "transformers, sentence_transformers, or a PythonModel with a network in it. "
            "Export the model to ONNX and log it with mlflow.onnx.log_model, or convert the ONNX file itself."
        )
    if flavor in EXPORTERS:
        _exporter_of(flavor).NEEDS.check(source)
    elif flavor in NEEDS_OF_WHOLE:
        check_flavor_conf(model, source)
        NEEDS_OF_WHOLE[flavor].check(source)
    return flavor


def _exporter_of(flavor: str) -> Any:
    return importlib.import_module(f"mlflow_trt.registry.sources.{EXPORTERS[flavor]}")


def _registered(source: str) -> tuple[dict[str, str], str | None, Mapping[str, str]]:
    """The lineage of a source, and the description and tags of the registered version that it is, if it is one."""
    version = registered_version(source)
    if version is None:
        return {"source": source}, None, {}
    # The version, not the alias that was given: that may point elsewhere tomorrow.
    name, number = version.name, str(version.version)
    return {"source": f"models:/{name}/{number}", "name": name, "version": number}, version.description, version.tags


def registered_version(uri: str | os.PathLike[str]) -> ModelVersion | None:
    """The registered version that a URI names, if it names one: `models:/` may be followed by a logged model's id."""
    uri = os.fspath(uri)
    if not uri.startswith("models:/"):
        return None
    check_server()
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
