"""Take things out of a model, for trtexec, Triton and others that know plans and ONNX."""

from __future__ import annotations

from pathlib import Path

from mlflow_trt.fetching import opened_folder
from mlflow_trt.files import write_whole
from mlflow_trt.spec import EngineRecord


def save_engine(model_uri: str, path: Path) -> EngineRecord:
    """Write the first engine of a model to `path`, whole or not at all, and return its record.

    Raises IntegrityError where the plan is not the one that was logged.
    """
    with opened_folder(model_uri) as folder:
        engine = folder.record.engines[0]
        plan = folder.read_plan(engine)
    write_whole(path, plan)
    return engine
