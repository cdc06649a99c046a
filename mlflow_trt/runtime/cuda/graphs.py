"""CUDA graphs: what was enqueued on a stream once, launched again as a whole.

Asked of the driver library itself, since pycuda has no API for it. Sources, under
https://docs.nvidia.com/cuda/cuda-driver-api/: group__CUDA__STREAM.html for capture, group__CUDA__GRAPH.html.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import NamedTuple, Protocol

from mlflow_trt.backends.cuda_driver import DriverError, DriverLibrary
from mlflow_trt.errors import ExecutionError, OutOfMemoryError

_OUT_OF_MEMORY = 2
# Other threads may allocate meanwhile: only what this one does is refused.
_CAPTURE_MODE_THREAD_LOCAL = 1


class Graph(Protocol):
    """Good for the addresses that it was captured with. Its methods want the device to be current."""

    @property
    def handle(self) -> int:
        """What the driver calls it, until it is closed."""

    def launch(self) -> None:
        """Enqueue all of it on the stream that it was captured from."""

    def close(self) -> None:
        """Free it. It does not run any more."""


class EntryPoints(NamedTuple):
    """The addresses of the driver's functions with which graphs are launched without Python, and the current context.

    `owner` keeps them good.
    """

    push: int
    pop: int
    upload: int
    launch: int
    synchronize: int
    context: int
    owner: object


class Graphs(Protocol):
    """Captures graphs."""

    def entry_points(self) -> EntryPoints:
        """What launches them without Python. The device is current. Raises ExecutionError."""

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Graph:
        """What `enqueue` sends to the stream of that handle, which does not run for it. The device is current.

        Raises ExecutionError, and what `enqueue` raises.
        """


class DriverGraphs:
    """Those of the CUDA driver."""

    def __init__(self) -> None:
        self._library = DriverLibrary()

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Graph:
        handle = ctypes.c_void_p(stream)
        self._call("cuStreamBeginCapture_v2", handle, _CAPTURE_MODE_THREAD_LOCAL)
        template = ctypes.c_void_p()
        try:
            try:
                enqueue()
            except BaseException:
                with contextlib.suppress(ExecutionError):  # that it is no good is known already
                    self._call("cuStreamEndCapture", handle, ctypes.byref(template))
                raise
            self._call("cuStreamEndCapture", handle, ctypes.byref(template))
            graph = ctypes.c_void_p()
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(graph), template, ctypes.c_ulonglong(0))
        finally:
            if template.value is not None:
                self._call("cuGraphDestroy", template)
        return _DriverGraph(self._library, graph, handle)

    def entry_points(self) -> EntryPoints:
        context = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(context))
        find = self._library.address
        return EntryPoints(
            push=find("cuCtxPushCurrent_v2"),
            pop=find("cuCtxPopCurrent_v2"),
            upload=find("cuMemcpyHtoDAsync_v2"),
            launch=find("cuGraphLaunch"),
            synchronize=find("cuStreamSynchronize"),
            context=context.value or 0,
            owner=self._library,
        )

    def _call(self, function: str, *arguments: object) -> None:
        _call(self._library.call, function, *arguments)


class _DriverGraph:
    def __init__(self, library: DriverLibrary, graph: ctypes.c_void_p, stream: ctypes.c_void_p) -> None:
        self._library = library
        self._graph: ctypes.c_void_p | None = graph
        self._stream = stream
        self._launch = library.held("cuGraphLaunch")

    @property
    def handle(self) -> int:
        return (self._graph.value if self._graph is not None else None) or 0

    def launch(self) -> None:
        status = self._launch(self._graph, self._stream)
        if status:
            _call(self._library.check, "cuGraphLaunch", status)

    def close(self) -> None:
        if self._graph is not None:
            graph, self._graph = self._graph, None
            _call(self._library.call, "cuGraphExecDestroy", graph)


def _call(function: Callable[..., None], *arguments: object) -> None:
    """Call one of the driver library's methods, and let its errors become ours."""
    try:
        function(*arguments)
    except DriverError as error:
        if error.status == _OUT_OF_MEMORY:
            raise OutOfMemoryError(f"the GPU is out of memory: {error}") from error
        raise ExecutionError(f"CUDA failed: {error}") from error
