"""Where a version came from, what was made of it, and whether that was done before.

A version that was made carries `mlflow_trt.source`, the URI of the version that it was made from, and
`mlflow_trt.fingerprint`, by which it is found again; its record has the digests of source and recipe. The source
version carries a tag `mlflow_trt.converted_to.<name>.<version>` for each version that was made of it, whose value is
its URI.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from mlflow_trt.backends import cuda_driver as hardware
from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.convert.engine.builder import describe_plugins
from mlflow_trt.convert.onnx.model import sha256_of
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.core.accuracy import Tolerance
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.types import Precision
from mlflow_trt.errors import ArtifactError
from mlflow_trt.flavor.recognize import is_refusal, own_tags, tell_refused
from mlflow_trt.flavor.register import check_version
from mlflow_trt.flavor.tags import PREFIX, converted_tag, fingerprint, fingerprint_in
from mlflow_trt.flavor.undo import Undo, exists, versions_of
from mlflow_trt.flavor.whole.package import WholeSource
from mlflow_trt.pipeline.make import PreparedConversion
from mlflow_trt.store import cache
from mlflow_trt.store.record import Record

_NOT_IN_DIGEST = frozenset({"timing_cache"})  # how fast an engine is built, not what it is
_log = get_logger(__name__)


def recipe_digest(prepared: PreparedConversion, whole: WholeSource | None = None) -> str:
    """The sha256 of what makes two conversions of one source twins: the recipe, TensorRT, and the other options.

    For a whole model it is also that of everything around its network.

    Options at their defaults are left out, so that a release with more options still finds what older ones made.
    """
    options, tensorrt = prepared.options, trt.load()
    recipe, defaults = options.recipe, Recipe()
    changed = {
        name: value
        for name, value in asdict(recipe).items()
        if name not in _NOT_IN_DIGEST and value != getattr(defaults, name)
    }
    if recipe.plugins:
        changed["plugins"] = [plugin.sha256 for plugin in describe_plugins(recipe.plugins)]
    is_chosen_here = recipe.precision is Precision.BEST
    gpus = () if tensorrt.is_rtx and not is_chosen_here else hardware.probe().gpus
    verify, compiler = options.verify, prepared.compiler
    rest = {
        "model_config": options.model_config,
        "calibration_data": _data_digest(options.calibration_data),
        "calibration_cache": _data_digest(options.calibration_cache),
        "verify": asdict(verify) if isinstance(verify, Tolerance) else None if verify else False,
        "as_a_whole": options.whole or None,
        "network": options.network,
        "whole": None if whole is None else whole.digest,
        "kernels_for": None if compiler is None else str(compiler.gpu.compute_capability),
    }
    return cache.key_of(
        {
            "recipe": changed,
            "tensorrt": str(tensorrt),
            "gpu": gpus[0].name if gpus else None,
            **{name: value for name, value in rest.items() if value is not None},
        }
    )


def _data_digest(data: Any) -> str | None:
    """The digest of sample inputs. What can be read only once, such as an iterator, is never the same again.

    Nor is what makes no arrays, which is for the conversion to refuse.
    """
    if data is None:
        return None
    if isinstance(data, (str, os.PathLike)):
        return sha256_of(Path(data)) if Path(data).is_file() else str(data)
    if hasattr(data, "digest"):
        return str(data.digest)  # an MLflow dataset
    if isinstance(data, np.ndarray):
        data = {"": data}
    if not isinstance(data, (Mapping, pd.DataFrame)):
        return uuid.uuid4().hex
    try:
        arrays = {name: _array(values) for name, values in data.items()}
    except ValueError:
        return uuid.uuid4().hex
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape};".encode() + array.tobytes())
    return digest.hexdigest()


def _array(values: Any) -> npt.NDArray[Any]:
    array = np.asarray(values)
    return np.stack([np.asarray(cell) for cell in array]) if array.dtype == object else array


def copied_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags that a user gave to a source version, without those of MLflow and of this package."""
    return {key: value for key, value in tags.items() if not key.startswith(("mlflow.", PREFIX))}


def find_twin(
    client: MlflowClient,
    registered_model_name: str,
    lineage: Mapping[str, str],
    source_digest: str,
    digest: str,
    *,
    before: int | None = None,
) -> ModelVersion | None:
    """The newest usable version that was made of the same source by the same recipe.

    With `before`, the oldest with a lower number: of several that were made at the same time, everyone takes that one.
    """
    if not exists(client, registered_model_name):
        return None
    found = list(versions_of(client, registered_model_name))
    if before is not None:
        found = [version for version in reversed(found) if int(version.version) < before]
    wanted = fingerprint(lineage.get("name"), lineage.get("version"), source_digest, digest)
    for version in found:
        tags = own_tags(client, version)
        if tags is None or fingerprint_in(tags) != wanted:
            continue
        record = _usable_record(client, version)
        if record is not None and _is_made_of(record, lineage, source_digest, digest):
            return version
    return None


def _is_made_of(record: Record, lineage: Mapping[str, str], source_digest: str, digest: str) -> bool:
    # What was never registered is a logged model, or a file of those bytes, which has neither of these.
    keys = ("name", "version") if "version" in lineage else ("name", "version", "model_id")
    same = all(record.lineage.get(key) == lineage.get(key) for key in keys)
    return same and record.lineage.get("recipe_digest") == digest and record.source.digest == source_digest


def _usable_record(client: MlflowClient, version: ModelVersion) -> Record | None:
    try:
        return check_version(client, version)
    except ArtifactError as error:
        _log.warning("A version of the same source and recipe cannot be loaded, and is not used: %s", error.message)
        return None


def point_to(undo: Undo, lineage: Mapping[str, str], made: ModelVersion) -> None:
    """Tag the source version, where the source is a registered one, with the URI of what was made of it."""
    if "version" not in lineage:
        return
    client = MlflowClient()
    name, number = lineage["name"], lineage["version"]
    key, uri = converted_tag(made.name, str(made.version)), f"models:/{made.name}/{made.version}"

    def pointed() -> bool:
        return client.get_model_version(name, number).tags.get(key) == uri

    def restore() -> None:
        if pointed():
            client.delete_model_version_tag(name, number, key)

    if not pointed():
        try:
            undo.change(
                f"The tag {key} of {lineage['source']}",
                lambda: client.set_model_version_tag(name, number, key, uri),
                restore=restore,
            )
        except MlflowException as error:
            if not is_refusal(error):
                raise
            tell_refused(name, number, key, error)
