"""What opens and runs ONNX files on ONNX Runtime; as a process of its own, it does so for `onnxruntime_process`.

ONNX Runtime ends the process with some files that onnx.checker accepts, so a file from outside first runs here. This
module starts in a quarter of a second, for which it imports nothing of MLflow: errors go over as names and texts.
"""

from __future__ import annotations

import functools
import os
import re
import select
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlflow_trt.backends import shared_arrays

CUDA = "CUDAExecutionProvider"


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


def make_options(*, optimize: bool) -> Any:
    """ONNX Runtime's session options, with which it computes what the file says."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is in the exception, too
    if saturates(_cpu_information()):
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def open_session(path: Path, *, optimize: bool) -> Any:
    """An ONNX file on ONNX Runtime's CPU provider."""
    import onnxruntime

    options = make_options(optimize=optimize)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def open_calibrator(path: Path, method: str, operators: Sequence[str], augmented: Path) -> Any:
    """ONNX Runtime's calibration for what these operators read and write; `augmented` is a file to use."""
    from onnxruntime.quantization import CalibrationMethod, calibrate

    return calibrate.create_calibrator(
        path,
        list(operators),
        augmented_model_path=str(augmented),
        calibrate_method=CalibrationMethod[method.capitalize()],
        extra_options={"symmetric": True},
    )


def main(handle: int) -> None:
    """Answer what comes over the socket, until the other side closes it or ends."""
    channel = socket.socket(fileno=handle)
    threading.Thread(target=_end_with_parent, args=(channel,), daemon=True).start()
    worker = _Worker()
    while True:
        try:
            request, feeds = shared_arrays.receive(channel)
        except EOFError:
            os._exit(0)  # nothing is left to do, and tearing sessions down takes time
        try:
            shared_arrays.send(channel, *worker.answer(request, feeds))
        except Exception as error:  # noqa: BLE001  # whatever it is, the one that asked has to hear of it
            version = getattr(sys.modules.get("onnxruntime"), "__version__", "")
            failure = {"error": type(error).__name__, "text": str(error), "version": version}
            shared_arrays.send(channel, failure, {})


def _end_with_parent(channel: socket.socket) -> None:
    poll = select.poll()
    poll.register(channel, select.POLLRDHUP)
    poll.poll()
    os._exit(1)


class _Worker:
    """The sessions and calibrators that are open, by the number that they were given."""

    def __init__(self) -> None:
        self._open: dict[int, Any] = {}

    def answer(
        self, request: Mapping[str, Any], feeds: dict[str, npt.NDArray[Any]]
    ) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        for number in request["dropped"]:
            self._open.pop(number, None)
        number = request["number"]
        match request["do"]:
            case "load":
                session = self._open[number] = open_session(Path(request["path"]), optimize=request["optimize"])
                return {"outputs": [(value.name, value.type, value.shape) for value in session.get_outputs()]}, {}
            case "run":
                names = request["names"]
                return {}, dict(zip(names, self._open[number].run(names, feeds), strict=True))
            case "calibrate":
                self._open[number] = open_calibrator(
                    Path(request["path"]), request["method"], request["operators"], Path(request["augmented"])
                )
                return {}, {}
            case "collect":  # each by itself: everything that is collected at once is in memory at once
                self._open[number].collect_data(_Reader(feeds))
                return {}, {}
            case "ranges":
                ranges = self._open.pop(number).compute_data().data
                return {"largest": {name: _largest(data.range_value) for name, data in ranges.items()}}, {}
        raise ValueError(request["do"])


def _largest(limits: Sequence[Any]) -> float:
    return max(float(np.max(np.abs(limit))) for limit in limits)


class _Reader:
    """What ONNX Runtime's calibration reads from: one feed, then None."""

    def __init__(self, feeds: Mapping[str, npt.NDArray[Any]]) -> None:
        self._feeds: Mapping[str, npt.NDArray[Any]] | None = feeds

    def get_next(self) -> Mapping[str, npt.NDArray[Any]] | None:
        feeds, self._feeds = self._feeds, None
        return feeds
