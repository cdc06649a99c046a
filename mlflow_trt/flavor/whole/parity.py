"""Parity end to end: the whole model that was made against its source, on the same inputs, before it is logged."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from mlflow import pyfunc
from mlflow.models import Model

from mlflow_trt.core.log import get_logger
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.whole_model import Agreement
from mlflow_trt.errors import AccuracyError, ExecutionError, MlflowTrtError, RuntimeUnavailableError
from mlflow_trt.flavor.whole.answers import Tally, differences
from mlflow_trt.flavor.whole.loading import load_whole
from mlflow_trt.flavor.whole.package import WholeSource
from mlflow_trt.runtime.cuda.device import open_device
from mlflow_trt.runtime.onnxruntime_session import OnnxRuntimeSession
from mlflow_trt.runtime.session import Session
from mlflow_trt.store.folder import ModelFolder, read_folder
from mlflow_trt.store.load import open_session

_log = get_logger(__name__)


def compare_whole(
    folder: Path, model: Model, source: WholeSource, settings: LoadSettings, tolerance: float | None
) -> Agreement | None:
    """Answer the examples of the source with what was made of it, and compare.

    Without a tolerance, as with verify=False, nothing is compared. Raises AccuracyError for answers that differ.
    """
    if tolerance is None:
        return None
    tally = Tally()
    made = read_folder(folder)
    with _session(made, settings) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the source, about its own insides
        impl = load_whole(made, session, source.other_settings)
        face = pyfunc.PyFuncModel(model_meta=model, model_impl=impl)
        for inputs, expected in source.examples:
            try:
                answer = face.predict(inputs)
            except MlflowTrtError:
                raise
            except Exception as error:
                raise AccuracyError(
                    f"the whole model does not answer what its source answers: {type(error).__name__}: {error}. "
                    "Nothing was logged"
                ) from error
            found = list(differences(answer, expected, tolerance))
            if found:
                raise AccuracyError(
                    f"the whole model on {session.description} answers otherwise than its source: "
                    f"{'; '.join(found[:3])}. Nothing was logged. Take a wider precision, or verify=Tolerance(...)"
                )
            tally.count(answer, expected)
        runtime = session.description
    agreement = Agreement(inputs=len(source.examples), runtime=runtime, **asdict(tally))
    _log.info("The whole model answers as its source does: %s", agreement)
    return agreement


@contextmanager
def _session(folder: ModelFolder, settings: LoadSettings) -> Iterator[Session]:
    """The engine where this machine can run it, else the typed model on the CPU, else the network of the source."""
    record = folder.record
    try:
        open_device(settings.first_device)
    except RuntimeUnavailableError:
        try:
            session: Session = OnnxRuntimeSession(
                folder.checked_model(record.typed), record.inputs, record.outputs, batch_axis=record.batch_axis
            )
        except (ExecutionError, RuntimeUnavailableError) as error:
            _log.debug("The typed model does not run on the CPU: %s", error.message)
            session = open_session(folder, LoadSettings(runtime="onnxruntime"))
    else:
        session = open_session(folder, settings)
    with session:
        yield session
