"""A deserialized engine: its tensors and profiles, and execution contexts that share one piece of scratch memory.

One execution context is not thread-safe.

Sources, under https://docs.nvidia.com/deeplearning/: tensorrt/latest/inference-library/work-dynamic-shapes.html for
profiles and shape tensors; tensorrt-rtx/latest/inference-library/work-with-cuda-graphs.html and
work-with-runtime-cache.html for what TensorRT-RTX adds.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import NamedTuple, Protocol, cast

from mlflow_trt.backends import tensorrt_api as trt_api
from mlflow_trt.backends.tensorrt import TensorRT
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.types import InputRange, ShapeProfile, TensorSpec
from mlflow_trt.errors import EngineMismatchError, ExecutionError, InputShapeError, OutOfMemoryError
from mlflow_trt.runtime.cuda.device import Device, Event, Stream
from mlflow_trt.runtime.cuda.graphs import Graph

UNBOUND = -1
MOST_FAILED_CAPTURES = 3
_NOTHING = contextlib.nullcontext()
_log = get_logger(__name__)


class KernelStore(Protocol):
    """Where the kernels that TensorRT-RTX compiled are kept from one process to the next."""

    def read(self) -> list[bytes]:
        """What was kept, in any number of parts."""

    def update(self, merge: Callable[[list[bytes]], bytes | None]) -> None:
        """Keep `merge(what others kept meanwhile)`, while no other process does the same."""


class Around(NamedTuple):
    """What is enqueued with a run as one CUDA graph: what comes before the engine, and what comes after it.

    `name` tells apart the graphs that a context has: the same name always enqueues the same for the same shapes.
    """

    name: str
    before: Callable[[], None]
    after: Callable[[], None]


def do_nothing() -> None:
    """What comes before or after an engine that runs alone."""


ENGINE_ALONE = Around("engine", do_nothing, do_nothing)


class Context:
    """An execution context with shapes, and what follows from them.

    Attributes:
        captures: whether a shape that comes again is to be captured.
        outputs: the shapes of all outputs but the `late` ones, whose shape depends on data.
        moves: what the buffers had counted when it was bound to them; UNBOUND: it is not.
        runs: since then, or since its scratch memory moved.
        scratch_address: of the memory it was given since it got its shapes; 0: none.
        graphs: captured since then.
    """

    def __init__(self, raw: trt_api.IExecutionContext, *, captures: bool) -> None:
        self.raw = raw
        self.captures = captures
        self.profile = 0
        self.moves = UNBOUND
        self.outputs: dict[str, tuple[int, ...]] = {}
        self.output_bytes = 0
        self.late: list[str] = []
        self.scratch_bytes = 0
        self.scratch_address = 0
        self.runs = 0
        self.graphs: dict[str, Graph] = {}
        self.failed_captures = 0

    def replace(self, raw: trt_api.IExecutionContext) -> None:
        """Go on with another one of TensorRT's, which has no shapes yet."""
        self.unbind()
        self.raw, self.profile = raw, 0

    def unbind(self) -> None:
        """Forget all that holds only for the addresses it knows of. The device is current, and nothing runs here."""
        self.moves = UNBOUND
        self.scratch_address = 0
        self.forget_graphs()

    def forget_graphs(self) -> None:
        """What was captured is good no more; the next run goes without a graph."""
        self.runs = 0
        graphs, self.graphs = self.graphs, {}
        for graph in graphs.values():
            graph.close()


