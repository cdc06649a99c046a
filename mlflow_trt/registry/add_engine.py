"""One more engine for a model that has some: for this machine, or for other GPUs. Makes a new version of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.utils.file_utils import get_total_file_size
from packaging.version import Version

from mlflow_trt.backends import cuda_driver as hardware
from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.convert.engine.builder import build_engine
from mlflow_trt.convert.engine.output_shapes import check_output_shapes
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.core.compatibility import why_not
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.progress import choose_progress
from mlflow_trt.core.progress_event import Progress
from mlflow_trt.core.scratch import scratch_folder
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.types import EngineRecord, Gpu, HardwareCompatibility, Interface
from mlflow_trt.errors import EngineMismatchError, OptionError, RecipeError, RuntimeUnavailableError
from mlflow_trt.flavor.describe import describe_version, text_below
from mlflow_trt.flavor.fetch import fetch_folder, read_mlmodel
from mlflow_trt.flavor.mlmodel import check_names, flavor_fields
from mlflow_trt.flavor.recognize import params_from, tags_from
from mlflow_trt.flavor.register import log_folder, register_version, set_alias
from mlflow_trt.flavor.undo import Undo, undo_on_failure
from mlflow_trt.pipeline import compile_kernels as kernels
from mlflow_trt.registry.convert_version import logged_model_name
from mlflow_trt.registry.lineage import copied_tags, point_to
from mlflow_trt.registry.sources.open import registered_version
from mlflow_trt.store.folder import ModelFolder, read_folder
from mlflow_trt.store.load import open_tensorrt
from mlflow_trt.store.plugins import check_plugins
from mlflow_trt.store.record import FLAVOR_NAME, Record
from mlflow_trt.store.write_folder import add_engine_file, mark_extended

_log = get_logger(__name__)


def add_engine(
    model_uri: str,
    *,
    targets: Sequence[str] | str = (),
    registered_model_name: str | None = None,
    alias: str | None = None,
    store_kernels: bool = False,
    plugins: Sequence[str] = (),
    progress: Progress | None = None,
) -> ModelVersion:
    """Build an engine from a model's typed model, by its recipe, and register a new version that holds it as well.

    Args:
        model_uri: a registered version of this flavor: `models:/name/version` or `models:/name@alias`.
        targets: compute capabilities to build for, with TensorRT-RTX; without them, the GPU of this machine.
        registered_model_name: register the new version under this name instead of the model's own.
        alias: set on the new version, after everything else succeeded.
        store_kernels: compile the kernels of TensorRT-RTX on this machine's GPU, and store them with the engine, also
            with one that is there and has none for it.
        plugins: the libraries with the plugins that the model's engines were built with, or these compiled for here.
        progress: called while the engine is built; None shows it on standard error.

    Returns:
        The new version, or the one that was given where it has such an engine already.

    Raises:
        OptionError: the URI names no registered version.
        ArtifactError: it is no model of this flavor.
        RecipeError: there is neither a GPU nor a target.
        RuntimeUnavailableError: kernels are to be stored, and there is no GPU to compile them on.
        SelfTestError: the new engine answers wrongly on this machine.
        BuildError: TensorRT built no engine. After any failure or interruption the registry is as it was before.
    """
    with extended_version(
        model_uri,
        targets=targets,
        registered_model_name=registered_model_name,
        alias=alias,
        store_kernels=store_kernels,
        plugins=plugins,
        progress=progress,
    ) as version:
        return version


@contextmanager
def extended_version(
    model_uri: str,
    *,
    targets: Sequence[str] | str,
    registered_model_name: str | None = None,
    alias: str | None = None,
    store_kernels: bool = False,
    compiler: kernels.KernelCompiler | None = None,
    plugins: Sequence[str] = (),
    progress: Progress | None = None,
) -> Iterator[ModelVersion]:
    """`add_engine`, taken back as well where the block fails that does something with the version.

    With a `compiler`, kernels are compiled there and not on this machine's GPU.
    """
    version = registered_version(model_uri)
    if version is None:
        raise OptionError(f"{model_uri} is no registered version; expected models:/name/version or models:/name@alias")
    name = registered_model_name or version.name
    check_names(name, alias=alias)
    if store_kernels:
        compiler = kernels.check_kernels(Recipe(targets=targets) if targets else None, LoadSettings(), compiler)
    else:
        compiler = None
    with scratch_folder() as workdir, undo_on_failure() as undo:
        uri = f"models:/{version.name}/{version.version}"
        folder = fetch_folder(uri, workdir)
        tensorrt = trt.load()
        check_plugins(folder.record.engines, plugins)
        recipe, gpu = _recipe_here(replace(folder.record.recipe, plugins=tuple(plugins)), tensorrt, targets)
        there = _engine_that_serves(folder.record, tensorrt, recipe, gpu)
        if there is not None and (compiler is None or kernels.has_kernels(folder.record, compiler.gpu)):
            _log.info("%s has an engine for this already: %s", uri, there)
            yield version
            return
        engine = _built(folder, tensorrt, recipe, workdir, progress) if there is None else None
        # Written by MLflow when it downloads, about the version that was downloaded.
        (folder.path / "registered_model_meta").unlink(missing_ok=True)
        if engine is not None:
            extended = add_engine_file(folder.path, engine, workdir / "engine.plan", extends=uri)
        else:
            extended = mark_extended(folder.path, extends=uri)
        if compiler is not None:
            extended = kernels.store_kernels(folder.path, compiler)
        if gpu is not None:
            _try(folder.path, plugins)
        tags = {**tags_from(extended), **copied_tags(version.tags)}
        text = text_below(folder.record, version.description)
        made = _logged(undo, folder.path, extended, name, tags, describe_version(extended, text))
        lineage = {"source": uri, "name": version.name, "version": str(version.version)}
        point_to(undo, lineage, made)
        if alias is not None:
            set_alias(undo, name, alias, str(made.version))
        yield MlflowClient().get_model_version(name, str(made.version))


def _recipe_here(recipe: Recipe, tensorrt: trt.TensorRT, targets: Sequence[str] | str) -> tuple[Recipe, Gpu | None]:
    """The recipe for the targets, or for the GPU of this machine, which is then returned too."""
    here = replace(recipe, targets=(targets,) if isinstance(targets, str) else tuple(targets), timing_cache=None)
    if tensorrt.is_rtx:
        here = replace(here, hardware_compatibility=HardwareCompatibility.NONE, version_compatible=False)
    if here.targets:
        return here, None
    found = hardware.probe()
    if not found.gpus:
        raise RecipeError(
            f"there is no GPU here to build an engine for ({found.problem}); run this on the GPU machine, or name GPUs "
            "with targets=, such as sm120, for which TensorRT-RTX builds anywhere",
            option="targets",
        )
    target = str(found.gpus[0].compute_capability)
    return (replace(here, targets=(target,)) if target in tensorrt.compute_capabilities() else here), found.gpus[0]


def _engine_that_serves(record: Record, tensorrt: trt.TensorRT, recipe: Recipe, gpu: Gpu | None) -> EngineRecord | None:
    for engine in record.engines:
        if gpu is not None:
            if why_not(engine, tensorrt.distribution, tensorrt.version, gpu) is None:
                return engine
        elif (engine.distribution, engine.version) == (tensorrt.distribution, tensorrt.version) and set(
            recipe.targets
        ) <= set(engine.compute_capabilities):
            return engine
    return None


def _built(
    folder: ModelFolder, tensorrt: trt.TensorRT, recipe: Recipe, workdir: Path, progress: Progress | None
) -> EngineRecord:
    record = folder.record
    with choose_progress("Building another TensorRT engine", progress) as shown:
        built = build_engine(
            folder.checked_model(record.typed),
            workdir / "engine.plan",
            recipe,
            record.profiles,
            interface=Interface(record.inputs, record.outputs),
            distribution=tensorrt.distribution,
            progress=shown,
        )
    if record.golden is not None:
        golden = folder.read_golden(record.golden)
        check_output_shapes(built.engine, built.shapes, [(golden.feeds, golden.outputs)], record.batch_axis)
    return built.engine


def _try(path: Path, plugins: Sequence[str]) -> None:
    """Run the golden sample on the new engine, where this machine has what that needs. Raises SelfTestError."""
    try:
        open_tensorrt(read_folder(path), LoadSettings(on_mismatch="error", plugins=plugins)).close()
    except (RuntimeUnavailableError, EngineMismatchError) as error:
        _log.warning("The new engine was not tested here: %s", error.message)


def _logged(
    undo: Undo, folder: Path, record: Record, name: str, tags: Mapping[str, str], description: str | None
) -> ModelVersion:
    """Log the folder as a model and register it."""
    written = read_mlmodel(str(folder))
    written.flavors[FLAVOR_NAME] |= flavor_fields(record)
    _widen_requirements(folder, record)
    written.model_size_bytes = get_total_file_size(folder)
    (folder / MLMODEL_FILE_NAME).unlink()
    info = log_folder(
        undo,
        folder,
        written,
        name=logged_model_name(name),
        params=params_from(record),
        tags=tags,
        description=description,
    )
    return register_version(undo, name, str(info.model_id), tags=tags, description=description)


def _widen_requirements(folder: Path, record: Record) -> None:
    """Engines of several releases want any of them: two pins of one package could not be installed."""
    for distribution in {engine.distribution for engine in record.engines}:
        releases = {engine.version for engine in record.engines if engine.distribution is distribution}
        ordered = sorted(releases, key=Version)
        if len(ordered) < 2:
            continue
        pin = re.compile(rf"(?<![\w-]){distribution.requirement}(==[\w.+!]+|>=[\w.+!]+,<=[\w.+!]+)")
        for file in (folder / "requirements.txt", folder / "conda.yaml"):
            text = file.read_text()
            file.write_text(pin.sub(f"{distribution.requirement}>={ordered[0]},<={ordered[-1]}", text))
