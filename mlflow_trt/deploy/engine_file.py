"""Take things out of a model, for trtexec, Triton and others that know plans and ONNX."""

from __future__ import annotations

from pathlib import Path

from mlflow_trt.core.files import write_whole
from mlflow_trt.core.output_folder import check_parent
from mlflow_trt.core.types import EngineRecord
from mlflow_trt.errors import OptionError
from mlflow_trt.flavor.fetch import open_folder


def check_engine_path(path: Path) -> None:
    """Raise OptionError where `save_engine` cannot write, before anything takes time or is registered."""
    if path.is_dir():
        raise OptionError(f"{path} is a folder; name a file for the engine", option="save_engine")
    check_parent(path, option="save_engine")


def save_engine(model_uri: str, path: Path) -> EngineRecord:
    """Write the first engine of a model to `path`, whole or not at all, and return its record.

    Raises IntegrityError where the plan is not the one that was logged.
    """
    with open_folder(model_uri) as folder:
        engine = folder.record.engines[0]
        plan = folder.read_plan(engine)
    write_whole(path, plan)
    return engine