class Engine:
    """The plan on the GPU. All of its methods want the device to be current.

    Contexts run one after the other, whatever their streams: so they need scratch memory only once, as much as the
    largest shapes that were met. The GPU has no use for two batches at the same time; while one runs, the next is
    copied.
    """

    def __init__(
        self,
        plan: bytes,
        tensorrt: TensorRT,
        device: Device,
        *,
        kernel_specialization: str = "eager",
        cuda_graphs: bool = True,
        allow_engine_host_code: bool = False,
        weights_from: Path | None = None,
        weight_streaming: bool = False,
        kernel_store: KernelStore | None = None,
    ) -> None:
        self.tensorrt = tensorrt
        self.device = device
        self._turn = threading.Lock()
        self._compiling = threading.Lock()
        self._scratch = device.device_buffer()
        self._last: tuple[Stream, Event] | None = None
        self._store = kernel_store if tensorrt.is_rtx else None
        tensorrt.log.errors()
        # Another session of this process may capture a graph meanwhile.
        with device.allocating:
            self._runtime: trt_api.Runtime | None = tensorrt.runtime(allow_engine_host_code=allow_engine_host_code)
            engine = self._deserialize(self._runtime, plan)
            if weights_from is not None:
                problem = tensorrt.refit(engine, str(weights_from))
                if problem is not None:
                    raise ExecutionError(
                        f"{tensorrt} could not put the weights of {weights_from.name} into its engine: {problem}"
                    )
            if weight_streaming:
                engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        self.raw: trt_api.ICudaEngine | None = engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.dtypes = {name: tensorrt.dtype(engine, name) for name in names}
        self.on_host = {name for name in names if tensorrt.is_on_host(engine, name)}
        self.inputs = [name for name in names if tensorrt.is_input(engine, name)]
        self.outputs = [name for name in names if name not in self.inputs]
        self._shapes = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        # An engine of fixed shapes may have no profile; it runs as if it had one that allows everything.
        numbers = range(max(engine.num_optimization_profiles, 1))
        self.profiles = tuple(self._read_profile(engine, number) for number in numbers)
        # What TensorRT reads or writes on the host while it enqueues would not happen again when a graph is replayed.
        self.uses_cuda_graphs = cuda_graphs and not self.on_host
        self._met: set[Hashable] = set()
        self._contexts = tensorrt.contexts(engine, kernel_specialization, self._store.read() if self._store else ())

    @property
    def scratch_address(self) -> int:
        """Of the memory that contexts share, for now."""
        return self._scratch.address

    def described(self, spec: TensorSpec) -> TensorSpec:
        """The tensor as the engine has it: its dtype, and fixed where the engine is."""
        if spec.name not in self.dtypes:
            raise ExecutionError(f"the engine has no tensor {spec.name!r}; it has {', '.join(self.dtypes)}")
        return TensorSpec(name=spec.name, dtype=self.dtypes[spec.name], shape=spec.shape)

    def spec_of(self, name: str) -> TensorSpec:
        """A tensor of the engine, None for what varies."""
        shape = tuple(None if size < 0 else int(size) for size in self._shapes[name])
        return TensorSpec(name=name, dtype=self.dtypes[name], shape=shape)

    def new_context(self, *, cuda_graphs: bool = True) -> Context:
        """A context without scratch memory, which `execute` gives it."""
        return Context(self.new_raw_context(), captures=cuda_graphs and self.uses_cuda_graphs)

    def new_raw_context(self) -> trt_api.IExecutionContext:
        """One of TensorRT's. Raises ExecutionError."""
        with self.device.allocating:
            context = self._contexts.new()
        if context is None:
            raise self.failure("make an execution context")
        return context

    def execute(self, context: Context, stream: Stream, done: Event, around: Around = ENGINE_ALONE) -> bool:
        """Enqueue a run after all earlier ones, with what is to be `around` it, and record `done`.

        The first time as it is, then as a CUDA graph where the context captures. Raises ExecutionError. Returns False,
        after nothing was enqueued, where a capture has failed: then the context has to be replaced.
        """
        with self._turn:
            if self._last is not None and self._last[0] is not stream:
                stream.wait_for(self._last[1])
            if context.scratch_bytes > self._scratch.nbytes and self._last is not None:
                self._last[1].synchronize()  # before its memory goes
            address = self._scratch.reserve(context.scratch_bytes)
            if address != context.scratch_address:
                context.raw.set_device_memory(address, self._scratch.nbytes)
                context.scratch_address = address
                context.forget_graphs()
            self._last = (stream, done)
            try:
                return self._enqueue(context, stream, around)
            finally:
                done.record(stream)

    def _enqueue(self, context: Context, stream: Stream, around: Around) -> bool:
        graph = context.graphs.get(around.name)
        if graph is None and context.captures and context.runs and self.device.allocating.acquire(blocking=False):
            # Where somebody allocates just now, one of the next runs captures.
            try:
                graph = self._capture(context, stream, around)
            finally:
                self.device.allocating.release()
            if graph is None:
                return False
        if graph is not None:
            graph.launch()
        else:
            # The first run may compile and allocate.
            with _NOTHING if context.runs else self.device.allocating:
                self._enqueue_all(context, stream, around)
        context.runs += 1
        return True

    def _enqueue_all(self, context: Context, stream: Stream, around: Around) -> None:
        around.before()
        if not context.raw.execute_async_v3(stream.handle):
            raise self.failure("run the engine")
        around.after()

    def _capture(self, context: Context, stream: Stream, around: Around) -> Graph | None:
        """A graph of a run, which is kept; None where there is none to be had now."""
        try:
            graph = stream.capture(lambda: self._enqueue_all(context, stream, around))
        except Exception as raised:
            error = raised if isinstance(raised, ExecutionError) else self.device.translate_error(raised)
            if error is None:
                raise
            self.tensorrt.log.errors()  # what it says of this is no more than that
            context.failed_captures += 1
            # Another library of this process may have done what CUDA forbids meanwhile: the next time may be better.
            context.captures = context.failed_captures < MOST_FAILED_CAPTURES
            if not context.captures:
                _log.warning("A CUDA graph could not be captured, and its shapes run without: %s", error)
            return None
        context.graphs[around.name] = graph
        return graph

    def compile(self, context: Context, stream: Stream, shapes: Hashable, around: Around = ENGINE_ALONE) -> bool:
        """Run shapes that were never run beside what runs, so that only this call waits for TensorRT-RTX to compile.

        Returns whether there was anything to compile. Raises ExecutionError.
        """
        if shapes in self._met or not self.tensorrt.is_rtx:
            return False
        scratch = self.device.device_buffer()
        with self._compiling:  # several at a time take as long as one after the other
            if shapes in self._met:
                return False
            try:
                context.raw.set_device_memory(scratch.reserve(context.scratch_bytes), scratch.nbytes)
                context.scratch_address = 0  # `execute` is to give it what all contexts share
                self._enqueue_all(context, stream, around)
                stream.synchronize()
            except Exception as raised:
                if not isinstance(self.device.translate_error(raised), OutOfMemoryError):
                    raise
                return False  # there may be room for it in the scratch memory that all contexts share
            finally:
                with contextlib.suppress(Exception):  # after an error; the first one is the one to tell
                    stream.synchronize()
                scratch.free()
            self._met.add(shapes)
        return True

    def keep_kernels(self) -> None:
        """Store what was compiled, for the next process."""
        if self._store is not None:
            self._store.update(self._kernels)

    def layer_information(self, context: Context) -> str:
        """What TensorRT's engine inspector tells about the layers, as JSON."""
        return self.tensorrt.layer_information(cast("trt_api.ICudaEngine", self.raw), context.raw)

    def failure(self, action: str, kind: type[InputShapeError | ExecutionError] = ExecutionError) -> Exception:
        """The error to raise where TensorRT said no, with what its log says."""
        said = self.tensorrt.log.last_error()
        if re.search("out ?of ?memory", said, re.IGNORECASE):
            return OutOfMemoryError(f"{self.tensorrt} has too little memory on {self.device.gpu.name}: {said}")
        return kind(f"{self.tensorrt} could not {action}: {said}")

    def close(self) -> None:
        """Free everything, after the contexts."""
        # In this order: contexts need their engine, an engine its runtime.
        self._last = None
        self._contexts.close()
        self.raw = None
        self._runtime = None
        self._scratch.free()

    def _kernels(self, others: list[bytes]) -> bytes | None:
        # No context may compile meanwhile into what is read here.
        with self._compiling, self._turn, self.device.allocating:
            return self._contexts.kernels(others)

    def _deserialize(self, runtime: trt_api.Runtime, plan: bytes) -> trt_api.ICudaEngine:
        tensorrt, gpu = self.tensorrt, self.device.gpu
        doubt = tensorrt.engine_validity(runtime, plan)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            failure = self.failure("load the engine")
            if doubt is None or isinstance(failure, OutOfMemoryError):
                raise failure
            raise EngineMismatchError(f"{tensorrt} cannot run this engine on {gpu}: {doubt} ({failure})")
        if doubt is not None:
            _log.warning(
                "%s does not officially run this engine on %s (%s). Its results may be wrong: compare them with "
                "those of runtime='onnxruntime'.",
                tensorrt,
                gpu,
                doubt,
            )
        return engine

    def _read_profile(self, engine: trt_api.ICudaEngine, index: int) -> ShapeProfile:
        ranges: dict[str, InputRange] = {}
        for name in self.inputs if engine.num_optimization_profiles else ():
            if name in self.on_host:
                triple = engine.get_tensor_profile_values(index, name)
            else:
                triple = engine.get_tensor_profile_shape(name, index)
            # TensorRT gives nothing for an input that a profile need not mention.
            low, usual, high = (tuple(map(int, shape)) for shape in triple or [self._shapes[name]] * 3)
            ranges[name] = InputRange(min=low, opt=usual, max=high, is_values=name in self.on_host and bool(triple))
        return ShapeProfile(ranges=ranges)
