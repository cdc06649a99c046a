"""The only module that imports onnxruntime: sessions on the CPU, and errors told apart."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from mlflow_trt.core.arrays import Array
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.optional import is_installed
from mlflow_trt.errors import ExecutionError, InputError, MissingDependencyError, OnnxModelError, OutOfMemoryError

CPU_PROVIDER = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_NUMPY_NAMES = {"float": "float32", "double": "float64", "bool": "bool"} | {
    name: name for name in ("float16", "int8", "uint8", "int16", "uint16", "int32", "int64")
}
_NUMPY_TYPES: dict[str, np.dtype[Any]] = {f"tensor({name})": np.dtype(numpy) for name, numpy in _NUMPY_NAMES.items()}
_LARGE = 2**30  # protobuf ends at 2 GB
_log = get_logger(__name__)
_NO_MEMORY = ("Failed to allocate memory", "bad_alloc", "bad allocation")  # it has no exception for this


def import_onnxruntime() -> Any:
    """The module, which has no type stubs. Raises MissingDependencyError where no package provides it."""
    if not is_installed("onnxruntime"):
        raise MissingDependencyError(
            "ONNX Runtime is not installed: `pip install onnxruntime`, or `pip install onnxruntime-gpu`. "
            "Install one of them, not both: they provide the same module.",
            packages=("onnxruntime", "onnxruntime-gpu"),
        )
    import onnxruntime

    return onnxruntime


@functools.cache
def _cpu_information() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def saturates(cpu_information: str) -> bool:
    """Whether the integer kernels that ONNX Runtime makes of Q/DQ may answer wrongly on this CPU, by its description.

    x86 without VNNI adds up pairs of products in 16 bits, and cuts off what does not fit.
    """
    flags = re.search(r"^flags\s*:(.*)$", cpu_information, re.MULTILINE)
    return flags is not None and not {"avx512_vnni", "avx_vnni"} & set(flags[1].split())


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
        onnxruntime = import_onnxruntime()
        self.version: str = onnxruntime.__version__
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what fails is in the exception, too
        if saturates(_cpu_information()):
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        for name, value in (session_options or {}).items():
            _set_option(onnxruntime, options, name, value)
        available = onnxruntime.get_available_providers()
        if providers is None:
            wanted: list[Any] = [name for name in (_CUDA,) if prefer_cuda and name in available] + [CPU_PROVIDER]
        else:
            wanted = [entry if isinstance(entry, str) else (entry[0], dict(entry[1])) for entry in providers]
        usable = [entry for entry in wanted if _name_of(entry) in available] or [CPU_PROVIDER]
        try:
            self._session = self._open(onnxruntime, path, options, usable)
        except Exception as error:  # its exceptions share no base class
            if providers is None or usable == [CPU_PROVIDER]:
                raise self._cannot_run(error) from error
            _log.warning("ONNX Runtime's providers %s cannot be used: %s", ", ".join(map(_name_of, usable)), error)
            try:
                self._session = self._open(onnxruntime, path, options, [CPU_PROVIDER])
            except Exception as second:
                raise self._cannot_run(second) from second
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
        self.device: str = "CUDA" if _CUDA in active else active[0].removesuffix("ExecutionProvider")

    @property
    def inference_session(self) -> Any:
        """ONNX Runtime's own object."""
        return self._session

    @staticmethod
    def _open(onnxruntime: Any, path: Path, options: Any, providers: Sequence[Any]) -> Any:
        return onnxruntime.InferenceSession(str(path), sess_options=options, providers=list(providers))

    def _cannot_run(self, error: Exception) -> ExecutionError:
        return ExecutionError(f"ONNX Runtime {self.version} cannot run this model: {error}")

    @property
    def output_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """By name, as ONNX Runtime infers them; None for what varies."""
        return {
            output.name: tuple(size if isinstance(size, int) else None for size in output.shape)
            for output in self._session.get_outputs()
        }

    @property
    def output_types(self) -> dict[str, np.dtype[Any] | None]:
        """By name, as ONNX Runtime infers them; None for what numpy does not have, and for what is no tensor."""
        return {output.name: _NUMPY_TYPES.get(output.type) for output in self._session.get_outputs()}

    def run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs of these names. Raises InputError, ExecutionError or OutOfMemoryError."""
        if not names:
            return {}  # ONNX Runtime would return all there are
        try:
            results = self._session.run(list(names), dict(feeds))
        except Exception as error:  # as above
            if type(error).__name__ == "InvalidArgument":
                raise InputError(f"ONNX Runtime {self.version} refuses the input: {error}") from error
            if any(sign in str(error) for sign in _NO_MEMORY):
                raise OutOfMemoryError(f"ONNX Runtime {self.version} lacks memory: {error}; run fewer rows") from error
            raise ExecutionError(f"ONNX Runtime {self.version} failed: {error}") from error
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


def calibrated_magnitudes(
    path: Path, feeds: Sequence[Mapping[str, Array]], method: str, operators: Sequence[str], workdir: Path
) -> dict[str, float]:
    """The magnitude to cut off at, by ONNX Runtime's calibration, for what these operators read and write.

    `method` is `entropy` or `percentile`.
    """
    import_onnxruntime()
    from onnxruntime.quantization import CalibrationMethod, calibrate

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        calibrator = calibrate.create_calibrator(
            path,
            list(operators),
            augmented_model_path=str(workdir / "calibration.onnx"),
            calibrate_method=CalibrationMethod[method.capitalize()],
            extra_options={"symmetric": True},
        )
        for one in feeds:  # each by itself: everything that is collected at once is in memory at once
            calibrator.collect_data(_Reader(one))
        ranges = calibrator.compute_data().data
    return {name: max(abs(float(limit)) for limit in data.range_value) for name, data in ranges.items()}


class _Reader:
    """What ONNX Runtime's calibration reads from: one feed, then None."""

    def __init__(self, feeds: Mapping[str, Array]) -> None:
        self._feeds: Mapping[str, Array] | None = feeds

    def get_next(self) -> Mapping[str, Array] | None:
        feeds, self._feeds = self._feeds, None
        return feeds
