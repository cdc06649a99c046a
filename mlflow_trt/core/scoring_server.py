"""What is different in a process of MLflow's scoring server."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import threading

from mlflow_trt.core.log import get_logger

_MODEL_PATH = "__pyfunc_model_path__"  # mlflow.pyfunc.scoring_server._SERVER_MODEL_PATH
_IN_SERVER = "_MLFLOW_IS_IN_SERVING_ENVIRONMENT"
_PATIENCE = 30.0
_log = get_logger(__name__)
_ending = threading.Lock()
_how_to_set: str | None = None


def in_server() -> bool:
    """Whether this process is MLflow's scoring server, by the variables that it sets: one before it loads the model,
    the other when it has.
    """
    return _MODEL_PATH in os.environ or os.environ.get(_IN_SERVER) == "true"


def become_server(how_to_set: str) -> None:
    """Be a server from here on: what is different in MLflow's, such as warming up, is so in this process.

    `how_to_set` says how load settings are given to it; they come after these words.
    """
    global _how_to_set  # noqa: PLW0603  # of the process, as the variable is
    os.environ[_IN_SERVER] = "true"
    _how_to_set = how_to_set


def advise_cpu() -> str:
    """How whoever started this process lets the model run on the CPU."""
    setting = """'{"runtime": "onnxruntime"}'"""
    if not in_server():
        return "Use runtime='onnxruntime' to run the source model on the CPU."
    if _MODEL_PATH in os.environ:
        said = f"start the server with MLFLOW_PYFUNC_INFERENCE_CONFIG={setting} in its environment"
    elif _how_to_set is not None:
        said = f"{_how_to_set} {setting}"
    else:  # `mlflow models predict` does as if it were a server
        said = f"set MLFLOW_PYFUNC_INFERENCE_CONFIG={setting} in the environment"
    return f'To run the source model on the CPU, {said}; "auto" takes a GPU where there is one.'


def explain_crashes() -> None:
    """Let a native library that crashes leave the stacks of all threads in the server's log, not only silence."""
    if in_server() and not faulthandler.is_enabled():
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # standard error may be no file
            faulthandler.enable()


def end_supervisor(reason: str) -> None:
    """End the process that started this one as one of several workers, since each would fail alike, again and again.

    Does nothing elsewhere: a server of one worker ends with the error.
    """
    supervisor = multiprocessing.parent_process()
    if not in_server() or supervisor is None or supervisor.pid is None:
        return
    _log.critical("This server ends, since none of its workers can load the model: %s", reason)
    with contextlib.suppress(ProcessLookupError):  # another worker was faster
        os.kill(supervisor.pid, signal.SIGTERM)


def end_server(reason: str) -> None:
    """End this process, since nothing it does can bring the GPU back, and its `/ping` would go on to say all is well.

    The requests that it has are answered. Whoever supervises it (uvicorn with several workers, Docker, Kubernetes)
    starts another, which finds a GPU that works again. Returns at once, and does nothing the second time.
    """
    if not _ending.acquire(blocking=False):
        return
    _log.critical("This server ends, for another process to begin anew: %s", reason)
    insist = threading.Timer(_PATIENCE, os._exit, [1])  # calls that hang in the driver must not keep it
    insist.daemon = True
    insist.start()
    os.kill(os.getpid(), signal.SIGTERM)
