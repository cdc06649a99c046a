"""A typed model in the types that its source has: as it is, or as it was rewritten for TensorRT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mlflow_trt.convert.onnx.graph import flatten
from mlflow_trt.convert.precision.calibration import CALIBRATED
from mlflow_trt.convert.precision.share import quantized_nodes, share_of
from mlflow_trt.convert.typed_model.model import TypedModel, TypedModelTask
from mlflow_trt.convert.typed_model.reference import Reference
from mlflow_trt.core.accuracy import Tolerance
from mlflow_trt.core.types import PrecisionReport
from mlflow_trt.errors import (
    ExecutionError,
    InputError,
    OutOfMemoryError,
    RuntimeUnavailableError,
    UnsupportedModelError,
)


class UnchangedModelMaker:
    """Makes it. Nothing stays in float32 that is not, so it does so once."""

    def __init__(self, task: TypedModelTask) -> None:
        self._task = task

    def make(self, kept: Mapping[str, str]) -> TypedModel:
        del kept  # everything is in the types that it had
        task, rewritten = self._task, self._task.rewritten
        report = self._report()
        if rewritten.proto is task.source.proto:
            return TypedModel.of_source(task.source, report)
        typed = TypedModel.write(rewritten.proto, rewritten.folder, task, report)
        return typed if task.tolerance is None else self._compared(typed, task.tolerance)

    def _compared(self, typed: TypedModel, tolerance: Tolerance) -> TypedModel:
        """With how far it is off; as it is where ONNX Runtime cannot tell, which whoever verifies it says."""
        task = self._task
        try:
            reference = Reference.of(task.source, task.samples)
        except (RuntimeUnavailableError, ExecutionError, InputError):
            return typed
        typed = replace(typed, reference=reference.outputs)
        subject = f"the {task.recipe.precision} model, on ONNX Runtime,"
        try:
            comparison = reference.compare(subject, typed.path, tolerance, batch_axis=task.batch_axis)
        except OutOfMemoryError:
            raise
        except ExecutionError as error:
            if task.rewritten.is_narrowed:
                raise UnsupportedModelError(
                    "the model computes with float64, which TensorRT has not, and with float32 in its place it does "
                    f"not run on ONNX Runtime: {error.message}. Export the model in float32, or log it with "
                    "mlflow.onnx, which runs it on ONNX Runtime"
                ) from error
            return typed
        return replace(typed, comparison=comparison)

    def _report(self) -> PrecisionReport:
        task = self._task
        remarks = task.rewritten.remarks
        report = PrecisionReport(
            precision=task.recipe.precision, nodes=len(task.source.proto.graph.node), remarks=remarks
        )
        if task.recipe.precision not in CALIBRATED:
            return report
        flat = flatten(task.rewritten, task.workdir)
        quantized = quantized_nodes(flat)
        remark = "the model brings its own QuantizeLinear nodes and is taken as it is"
        return replace(
            report,
            changed_nodes=len(quantized),
            share=share_of(flat, task.samples.narrowed().feeds[0])(quantized),
            remarks=(remark, *remarks),
        )
