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
from typing import Protocol, cast

from mlflow_trt.backends import tensorrt_api as trt_api
from mlflow_trt.backends.tensorrt import TensorRT
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.types import InputRange, ShapeProfile, TensorSpec
from mlflow_trt.errors import EngineMismatchError, ExecutionError, InputShapeError, OutOfMemoryError
from mlflow_trt.runtime.cuda.device import Device, Event, Stream

FIRST_RUNS = 3
UNBOUND = -1
_NOTHING = contextlib.nullcontext()
_log = get_logger(__name__)


class KernelStore(Protocol):
    """Where the kernels that TensorRT-RTX compiled are kept from one process to the next."""

    def read(self) -> list[bytes]:
        """What was kept, in any number of parts."""

    def update(self, merge: Callable[[list[bytes]], bytes | None]) -> None:
        """Keep `merge(what others kept meanwhile)`, while no other process does the same."""


class Context:
    """An execution context with shapes, and what follows from them.

    `outputs` are the shapes of all outputs but the `late` ones, whose shape depends on data. `moves` is what the
    buffers had counted when it was bound to them; UNBOUND: it is not. `runs` are those since then. `scratch_address`
    is what it was given since it got its shapes, and `graph_scratch` what stands in the CUDA graph that it may have
    captured, if it `captures`; 0: nothing.
    """

    def __init__(self, raw: trt_api.IExecutionContext, *, captures: bool) -> None:
        self.raw = raw
        self.captures = captures
        self.profile = 0
        self.moves = UNBOUND
        self.outputs: dict[str, tuple[int, ...]] = {}
        self.late: list[str] = []
        self.scratch_bytes = 0
        self.scratch_address = 0
        self.graph_scratch = 0
        self.runs = 0

    def replace(self, other: Context) -> None:
        """Be another context, which has no shapes yet."""
        self.raw, self.captures, self.profile, self.moves = other.raw, other.captures, 0, UNBOUND
        self.scratch_address, self.graph_scratch, self.runs = 0, 0, 0


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

    def described(self, spec: TensorSpec) -> TensorSpec:
        """The tensor as the engine has it: its dtype, and fixed where the engine is."""
        if spec.name not in self.dtypes:
            raise ExecutionError(f"the engine has no tensor {spec.name!r}; it has {', '.join(self.dtypes)}")
        return TensorSpec(name=spec.name, dtype=self.dtypes[spec.name], shape=spec.shape)

    def new_context(self, *, cuda_graphs: bool = True) -> Context:
        """A context without scratch memory, which `execute` gives it."""
        captures = cuda_graphs and self.uses_cuda_graphs
        with self.device.allocating:
            context = self._contexts.new(cuda_graphs=captures)
        if context is None:
            raise self.failure("make an execution context")
        return Context(context, captures=captures)

    def execute(self, context: Context, stream: Stream, done: Event) -> bool:
        """Enqueue a run after all earlier ones, and record `done`. Raises ExecutionError.

        Returns False, and does nothing, where the context has a graph that would use scratch memory of before: then it
        has to be replaced.
        """
        with self._turn:
            if self._last is not None and self._last[0] is not stream:
                stream.wait_for(self._last[1])
            if context.scratch_bytes > self._scratch.nbytes and self._last is not None:
                self._last[1].synchronize()  # before its memory goes
            address = self._scratch.reserve(context.scratch_bytes)
            if context.graph_scratch not in (0, address):
                return False
            if address != context.scratch_address:
                context.raw.set_device_memory(address, self._scratch.nbytes)
                context.scratch_address = address
                context.runs = 0
            self._last = (stream, done)
            if context.captures:
                context.graph_scratch = address  # before the run: it may end in an error after the capture
            try:
                # The first runs of a context may compile, allocate, and capture its graph.
                with self.device.allocating if context.runs < FIRST_RUNS else _NOTHING:
                    if not context.raw.execute_async_v3(stream.handle):
                        raise self.failure("run the engine")
                context.runs += 1
            finally:
                done.record(stream)
        return True

    def is_new(self, shapes: Hashable) -> bool:
        """Whether nothing of these shapes ran before, so that TensorRT-RTX has kernels to compile."""
        new = shapes not in self._met
        self._met.add(shapes)
        return new

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
        with self._turn, self.device.allocating:
            return self._contexts.kernels(others)

    def _deserialize(self, runtime: trt_api.Runtime, plan: bytes) -> trt_api.ICudaEngine:
        tensorrt, gpu = self.tensorrt, self.device.gpu
        doubt = tensorrt.engine_validity(runtime, plan)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None and doubt is not None:
            raise EngineMismatchError(
                f"{tensorrt} cannot run this engine on {gpu}: {doubt} ({tensorrt.log.last_error()})"
            )
        if engine is None:
            raise self.failure("load the engine")
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
