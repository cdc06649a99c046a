"""ONNX Runtime in this process, and its errors told apart. What comes from outside runs by `onnxruntime_process`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from mlflow_trt.backends.onnxruntime_worker import CUDA, make_options
from mlflow_trt.core.arrays import Array
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.optional import is_installed
from mlflow_trt.core.types import TensorSpec
from mlflow_trt.errors import (
    ExecutionError,
    InputError,
    MissingDependencyError,
    MlflowTrtError,
    OnnxModelError,
    OutOfMemoryError,
)

CPU_PROVIDER = "CPUExecutionProvider"
ONNX_EXECUTION_PROVIDERS = [CPU_PROVIDER]
"""What runs a model where no providers are given. In `mlflow.onnx`, which has it too, CUDA is first."""
_NUMPY_NAMES = {"float": "float32", "double": "float64", "bool": "bool"} | {
    name: name for name in ("float16", "int8", "uint8", "int16", "uint16", "int32", "int64")
}
NUMPY_TYPES: dict[str, np.dtype[Any]] = {f"tensor({name})": np.dtype(numpy) for name, numpy in _NUMPY_NAMES.items()}
_LARGE = 2**30  # protobuf ends at 2 GB
_log = get_logger(__name__)
# It has no exception for this; the last is what the memory for arrays is refused with.
_NO_MEMORY = ("Failed to allocate memory", "bad_alloc", "bad allocation", "Cannot allocate memory")


def check_installed() -> None:
    """Raise MissingDependencyError where no package provides ONNX Runtime."""
    if not is_installed("onnxruntime"):
        raise MissingDependencyError(
            "ONNX Runtime is not installed: `pip install onnxruntime`, or `pip install onnxruntime-gpu`. "
            "Install one of them, not both: they provide the same module.",
            packages=("onnxruntime", "onnxruntime-gpu"),
        )


def load_error(version: str, text: str) -> ExecutionError:
    """The error for a model that could not be opened."""
    return ExecutionError(f"ONNX Runtime {version} cannot run this model: {text}")


def run_error(version: str, kind: str, text: str) -> MlflowTrtError:
    """The error for a call that failed with an exception of this name, which share no base class."""
    if kind == "InvalidArgument":
        return InputError(f"ONNX Runtime {version} refuses the input: {text}")
    if kind == "MemoryError" or any(sign in text for sign in _NO_MEMORY):
        return OutOfMemoryError(f"ONNX Runtime {version} lacks memory: {text}; run fewer rows")
    return ExecutionError(f"ONNX Runtime {version} failed: {text}")


class CpuModel:
    """An ONNX file on ONNX Runtime's CPU provider, whatever other providers the installed ONNX Runtime has.

    With `prefer_cuda` on its CUDA provider, where there is one that works; `device` says which it is. With
    `optimize=False` every node computes what it says, one after the other. `providers` and `session_options` are those
    that `mlflow.onnx` takes; a provider that is not there, or does not work, is left out with a warning.
    """

    def __init__(
        self,
        path: Path,
        *,
        optimize: bool = True,
        prefer_cuda: bool = False,
        providers: Sequence[Any] | None = None,
        session_options: Mapping[str, Any] | None = None,
    ) -> None:
        check_installed()
        import onnxruntime

        self.version: str = onnxruntime.__version__
        options = make_options(optimize=optimize)
        for name, value in (session_options or {}).items():
            _set_option(onnxruntime, options, name, value)
        available = onnxruntime.get_available_providers()
        if providers is None:
            wanted: list[Any] = [
                name for name in (CUDA,) if prefer_cuda and name in available
            ] + ONNX_EXECUTION_PROVIDERS
        else:
            wanted = [entry if isinstance(entry, str) else (entry[0], dict(entry[1])) for entry in providers]
        usable = [entry for entry in wanted if _name_of(entry) in available] or [CPU_PROVIDER]
        try:
            self._session = onnxruntime.InferenceSession(str(path), sess_options=options, providers=usable)
        except Exception as error:  # its exceptions share no base class
            if providers is None or usable == [CPU_PROVIDER]:
                raise load_error(self.version, str(error)) from error
            _log.warning("ONNX Runtime's providers %s cannot be used: %s", ", ".join(map(_name_of, usable)), error)
            try:
                self._session = onnxruntime.InferenceSession(str(path), sess_options=options, providers=[CPU_PROVIDER])
            except Exception as second:
                raise load_error(self.version, str(second)) from second
        # Asked, since a provider that does not work is left out without an error.
        active = self._session.get_providers()
        left_out = [name for name in map(_name_of, wanted) if name not in active]
        if providers is not None and left_out:
            _log.warning(
                "ONNX Runtime %s runs the model with %s: it has no %s that works here",
                self.version,
                ", ".join(active),
                ", ".join(left_out),
            )
        self.device: str = "CUDA" if CUDA in active else active[0].removesuffix("ExecutionProvider")

    @property
    def inference_session(self) -> Any:
        """ONNX Runtime's own object."""
        return self._session

    def described(self, spec: TensorSpec) -> TensorSpec:
        """An input with the dtype that it has in the file."""
        types = {value.name: value.type for value in self._session.get_inputs()}
        dtype = NUMPY_TYPES.get(types.get(spec.name, ""))
        return spec if dtype is None else replace(spec, dtype=dtype.name)

    def run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs of these names. Raises InputError, ExecutionError or OutOfMemoryError."""
        if not names:
            return {}  # ONNX Runtime would return all there are
        try:
            results = self._session.run(list(names), dict(feeds))
        except Exception as error:  # as above
            raise run_error(self.version, type(error).__name__, str(error)) from error
        return dict(zip(names, results, strict=True))


def write_model_of(session: Any, path: Path) -> None:
    """Write the model that an onnxruntime.InferenceSession was made of, whose weights may lie beside it.

    Raises OnnxModelError where it tells neither its file nor its bytes.
    """
    content, file = getattr(session, "_model_bytes", None), getattr(session, "_model_path", None)
    if content is not None:
        path.write_bytes(content)
    elif file is not None and Path(file).is_file():
        proto = onnx.load(file)  # with its external data, whatever that is called
        size = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
        onnx.save_model(proto, path, save_as_external_data=size > _LARGE)
    else:
        raise OnnxModelError(f"an ONNX Runtime session does not tell its model: its file is {str(file)!r}")


def _name_of(entry: Any) -> str:
    return str(entry if isinstance(entry, str) else entry[0])


def _set_option(onnxruntime: Any, options: Any, name: str, value: Any) -> None:
    """Set one of the options that `mlflow.onnx` knows, whose values are as YAML can write them."""
    if name == "extra_session_config":
        for key, text in value.items():
            options.add_session_config_entry(key, text)
        return
    if name == "execution_mode":
        value = getattr(onnxruntime.ExecutionMode, f"ORT_{value.upper()}")
    elif name == "graph_optimization_level":
        value = onnxruntime.GraphOptimizationLevel(value)
    setattr(options, name, value)
