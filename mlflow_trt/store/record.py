"""The record of a model folder, `mlflow_trt.json`: how the model was made, and the digest of every file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mlflow_trt._version import __version__
from mlflow_trt.convert.onnx.model import combined_digest
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.core.accuracy import Comparison, Tolerance
from mlflow_trt.core.selection import Selection
from mlflow_trt.core.types import BatchAxis, EngineRecord, PrecisionReport, ShapeProfile, TensorSpec
from mlflow_trt.core.whole_model import WholeModel
from mlflow_trt.errors import ArtifactError, FormatError
from mlflow_trt.store.check_record import check_record, read_json

FLAVOR_NAME = "mlflow_trt"
RECORD_FILE = "mlflow_trt.json"
FORMAT = 1
"""The record format that this version writes for most models."""
ENGINE_ONLY_FORMAT = 2
"""That of a plan that was imported, which releases that know of no such models cannot read."""
FLOAT64_FORMAT = 3
"""That of a model with inputs or outputs of float64, for the same reason; the newest that is read."""


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """An ONNX model in the folder: its file, and the sha256 of each of its files, external data included."""

    file: str
    files: Mapping[str, str]

    @property
    def digest(self) -> str:
        return combined_digest(self.files)


NO_MODEL = StoredModel(file="", files={})
"""What stands for the source and the typed model of a plan that was imported."""


@dataclass(frozen=True, kw_only=True)
class StoredGolden:
    """The golden sample in the folder, its digest, and what an engine may be off from it."""

    file: str
    sha256: str
    tolerance: Tolerance


@dataclass(frozen=True, kw_only=True)
class Record:
    """What `mlflow_trt.json` says.

    `inputs` and `outputs` are those of the source model, with the typed model's names of dimensions; typed model and
    engines have float32 in place of float64. `comparisons` has the numbers of its verification, `remarks` what the user
    was told about choices made for them. `lineage` tells where the source model came from, for one that was converted
    from the registry. `selection` tells how the precision of `recipe` was chosen, where `best` was asked for. `whole`
    is what surrounds the network of a whole model.
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
    whole: WholeModel | None = None

    @property
    def is_engine_only(self) -> bool:
        """Whether it is a plan that was imported, without the model that it was made of."""
        return self.source == NO_MODEL

    def file_sizes(self) -> dict[str, int | None]:
        """Every file that the record names, with its size where it tells."""
        around = () if self.whole is None else self.whole.files
        sizes: dict[str, int | None] = dict.fromkeys((*self.source.files, *self.typed.files, *around))
        for engine in self.engines:
            sizes[engine.file] = engine.size
            if engine.kernels is not None:
                sizes[engine.kernels.file] = engine.kernels.size
        if self.golden is not None:
            sizes[self.golden.file] = None
        return sizes


_records = TypeAdapter(Record)


def read_record_file(file: Path, uri: str | None = None) -> tuple[Record, str]:
    """Read and check a record; the sha256 of its file comes with it.

    `uri` is what the user calls the model, where it was downloaded.

    Raises ArtifactError where there is none or it makes no sense, FormatError where a newer mlflow-trt wrote it.
    """
    content, digest = _read_json(file, uri)
    version = content.get("format") if isinstance(content, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtifactError(f"{file} names no format; it is not a record of mlflow-trt", path=file)
    if version > FLOAT64_FORMAT:
        raise FormatError(
            f"{file} is of format {version}, written by mlflow-trt {content.get('mlflow_trt_version', 'unknown')}; "
            f"this is mlflow-trt {__version__}, which reads up to format {FLOAT64_FORMAT}. Upgrade mlflow-trt.",
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
    return record, digest


def write_record_file(folder: Path, record: Record) -> None:
    """Write the record of a model folder, in place of the one that it has."""
    (folder / RECORD_FILE).write_bytes(_records.dump_json(record, indent=2) + b"\n")


def record_to_dict(record: Record) -> dict[str, Any]:
    """The record as it stands in its file."""
    content: dict[str, Any] = _records.dump_python(record, mode="json")
    return content


def _read_json(file: Path, uri: str | None) -> tuple[Any, str]:
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
