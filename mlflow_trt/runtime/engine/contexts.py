"""Execution contexts for the last shapes that a slot ran, bound to its buffers."""

from __future__ import annotations

import collections
from collections.abc import Hashable

from mlflow_trt.errors import ExecutionError, InputShapeError
from mlflow_trt.runtime.batching.sizes import Shapes
from mlflow_trt.runtime.cuda.device import Event, Stream
from mlflow_trt.runtime.cuda.graphs import Graph
from mlflow_trt.runtime.engine.buffers import Buffers
from mlflow_trt.runtime.engine.engine import ENGINE_ALONE, Around, Context, Engine

MOST_CONTEXTS = 16
"""Or as many as there are sizes to run profiles in, where these are more. Each keeps its shapes, its bindings and its
CUDA graph, so that a shape that comes again costs nothing but a launch. They share their kernels and scratch memory:
one takes up to 4 MB and 30 ms to make."""


def depends_on_data(shape: tuple[int, ...]) -> bool:
    """Whether TensorRT can tell an output's shape only by computing it."""
    return -1 in shape


class Bindings:
    """Contexts by shapes, the ones used last. All methods want the device to be current."""

    def __init__(self, engine: Engine, buffers: Buffers, stream: Stream, most: int) -> None:
        self._engine = engine
        self._most = max(most, MOST_CONTEXTS)
        self._buffers = buffers
        self._stream = stream
        self._done: Event | None = engine.device.event()
        self._contexts: collections.OrderedDict[Hashable, Context] = collections.OrderedDict()
        self._allocator = engine.tensorrt.output_allocator(self._reallocate, self._notify_shape)
        self._allocated: Shapes = {}
        self._allocation_error: Exception | None = None

    def bind(self, profile: int, shapes: Shapes) -> tuple[Context, Hashable]:
        """A context for these shapes, and what names them.

        Raises InputShapeError where TensorRT finds that the shapes do not go together.
        """
        key: tuple[Hashable, ...] = (profile, *shapes.values())
        if self._engine.on_host:
            key += tuple(self._values(name, shapes) for name in self._engine.on_host)
        context = self._contexts.get(key)
        if context is not None and context.moves == self._buffers.moves.count:
            self._contexts.move_to_end(key)
            return context, key
        context = self._contexts.pop(key, None)
        if context is None:
            if len(self._contexts) < self._most:
                context = self._engine.new_context()
            else:
                _, context = self._contexts.popitem(last=False)
        self.set_shapes(context, profile, shapes)
        self._contexts[key] = context
        return context, key

    def execute(self, context: Context, profile: int, shapes: Shapes, around: Around = ENGINE_ALONE) -> None:
        """Enqueue a run. Raises ExecutionError; OutOfMemoryError where an output found no room."""
        self._allocation_error = None
        try:
            while not self._execute(context, around):
                context.replace(self._engine.new_raw_context())
                self.set_shapes(context, profile, shapes)
        except ExecutionError:
            if self._allocation_error is not None:
                raise self._allocation_error from None
            raise

    def _execute(self, context: Context, around: Around) -> bool:
        assert self._done is not None  # noqa: S101  # for the type checker: only a closed slot has none
        return self._engine.execute(context, self._stream, self._done, around)

    def output_shapes(self, context: Context) -> Shapes:
        """The shapes of all outputs, after a run that came to its end."""
        if not context.late:
            return context.outputs
        found = {**self._allocated, **context.outputs}
        return {name: found[name] for name in self._engine.outputs}

    def graphs(self, name: str) -> dict[Hashable, Graph]:
        """The graphs of that name that are good for the memory there is, by what `bind` names their shapes."""
        moves, scratch = self._buffers.moves.count, self._engine.scratch_address
        return {
            key: context.graphs[name]
            for key, context in self._contexts.items()
            if name in context.graphs and (context.moves, context.scratch_address) == (moves, scratch)
        }

    def clear(self) -> None:
        """Let go of everything, while the device is current: pycuda frees an event when nobody refers to it."""
        for context in self._contexts.values():
            context.unbind()
        self._contexts.clear()
        self._allocator = None
        self._done = None

    def set_shapes(self, context: Context, profile: int, shapes: Shapes) -> None:
        """Bind a context to the buffers for these shapes."""
        raw, engine = context.raw, self._engine
        context.unbind()
        if profile != context.profile:
            if not raw.set_optimization_profile_async(profile, self._stream.handle):
                raise engine.failure(f"switch to optimization profile {profile}")
            self._stream.synchronize()
            context.profile = profile
        for name in engine.inputs:
            if not raw.set_input_shape(name, shapes[name]):
                raise engine.failure(f"take the shape {shapes[name]} for input {name!r}", InputShapeError)
            if not raw.set_tensor_address(name, self._buffers.address(name)):
                raise engine.failure(f"bind input {name!r}")
        try:
            missing = raw.infer_shapes()
        except RuntimeError as error:
            listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise engine.failure(f"infer the output shapes from {listed}", InputShapeError) from error
        if missing:
            raise engine.failure(f"infer the output shapes, since {', '.join(missing)} is not specified")
        found = {name: tuple(raw.get_tensor_shape(name)) for name in engine.outputs}
        context.late = [name for name, shape in found.items() if depends_on_data(shape)]
        context.outputs = {name: shape for name, shape in found.items() if name not in context.late}
        if context.late:
            context.captures = False  # a graph would replay the allocations of the run that it was captured from
        context.output_bytes = sum(self._buffers.nbytes(name, shape) for name, shape in context.outputs.items())
        self._bind_outputs(context)
        context.scratch_bytes = raw.update_device_memory_size_for_shapes()
        context.moves = self._buffers.moves.count

    def _bind_outputs(self, context: Context) -> None:
        """Give the outputs their memory; for that of a late one TensorRT asks the allocator while the engine runs."""
        for name, shape in context.outputs.items():
            if not context.raw.set_tensor_address(name, self._buffers.reserve(name, shape)):
                raise self._engine.failure(f"bind output {name!r}")
        for name in context.late:
            if not context.raw.set_output_allocator(name, self._allocator):
                raise self._engine.failure(f"set an output allocator for {name!r}")

    def _values(self, name: str, shapes: Shapes) -> bytes:
        """The values of an input that shapes are computed from."""
        if name not in shapes:
            return b""
        return self._buffers.array(name, shapes[name]).tobytes()

    def _reallocate(self, name: str, nbytes: int) -> int:
        try:
            return self._buffers.memory[name].reserve(nbytes)
        except Exception as error:  # noqa: BLE001  # must not travel through TensorRT, which takes 0 for a failure
            self._allocation_error = error
            return 0

    def _notify_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._allocated[name] = shape
