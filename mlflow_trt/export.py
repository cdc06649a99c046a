"""Take the engine out of a model, for trtexec, Triton and others that know plans."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mlflow.tracking.artifact_utils import _download_artifact_from_uri

from mlflow_trt.artifact import read_folder
from mlflow_trt.spec import EngineRecord


def save_engine(model_uri: str, path: Path) -> EngineRecord:
    """Write the first engine of a model to `path`, whole or not at all, and return its record.

    Raises IntegrityError where the plan is not the one that was logged.
    """
    with tempfile.TemporaryDirectory(prefix="mlflow-trt-") as workdir:
        local = Path(model_uri)
        folder = read_folder(
            local if local.is_dir() else Path(_download_artifact_from_uri(model_uri, output_path=workdir))
        )
        engine = folder.record.engines[0]
        plan = folder.read_plan(engine)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(plan)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return engine
