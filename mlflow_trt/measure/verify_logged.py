"""Verify a model that was logged, on data of today."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mlflow_trt.convert.onnx.model import OnnxModel, read_onnx
from mlflow_trt.convert.resolve_profiles import Profiles
from mlflow_trt.convert.samples import SampleOrigin, Samples, cut_samples
from mlflow_trt.core.accuracy import Comparison, Tolerance
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.scratch import scratch_folder
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.errors import InputError, RuntimeUnavailableError
from mlflow_trt.flavor.fetch import open_folder
from mlflow_trt.measure.emulated import open_typed_model
from mlflow_trt.pipeline.user_samples import arrays_of
from mlflow_trt.pipeline.verify import compare_sessions
from mlflow_trt.runtime.onnxruntime_session import OnnxRuntimeSession
from mlflow_trt.runtime.session import Session
from mlflow_trt.store.folder import ModelFolder
from mlflow_trt.store.load import open_tensorrt

_log = get_logger(__name__)


def verify_model(
    model_uri: str | os.PathLike[str], data: Any = None, *, relative_error: float | None = None, device: int = 0
) -> Comparison:
    """Compare a logged model with its source model on ONNX Runtime.

    What is compared is the engine that runs on this machine. Without a GPU it is the typed model, emulated on ONNX
    Runtime as when it was logged; where that is the source model itself, nothing is compared, and the verdict is that.

    Args:
        model_uri: any model URI of MLflow, or a folder, of a model of this flavor.
        data: as `calibration_data` of `log_model`; None takes the model's golden sample.
        relative_error: what is tolerated, and of rows in proportion; None takes what the model was logged with.
        device: CUDA device ordinal.

    Returns:
        The errors of each output, and a verdict. A failed one is returned, not raised.

    Raises:
        InputError: the data does not fit the model, or there is neither data nor a golden sample.
        ArtifactError: it is no model of this flavor, or an imported plan, which has no source model.
        ExecutionError: the engine, or the typed model on ONNX Runtime, cannot be loaded or run.
    """
    model_uri = os.fspath(model_uri)
    with open_folder(model_uri) as folder, scratch_folder() as workdir:
        record = folder.record
        tolerance = record.golden.tolerance if record.golden else Tolerance.default(record.recipe.precision)
        if relative_error is not None:
            tolerance = tolerance.with_relative_error(relative_error)
        # Wherever a store keeps its files: their digests are those that were logged.
        source = read_onnx(folder.checked_model(record.source), workdir, allow_external_data_from=Path("/"))
        samples = _samples(folder, source, data)
        subject, why_not = _open_subject(folder, device, Path(workdir))
        if subject is None:
            return Comparison.of_nothing(model_uri, why_not, tolerance)
        with subject, OnnxRuntimeSession(source.path, source.inputs, source.outputs) as reference:
            return compare_sessions(subject, reference, samples, tolerance, record.batch_axis)


def _samples(folder: ModelFolder, source: OnnxModel, data: Any) -> Samples:
    record = folder.record
    profiles = Profiles(profiles=record.profiles, batch_axis=record.batch_axis, remarks=())
    if data is not None:
        return cut_samples(arrays_of(data, source.inputs), SampleOrigin.GIVEN_DATA, source, profiles)
    if record.golden is None:
        raise InputError("this model has no golden sample; give data to verify it on")
    golden = folder.read_golden(record.golden)
    return cut_samples([golden.feeds], SampleOrigin.GOLDEN, source, profiles)


def _open_subject(folder: ModelFolder, device: int, workdir: Path) -> tuple[Session | None, str]:
    """The engine, or what stands in for it and why; no session where that would be the source model itself."""
    try:
        return open_tensorrt(folder, LoadSettings(device=device, self_test=False, warm_up="off")), ""
    except RuntimeUnavailableError as error:
        reason = error.message
    typed = open_typed_model(folder, workdir)
    if typed is not None:
        _log.warning("Verifying the typed model, emulated, since the engine cannot run here: %s", reason)
        return typed, reason
    precision = folder.record.recipe.precision
    return None, f"the {precision} typed model is the source model itself, and the engine cannot run here: {reason}"
