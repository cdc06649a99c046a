"""Model folders around a plan that exists already: without the ONNX model that it was made of, so without a rebuild."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mlflow_trt._version import __version__
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.core.plan_header import read_plan_header
from mlflow_trt.core.types import BatchAxis, EngineRecord, PrecisionReport, ShapeProfile, TensorSpec
from mlflow_trt.store.record import ENGINE_ONLY_FORMAT, NO_MODEL, Record, write_record_file
from mlflow_trt.store.write_folder import plan_name

REMARK = (
    "imported as a plan, without its source model: it cannot be rebuilt for another GPU or TensorRT, run on ONNX "
    "Runtime, or be compared with what it was made of"
)


@dataclass(frozen=True, kw_only=True)
class EngineInterface:
    """The tensors and optimization profiles of an engine; `batch_axis` is what its batches may be cut along."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[ShapeProfile, ...]
    batch_axis: BatchAxis | None = None


def engine_record(plan: bytes, *, targets: tuple[str, ...] = (), gpu: str | None = None) -> EngineRecord:
    """What is known of a plan. Raises OptionError for what is none."""
    distribution, version = read_plan_header(plan)
    record = EngineRecord(
        file="",
        sha256=hashlib.sha256(plan).hexdigest(),
        size=len(plan),
        distribution=distribution,
        version=version,
        compute_capabilities=targets,
        gpu=gpu,
    )
    return replace(record, file=f"engines/{plan_name(record)}")


def write_engine_folder(
    plan: bytes,
    engine: EngineRecord,
    interface: EngineInterface,
    folder: Path,
    lineage: Mapping[str, str],
) -> Record:
    """Write a plan and its record into `folder`, which exists."""
    (folder / "engines").mkdir()
    (folder / engine.file).write_bytes(plan)
    recipe = Recipe()
    record = Record(
        format=ENGINE_ONLY_FORMAT,
        mlflow_trt_version=__version__,
        source=NO_MODEL,
        typed=NO_MODEL,
        recipe=recipe,
        inputs=interface.inputs,
        outputs=interface.outputs,
        profiles=interface.profiles,
        batch_axis=interface.batch_axis,
        precision_report=PrecisionReport(precision=recipe.precision, nodes=0),
        engines=(engine,),
        remarks=(REMARK,),
        lineage=dict(lineage),
    )
    write_record_file(folder, record)
    return record
