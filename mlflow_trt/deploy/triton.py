"""A model as a model repository of Triton Inference Server."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from packaging.version import Version

from mlflow_trt.backends.onnxruntime_process import IsolatedModel
from mlflow_trt.core.output_folder import check_target, write_aside
from mlflow_trt.core.types import ComputeCapability, Distribution, EngineRecord, Precision, Weights
from mlflow_trt.deploy.triton_config import Layout, config_text, largest_batch, max_batch_size, warmup_files
from mlflow_trt.deploy.triton_python import REMARKS, python_config_text, write_mlflow_model
from mlflow_trt.errors import EngineMismatchError, ExecutionError, MissingDependencyError, OptionError
from mlflow_trt.flavor.fetch import open_folder
from mlflow_trt.store.folder import ModelFolder
from mlflow_trt.store.record import Record, StoredModel

BACKENDS = ("tensorrt", "onnxruntime", "mlflow_trt")
_VERSION_FOLDER = "1"
# ONNX Runtime has few kernels for these, so it gets the model as it was before.
_SOURCE_FOR_ONNXRUNTIME = {Precision.BF16, Precision.FP8}


class _ModelRepository(NamedTuple):
    """The files of a model's version, as `Layout` names them, what the backend sees in them, and what to say of it."""

    record: Record
    default_file: str
    files_by_capability: Mapping[str, str]
    remarks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TritonModel:
    """What was written. `path` is the model's folder; `remarks` say what Triton needs, and what was left out."""

    path: Path
    backend: str
    max_batch_size: int
    files: tuple[str, ...]
    remarks: tuple[str, ...] = ()


def export_triton(
    model_uri: str,
    repository: str | Path,
    *,
    name: str | None = None,
    backend: str = "tensorrt",
    instances: int = 1,
    queue_delay: int = 100,
    model_config: Mapping[str, Any] | None = None,
) -> TritonModel:
    """Write a model into a model repository, whole or not at all. No Triton is needed for it.

    Args:
        model_uri: any model URI of MLflow, such as `models:/resnet50-trt/2` or a local folder.
        repository: the folder that Triton gets as `--model-repository`; made where there is none.
        name: what the model is called there; None takes the name of the registered model or of the folder.
        backend: `tensorrt` for the engines, `onnxruntime` for the ONNX model, or `mlflow_trt` for the MLflow model,
            which this package runs in Triton's Python backend, with engines of TensorRT-RTX, rebuilds and self-tests.
        instances: how many requests may run at the same time, on each GPU; for `mlflow_trt`, how often the model is
            loaded there: one runs as many requests as come.
        queue_delay: microseconds for which a request may wait for others to run with; not for `mlflow_trt`.
        model_config: load settings, for `mlflow_trt`.

    Raises:
        EngineMismatchError: no engine is one that Triton can load; `reasons` says why, for each.
        IntegrityError: a file is not the one that was logged.
        OptionError: an option makes no sense, or the repository has a model of that name.
    """
    if backend not in BACKENDS:
        raise OptionError(f"backend is {backend!r}; choose one of {', '.join(BACKENDS)}", option="backend")
    for option, value, smallest in (("instances", instances, 1), ("queue_delay", queue_delay, 0)):
        if value < smallest:
            raise OptionError(f"{option} is {value}; expected {smallest} or more", option=option)
    name = name or _name_of(model_uri)
    if name == ".." or Path(name).name != name:
        raise OptionError(f"name is {name!r}; expected the name of a folder in the repository", option="name")
    target = Path(repository) / name
    if target.exists():
        raise OptionError(f"{target} exists already; name another repository, or another name=", option="repository")
    check_target(target)
    if model_config is not None and backend != "mlflow_trt":
        raise OptionError("model_config is for backend='mlflow_trt'; no other reads it", option="model_config")
    with open_folder(model_uri) as folder, write_aside(target) as aside:
        (aside / _VERSION_FOLDER).mkdir()
        if backend == "mlflow_trt":
            text = python_config_text(folder.record, name, instances, model_config or {})
            write_mlflow_model(folder, aside / _VERSION_FOLDER)
            (aside / "config.pbtxt").write_text(text)
            batch, remarks = 0, REMARKS
        else:
            batch, remarks = _write_for(backend, folder, aside, name, instances, queue_delay)
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    return TritonModel(path=target, backend=backend, max_batch_size=batch, files=tuple(files), remarks=remarks)


def _write_for(
    backend: str, folder: ModelFolder, aside: Path, name: str, instances: int, queue_delay: int
) -> tuple[int, tuple[str, ...]]:
    """The files for one of Triton's own backends. Returns the largest batch that Triton puts together, and remarks."""
    write = _write_engines if backend == "tensorrt" else _write_onnx
    record, default_file, files_by_capability, remarks = write(folder, aside / _VERSION_FOLDER)
    layout = Layout(
        name=name,
        backend=backend,
        default_file=default_file,
        files_by_capability=files_by_capability,
        instances=instances,
        queue_delay=queue_delay,
    )
    (aside / "config.pbtxt").write_text(config_text(record, layout))
    for file, content in warmup_files(record).items():
        (aside / "warmup").mkdir(exist_ok=True)
        (aside / "warmup" / file).write_bytes(content)
    batch, largest = max_batch_size(record, backend), largest_batch(record)
    if not batch:
        remarks = (*remarks, "Triton will not put requests together: not every input and output has rows from 1 on")
    elif batch < largest:
        limit = f"takes {batch} rows at once, and not {largest}: not every profile takes more, and Triton does not ask"
        remarks = (*remarks, limit)
    return batch, remarks


