"""Writes model folders, and adds engines and kernels to copies of them. `store.folder` tells what lies where."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from mlflow_trt._version import __version__
from mlflow_trt.convert.conversion import Conversion
from mlflow_trt.convert.onnx.model import MODEL_FILE, copy_files
from mlflow_trt.core.accuracy import Comparison, Tolerance
from mlflow_trt.core.selection import Selection
from mlflow_trt.core.types import EngineRecord, Gpu, KernelsRecord
from mlflow_trt.core.whole_model import Agreement, WholeModel
from mlflow_trt.store.folder import read_folder
from mlflow_trt.store.golden import GOLDEN_FILE, Golden, to_npz
from mlflow_trt.store.record import FLOAT64_FORMAT, FORMAT, Record, StoredGolden, StoredModel, write_record_file


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
    whole: WholeModel | None = None,
) -> Record:
    """Write the source model, the typed model, the engine and the record into `folder`, which exists.

    `golden` is the golden sample, `tolerance` what engines may be off from it; `remarks` come after those of the
    conversion.
    """
    source, typed = conversion.source, conversion.typed
    source.copy_to(folder)
    stored_source = StoredModel(file=MODEL_FILE, files=source.files)
    engine = replace(conversion.engine, file=f"engines/{plan_name(conversion.engine)}")
    (folder / "engines").mkdir()
    shutil.copyfile(conversion.plan, folder / engine.file)
    record = Record(
        format=FLOAT64_FORMAT if any(spec != spec.narrowed for spec in (*typed.inputs, *typed.outputs)) else FORMAT,
        mlflow_trt_version=__version__,
        source=stored_source,
        typed=_write_typed(conversion, folder) or stored_source,
        recipe=replace(conversion.recipe, plugins=tuple(plugin.name for plugin in engine.plugins)),
        inputs=typed.inputs,
        outputs=typed.outputs,
        profiles=conversion.profiles.profiles,
        batch_axis=conversion.profiles.batch_axis,
        precision_report=typed.report,
        engines=(engine,),
        remarks=(*conversion.remarks, *remarks),
        comparisons=tuple(comparisons),
        golden=_write_golden(golden, folder, tolerance or Tolerance()),
        lineage=dict(lineage or {}),
        selection=selection,
        whole=whole,
    )
    return _replace_record(folder, record)


def add_engine_file(folder: Path, engine: EngineRecord, plan: Path, *, extends: str) -> Record:
    """Add an engine to a copy of a model folder that was not logged yet; `extends` is the URI of what it copies."""
    record = read_folder(folder).record
    taken = {known.file for known in record.engines}
    names = (f"engines/{plan_name(engine, number)}" for number in itertools.count(1))
    engine = replace(engine, file=next(name for name in names if name not in taken))
    shutil.copyfile(plan, folder / engine.file)
    lineage = {**record.lineage, "extends": extends}
    return _replace_record(folder, replace(record, engines=(*record.engines, engine), lineage=lineage))


def mark_extended(folder: Path, *, extends: str) -> Record:
    """Say in a copy of a model folder that was not logged yet, to which something was added, what it copies."""
    record = read_folder(folder).record
    return _replace_record(folder, replace(record, lineage={**record.lineage, "extends": extends}))


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
    return _replace_record(folder, replace(record, engines=tuple(engines)))


def add_agreement(folder: Path, whole: WholeModel, agreement: Agreement) -> None:
    """Say in the folder of a whole model that was not logged yet how near it came to its source."""
    _replace_record(folder, replace(read_folder(folder).record, whole=replace(whole, agreement=agreement)))


def _replace_record(folder: Path, record: Record) -> Record:
    write_record_file(folder, record)
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


def plan_name(engine: EngineRecord, number: int = 1) -> str:
    """The name of an engine's file. Engines for several GPU models of one compute capability are numbered."""
    suffix = f"-{number}" if number > 1 else ""
    return f"{engine.distribution}-{engine.version}-{engine.target}{suffix}.plan"
