"""The model folder: what lies where, the record, and the digests.

    model.onnx (+ its external data)                the source model, as the user gave it
    typed/<precision>.onnx (+ its external data)    the typed model, where it differs from the source model
    engines/<distribution>-<version>-<target>.plan  raw plans
    runtime_cache/<engine>.kernels                  kernels of an engine, as TensorRT-RTX serialized them
    golden.npz                                      the golden sample, which engines are tested with at load
    mlflow_trt.json                                 the record

The files of MLflow itself (MLmodel, requirements.txt, ...) are written by `flavor.mlmodel`.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mlflow_trt._version import __version__
from mlflow_trt.convert.conversion import Conversion
from mlflow_trt.convert.onnx.model import MODEL_FILE, combined_digest, copy_files, sha256_of
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.core.accuracy import Comparison, Tolerance
from mlflow_trt.core.selection import Selection
from mlflow_trt.core.types import (
    BatchAxis,
    EngineRecord,
    Gpu,
    KernelsRecord,
    PrecisionReport,
    ShapeProfile,
    TensorSpec,
)
from mlflow_trt.errors import ArtifactError, FormatError, IntegrityError
from mlflow_trt.store.check_record import check_record, read_json
from mlflow_trt.store.golden import GOLDEN_FILE, Golden, from_npz, to_npz

FLAVOR_NAME = "mlflow_trt"
RECORD_FILE = "mlflow_trt.json"
FORMAT = 1
"""The newest record format that this version reads and the one that it writes."""


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """An ONNX model in the folder: its file, and the sha256 of each of its files, external data included."""

    file: str
    files: Mapping[str, str]

    @property
    def digest(self) -> str:
        return combined_digest(self.files)


@dataclass(frozen=True, kw_only=True)
class StoredGolden:
    """The golden sample in the folder, its digest, and what an engine may be off from it."""

    file: str
    sha256: str
    tolerance: Tolerance


@dataclass(frozen=True, kw_only=True)
class Record:
    """What `mlflow_trt.json` says.

    `inputs` and `outputs` are those of the typed model, which equals the source model where the precision pass changed
    nothing. `comparisons` has the numbers of its verification, `remarks` what the user was told about choices made for
    them. `lineage` tells where the source model came from, for one that was converted from the registry. `selection`
    tells how the precision of `recipe` was chosen, where `best` was asked for.
    """

    format: int
    mlflow_trt_version: str
    source: StoredModel
    typed: StoredModel
    recipe: Recipe
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[ShapeProfile, ...]
    batch_axis: BatchAxis | None
    precision_report: PrecisionReport
    engines: tuple[EngineRecord, ...]
    remarks: tuple[str, ...] = ()
    lineage: Mapping[str, str] = field(default_factory=dict)
    comparisons: tuple[Comparison, ...] = ()
    golden: StoredGolden | None = None
    selection: Selection | None = None


_records = TypeAdapter(Record)


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A model folder that was read. Nothing here writes to it."""

    path: Path
    record: Record

    def checked_model(self, model: StoredModel) -> Path:
        """The path of an ONNX model, after its files were found to be the ones that were logged."""
        for name, expected in model.files.items():
            self._compare(name, sha256_of(self._existing(name)), expected)
        return self.path / model.file

    def read_plan(self, engine: EngineRecord) -> bytes:
        """The bytes of a plan, which were checked before anybody can deserialize them."""
        return self._checked(engine.file, engine.sha256)

    def read_kernels(self, kernels: KernelsRecord) -> bytes:
        """Kernels of an engine, which were checked before TensorRT-RTX can see them."""
        return self._checked(kernels.file, kernels.sha256)

    def read_golden(self, golden: StoredGolden) -> Golden:
        content = self._checked(golden.file, golden.sha256)
        try:
            return from_npz(content)
        except ValueError as error:
            raise ArtifactError(f"{self.path / golden.file} is no golden sample: {error}", path=self.path) from error

    def _checked(self, name: str, sha256: str) -> bytes:
        content = self._existing(name).read_bytes()
        self._compare(name, hashlib.sha256(content).hexdigest(), sha256)
        return content

    def _existing(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; download the model again", path=path)
        return path

    def _compare(self, name: str, actual: str, expected: str) -> None:
        if actual != expected:
            raise IntegrityError(
                f"{self.path / name} is not the file that was logged: its sha256 is {actual}, expected {expected}. "
                "It is not used; download the model again, or log it again.",
                path=self.path / name,
            )


def write_folder(
    conversion: Conversion,
    folder: Path,
    lineage: Mapping[str, str] | None = None,
    *,
    comparisons: Sequence[Comparison] = (),
    golden: Golden | None = None,
    tolerance: Tolerance | None = None,
    remarks: Sequence[str] = (),
    selection: Selection | None = None,
) -> Record:
    """Write the source model, the typed model, the engine and the record into `folder`, which exists.

    `golden` is the golden sample, `tolerance` what engines may be off from it; `remarks` come after those of the
    conversion.
    """
    source = conversion.source
    source.copy_to(folder)
    stored_source = StoredModel(file=MODEL_FILE, files=source.files)
    engine = replace(conversion.engine, file=f"engines/{_plan_name(conversion.engine)}")
    (folder / "engines").mkdir()
    shutil.copyfile(conversion.plan, folder / engine.file)
    record = Record(
        format=FORMAT,
        mlflow_trt_version=__version__,
        source=stored_source,
        typed=_write_typed(conversion, folder) or stored_source,
        recipe=conversion.recipe,
        inputs=conversion.typed.inputs,
        outputs=conversion.typed.outputs,
        profiles=conversion.profiles.profiles,
        batch_axis=conversion.profiles.batch_axis,
        precision_report=conversion.typed.report,
        engines=(engine,),
        remarks=(*conversion.remarks, *remarks),
        comparisons=tuple(comparisons),
        golden=_write_golden(golden, folder, tolerance or Tolerance()),
        lineage=dict(lineage or {}),
        selection=selection,
    )
    return _rewritten(folder, record)


def add_engine_file(folder: Path, engine: EngineRecord, plan: Path, *, extends: str) -> Record:
    """Add an engine to a copy of a model folder that was not logged yet; `extends` is the URI of what it copies."""
    record = read_folder(folder).record
    taken = {known.file for known in record.engines}
    names = (f"engines/{_plan_name(engine, number)}" for number in itertools.count(1))
    engine = replace(engine, file=next(name for name in names if name not in taken))
    shutil.copyfile(plan, folder / engine.file)
    lineage = {**record.lineage, "extends": extends}
    return _rewritten(folder, replace(record, engines=(*record.engines, engine), lineage=lineage))


def mark_extended(folder: Path, *, extends: str) -> Record:
    """Say in a copy of a model folder that was not logged yet, to which something was added, what it copies."""
    record = read_folder(folder).record
    return _rewritten(folder, replace(record, lineage={**record.lineage, "extends": extends}))


def add_kernels_file(folder: Path, engine: EngineRecord, kernels: bytes, *, gpu: Gpu, driver: str | None) -> Record:
    """Add the kernels of an engine, in place of those it has, to a model folder that was not logged yet."""
    record = read_folder(folder).record
    stored = KernelsRecord(
        file=f"runtime_cache/{PurePosixPath(engine.file).stem}.kernels",
        sha256=hashlib.sha256(kernels).hexdigest(),
        size=len(kernels),
        gpu=gpu.name,
        compute_capability=str(gpu.compute_capability),
        version=engine.version,
        driver=driver,
    )
    (folder / "runtime_cache").mkdir(exist_ok=True)
    (folder / stored.file).write_bytes(kernels)
    engines = (replace(one, kernels=stored) if one.file == engine.file else one for one in record.engines)
    return _rewritten(folder, replace(record, engines=tuple(engines)))


def read_folder(path: Path, uri: str | None = None) -> ModelFolder:
    """Read the record of a model folder; `uri` is what the user calls it, where it was downloaded.

    Raises ArtifactError where there is none or it makes no sense, FormatError where a newer mlflow-trt wrote it.
    """
    file = path / RECORD_FILE
    content = _read_json(file, uri)
    version = content.get("format") if isinstance(content, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtifactError(f"{file} names no format; it is not a record of mlflow-trt", path=file)
    if version > FORMAT:
        raise FormatError(
            f"{file} is of format {version}, written by mlflow-trt {content.get('mlflow_trt_version', 'unknown')}; "
            f"this is mlflow-trt {__version__}, which reads up to format {FORMAT}. Upgrade mlflow-trt.",
            path=file,
        )
    try:
        record = _records.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(
            f"{file} is damaged: {where}: {first['msg']}; download the model again", path=file
        ) from None
    check_record(record, file)
    return ModelFolder(path=path, record=record)


def _read_json(file: Path, uri: str | None) -> Any:
    try:
        return read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(
            f"{uri or file.parent} has no {RECORD_FILE}: it is not a model that mlflow-trt logged. "
            "Convert an ONNX model with mlflow_trt.log_model or `mlflow-trt convert`.",
            path=file.parent,
        ) from None
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error.strerror}", path=file) from error


def record_to_dict(record: Record) -> dict[str, Any]:
    """The record as it stands in its file."""
    content: dict[str, Any] = _records.dump_python(record, mode="json")
    return content


def _rewritten(folder: Path, record: Record) -> Record:
    (folder / RECORD_FILE).write_bytes(_records.dump_json(record, indent=2) + b"\n")
    return record


def _write_golden(golden: Golden | None, folder: Path, tolerance: Tolerance) -> StoredGolden | None:
    if golden is None:
        return None
    content = to_npz(golden)
    (folder / GOLDEN_FILE).write_bytes(content)
    return StoredGolden(file=GOLDEN_FILE, sha256=hashlib.sha256(content).hexdigest(), tolerance=tolerance)


def _write_typed(conversion: Conversion, folder: Path) -> StoredModel | None:
    typed = conversion.typed
    if typed.is_source:
        return None
    target = folder / "typed"
    target.mkdir()
    copy_files(tuple(typed.files), typed.path.parent, target)
    return StoredModel(
        file=f"typed/{typed.path.name}", files={f"typed/{name}": digest for name, digest in typed.files.items()}
    )


def _plan_name(engine: EngineRecord, number: int = 1) -> str:
    """Engines for several GPU models of one compute capability are numbered."""
    suffix = f"-{number}" if number > 1 else ""
    return f"{engine.distribution}-{engine.version}-{engine.target}{suffix}.plan"
