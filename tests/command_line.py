"""Runs commands as processes of their own, forked from one that has imported what takes seconds to import."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

_TIMEOUT_SECONDS = 600
# Nothing that starts threads which a forked process would miss: neither TensorRT nor ONNX Runtime.
_PRELOADED = [
    "mlflow.pyfunc",
    "mlflow_trt.cli",
    "mlflow_trt.flavor.api",
    "mlflow_trt.registry.convert_all",
    # What these import when they need it: for a precision of 16 or 8 bits, and for a store on SQLite.
    "onnx_ir.passes.common",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "alembic.command",
    "git",
]
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(_PRELOADED)


class Result(NamedTuple):
    code: int
    output: str
    errors: str


def run(*arguments: object, cwd: Path | None = None, **environment: str) -> Result:
    """Run `mlflow-trt` with these arguments, in this folder, with these variables besides those of this process."""
    variables = {**os.environ, "COLUMNS": "200", **environment}
    with tempfile.TemporaryDirectory() as folder:
        streams = [str(Path(folder) / name) for name in ("stdout", "stderr")]
        command = ["mlflow-trt", *map(str, arguments)]
        process = _forks.Process(target=_run, args=(command, variables, str(cwd or Path.cwd()), streams))
        process.start()
        process.join(_TIMEOUT_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        assert process.exitcode is not None
        return Result(process.exitcode, *(Path(stream).read_text() for stream in streams))


def _run(command: list[str], variables: dict[str, str], folder: str, streams: list[str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = command
    from mlflow_trt.cli import main

    main()