def _name_of(model_uri: str) -> str:
    registered = re.fullmatch(r"models:/([^/@]+)([/@][^/]+)?", model_uri)
    if registered:
        return registered[1]
    if Path(model_uri).is_dir():
        return Path(model_uri).resolve().name
    raise OptionError(f"{model_uri} tells no name for the model; give one with name=", option="name")


def _write_engines(folder: ModelFolder, target: Path) -> _ModelRepository:
    """The engines that one Triton can load, each under the compute capabilities that it was built for."""
    chosen, left_out = _loadable(folder.record.engines)
    if not chosen:
        raise EngineMismatchError(
            f"Triton can load none of the engines of this model ({'; '.join(left_out)}). "
            "backend='mlflow_trt' runs them in Triton's Python backend, backend='onnxruntime' exports the ONNX model; "
            "`mlflow-trt add-engine` on a machine with TensorRT and its GPU adds an engine.",
            reasons=left_out,
        )
    names: dict[str, str] = {}
    default = ""
    if len(chosen) == 1:
        default = "model.plan"
        (target / default).write_bytes(folder.read_plan(chosen[0]))
    else:
        for engine in chosen:
            file = PurePosixPath(engine.file).name
            (target / file).write_bytes(folder.read_plan(engine))
            if engine.is_ampere_plus:
                default = default or file
            for capability in engine.compute_capabilities:
                parsed = ComputeCapability.parse(capability)
                names.setdefault(f"{parsed.major}.{parsed.minor}", file)
    needs = f"needs a Triton with TensorRT {_release(chosen[0])}"
    if all(engine.version_compatible for engine in chosen):
        needs += " or a later minor release, started with --backend-config=tensorrt,version-compatible=true"
    remarks = (needs, *(f"left out {reason}" for reason in left_out))
    return _ModelRepository(_narrowed(folder.record), default or next(iter(names.values())), names, remarks)


def _narrowed(record: Record) -> Record:
    """With inputs and outputs as typed model and engines have them."""
    inputs, outputs = (tuple(spec.narrowed for spec in specs) for specs in (record.inputs, record.outputs))
    return replace(record, inputs=inputs, outputs=outputs)


def _loadable(engines: Sequence[EngineRecord]) -> tuple[list[EngineRecord], list[str]]:
    """Engines of the newest TensorRT among them, one for each target; and why the others are not among them."""
    left_out = []
    usable = []
    for engine in engines:
        if engine.distribution is not Distribution.TENSORRT:
            left_out.append(
                f"{engine.file}: it was built by {engine.distribution.label}, and Triton's backend loads engines of "
                "TensorRT only"
            )
        elif engine.weights is Weights.STRIPPED:
            left_out.append(f"{engine.file}: it was built without weights, which Triton does not put back")
        else:
            usable.append(engine)
    newest = max((Version(engine.version) for engine in usable), default=None)
    chosen: list[EngineRecord] = []
    for engine in usable:
        taken = next((other for other in chosen if other.target == engine.target), None)
        if Version(engine.version) != newest:
            left_out.append(f"{engine.file}: a Triton has one TensorRT, and another engine is newer")
        elif taken is not None:
            left_out.append(f"{engine.file}: {taken.file} is for {engine.target}, too")
        else:
            chosen.append(engine)
    return chosen, left_out


def _release(engine: EngineRecord) -> str:
    return ".".join(map(str, Version(engine.version).release[:3]))


def _write_onnx(folder: ModelFolder, target: Path) -> _ModelRepository:
    use_source = folder.record.recipe.precision in _SOURCE_FOR_ONNXRUNTIME
    record = folder.record if use_source else _narrowed(folder.record)
    stored: StoredModel = record.source if use_source else record.typed
    path = folder.checked_model(stored)
    for file in stored.files:
        # External data is named relative to the model.
        place = target / ("model.onnx" if file == stored.file else (folder.path / file).relative_to(path.parent))
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder.path / file, place)
    remarks = []
    if use_source:
        remarks.append(f"the source model, since ONNX Runtime has few kernels for {record.recipe.precision}")
    try:
        shapes = IsolatedModel(target / "model.onnx").output_shapes
    except (MissingDependencyError, ExecutionError) as error:
        remarks.append(f"the shapes of outputs have to be those that Triton's ONNX Runtime infers: {error.message}")
        shapes = {}
    # Triton compares them exactly, and a graph may give a name to what can be inferred.
    outputs = tuple(replace(spec, shape=shapes.get(spec.name, spec.shape)) for spec in record.outputs)
    return _ModelRepository(replace(record, outputs=outputs), "model.onnx", {}, tuple(remarks))
