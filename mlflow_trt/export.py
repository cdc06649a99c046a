"""Take things out of a model, for trtexec, Triton and others that know plans and ONNX."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow.tracking.artifact_utils import _download_artifact_from_uri

from mlflow_trt.artifact import ModelFolder, read_folder
from mlflow_trt.files import write_whole
from mlflow_trt.spec import EngineRecord


@contextmanager
def opened_folder(model_uri: str) -> Iterator[ModelFolder]:
    """The folder of a model, which is downloaded for the length of the block unless it is a local one.

    Raises ArtifactError where it is no model of this flavor.
    """
    local = Path(model_uri)
    if local.is_dir():
        yield read_folder(local)
        return
    with tempfile.TemporaryDirectory(prefix="mlflow-trt-") as workdir:
        yield read_folder(Path(_download_artifact_from_uri(model_uri, output_path=workdir)), model_uri)


def save_engine(model_uri: str, path: Path) -> EngineRecord:
    """Write the first engine of a model to `path`, whole or not at all, and return its record.

    Raises IntegrityError where the plan is not the one that was logged.
    """
    with opened_folder(model_uri) as folder:
        engine = folder.record.engines[0]
        plan = folder.read_plan(engine)
    write_whole(path, plan)
    return engine
