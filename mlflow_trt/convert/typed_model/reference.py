"""What a typed model has to compute."""

from __future__ import annotations

import itertools
from pathlib import Path

from mlflow_trt.backends.onnxruntime_process import IsolatedModel
from mlflow_trt.convert.onnx.model import OnnxModel
from mlflow_trt.convert.onnx.reference import brings_quantization, reference_outputs
from mlflow_trt.convert.samples import Samples
from mlflow_trt.core.accuracy import Comparison, Tolerance
from mlflow_trt.core.comparing import compare
from mlflow_trt.core.types import BatchAxis


class Reference:
    """The outputs of the source model on the samples, as many as there is room for, all by ONNX Runtime.

    Raises what running it raises: MissingDependencyError, ExecutionError, InputError.
    """

    def __init__(self, source: OnnxModel, samples: Samples) -> None:
        self.outputs = reference_outputs(source, samples.feeds)
        self._names = [spec.name for spec in source.outputs]
        self._samples = samples.narrowed()
        self._may_optimize = not brings_quantization(source.proto)

    def compare(
        self,
        subject: str,
        path: Path,
        tolerance: Tolerance,
        *,
        batch_axis: BatchAxis | None = None,
        most: int | None = None,
        optimize: bool = True,
    ) -> Comparison:
        """How far the model at `path` is off, on `most` of the samples. Raises ExecutionError where it does not run.

        It runs node by node where the source model did, whatever `optimize` says.
        """
        runner = IsolatedModel(path, optimize=optimize and self._may_optimize)
        pairs = itertools.islice(zip(self._samples.feeds, self.outputs, strict=False), most)
        return compare(
            subject,
            str(self._samples),
            ((runner.run(self._names, feeds), expected) for feeds, expected in pairs),
            tolerance,
            batch_axis=batch_axis,
        )
