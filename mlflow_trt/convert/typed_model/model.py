"""The typed model, and what it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from onnx import ModelProto

from mlflow_trt.convert.onnx.model import OnnxModel, describe, sha256_of
from mlflow_trt.convert.onnx.rewrite import RewrittenModel
from mlflow_trt.convert.onnx.weights import write_model
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.convert.samples import Samples
from mlflow_trt.core.accuracy import Comparison, Tolerance
from mlflow_trt.core.arrays import Outputs
from mlflow_trt.core.types import BatchAxis, PrecisionReport, TensorSpec


@dataclass(frozen=True, kw_only=True)
class TypedModelTask:
    """What to make a typed model of, where, and what it is judged on.

    `rewritten` is the source as TensorRT understands it. `samples` are what ranges are seen on, and results compared
    on, row by row along `batch_axis`. Nodes are kept in float32 until `tolerance` is met; None takes what comes.
    """

    source: OnnxModel
    rewritten: RewrittenModel
    recipe: Recipe
    workdir: Path
    samples: Samples
    tolerance: Tolerance | None
    batch_axis: BatchAxis | None


@dataclass(frozen=True, kw_only=True)
class TypedModel:
    """The ONNX that TensorRT parses. `path` is the source model's own where nothing was changed.

    `inputs` and `outputs` are the source model's, but for dimension names that were told apart; where they are float64,
    the file has float32. `files` has the sha256 of each file that is part of the model, by its name beside `path`.
    `comparison` is that with the source model, where there was one, and `reference` what the source model computed for
    it. `unseen` is that on half of the samples, with ranges from the other half, where ranges were calibrated.
    `changed` are the nodes that run in the precision asked for.
    """

    path: Path
    files: Mapping[str, str]
    is_source: bool
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    report: PrecisionReport
    comparison: Comparison | None = None
    unseen: Comparison | None = None
    reference: tuple[Outputs, ...] = ()
    changed: frozenset[str] = frozenset()

    @classmethod
    def of_source(cls, source: OnnxModel, report: PrecisionReport) -> TypedModel:
        """The source model itself, where it lies."""
        return cls(
            path=source.path,
            files=source.files,
            is_source=True,
            inputs=source.inputs,
            outputs=source.outputs,
            report=report,
        )

    @classmethod
    def write(cls, proto: ModelProto, weights: Path, task: TypedModelTask, report: PrecisionReport) -> TypedModel:
        """`proto` as a file of its own in the task's `workdir`. Its external data is in the folder `weights`."""
        folder = task.workdir / "typed"
        folder.mkdir(exist_ok=True)
        path = folder / f"{task.recipe.precision}.onnx"
        write_model(proto, weights, path)
        graph = onnx.load(path, load_external_data=False)
        inputs, outputs = (
            tuple(replace(spec, dtype=before.dtype) for spec, before in zip(specs, given, strict=True))
            for specs, given in zip(describe(graph, path), (task.source.inputs, task.source.outputs), strict=True)
        )
        files = {file.name: sha256_of(file) for file in (path, path.with_name(f"{path.name}.data")) if file.exists()}
        return cls(path=path, files=files, is_source=False, inputs=inputs, outputs=outputs, report=report)
