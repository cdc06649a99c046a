"""Session on a TensorRT engine.

Sources: https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-dynamic-shapes.html for profiles,
shape tensors and output allocators; one execution context is not thread-safe, so calls take turns.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from mlflow_trt import trt_api
from mlflow_trt._logging import get_logger
from mlflow_trt.dtypes import numpy_dtype
from mlflow_trt.errors import EngineMismatchError, ExecutionError, InputShapeError, OutOfMemoryError, SessionClosedError
from mlflow_trt.inputs import Feeds, prepare_feeds
from mlflow_trt.runtime.batching import run_in_pieces
from mlflow_trt.runtime.device import Device, DeviceBuffer, PinnedBuffer, Stream
from mlflow_trt.runtime.profiles import choose_profile
from mlflow_trt.runtime.session import Session
from mlflow_trt.spec import BatchAxis, InputRange, ShapeProfile, TensorSpec
from mlflow_trt.trt import TensorRT

_log = get_logger(__name__)

Outputs = dict[str, npt.NDArray[np.generic]]


class TensorRTSession(Session):
    """Runs a plan on one GPU.

    Args:
        plan: the engine's bytes. They are executable content: check where they come from before.
        tensorrt: the distribution and release that built it.
        device: the GPU.
        inputs, outputs: the model's tensors, for their names and order; dtypes are the engine's own.
        batch_axis: what may be split and padded where a batch does not fit the engine's profiles.
        kernel_specialization: TensorRT-RTX only. `eager` compiles the kernels for a new shape before the first
            result, which then equals all later ones; `lazy` answers with generic kernels first.
        allow_engine_host_code: let the plan bring code that runs on the CPU.
        weights_from: the ONNX file with the weights of a plan that was stripped of them.
        weight_streaming: the plan was built for it: as many weights stay in host memory as TensorRT thinks best.

    Raises:
        EngineMismatchError: TensorRT says that this machine cannot run the plan.
        ExecutionError: TensorRT does not load it; OutOfMemoryError where the GPU lacks memory.
    """

    runtime: ClassVar[str] = "tensorrt"

    def __init__(
        self,
        plan: bytes,
        *,
        tensorrt: TensorRT,
        device: Device,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        batch_axis: BatchAxis | None = None,
        kernel_specialization: str = "eager",
        allow_engine_host_code: bool = False,
        weights_from: Path | None = None,
        weight_streaming: bool = False,
    ) -> None:
        super().__init__()
        self._tensorrt = tensorrt
        self._device = device
        self._batch_axis = batch_axis
        resources = _Resources(
            plan,
            tensorrt,
            device,
            kernel_specialization,
            allow_engine_host_code=allow_engine_host_code,
            weights_from=weights_from,
            weight_streaming=weight_streaming,
        )
        # Runs at close(), at the latest before the interpreter ends: TensorRT and pycuda must still be alive.
        self._finalizer = weakref.finalize(self, resources.release)
        self._resources = resources
        self.inputs = tuple(resources.described(spec) for spec in inputs)
        self.outputs = tuple(resources.described(spec) for spec in outputs)
        self.profiles = resources.profiles

    @property
    def description(self) -> str:
        return f"{self._tensorrt} on {self._device.gpu.name}"

    def _run(self, feeds: Feeds) -> Outputs:
        with self._resources.lock, self._device.current():
            self._check_open()
            choice = choose_profile(self.profiles, feeds, self._batch_axis)
            if choice.rows is None or self._batch_axis is None:
                return self._execute(choice.profile, feeds)
            smallest, largest = choice.rows
            execute = functools.partial(self._execute, choice.profile)
            return run_in_pieces(feeds, self._batch_axis, smallest, largest, execute)

    def time_phases(self, inputs: Mapping[str, npt.ArrayLike], runs: int) -> list[Phases]:
        """Milliseconds on the GPU for each of so many runs, after one that does not count.

        Raises InputShapeError where the engine takes this batch only in pieces, and what `run` raises.
        """
        self._check_open()
        feeds = prepare_feeds(inputs, self.inputs)
        with self._resources.lock, self._device.current():
            return self._resources.time_phases(self._whole(feeds), feeds, runs)

    def time_layers(self, inputs: Mapping[str, npt.ArrayLike], runs: int) -> dict[str, float]:
        """Mean milliseconds of each layer over so many runs, which TensorRT slows down to measure them."""
        self._check_open()
        feeds = prepare_feeds(inputs, self.inputs)
        with self._resources.lock, self._device.current():
            return self._resources.time_layers(self._whole(feeds), feeds, runs)

    def layer_information(self) -> str:
        """What TensorRT's engine inspector tells about the layers, as JSON."""
        self._check_open()
        with self._resources.lock, self._device.current():
            return self._resources.layer_information()

    def _whole(self, feeds: Feeds) -> int:
        """The profile that runs these inputs as they are."""
        choice = choose_profile(self.profiles, feeds, self._batch_axis)
        if choice.rows is not None:
            raise InputShapeError(f"the engine runs this batch in pieces of {choice.rows[0]} to {choice.rows[1]} rows")
        return choice.profile

    def _execute(self, profile: int, feeds: Feeds) -> Outputs:
        outputs = self._resources.execute(profile, feeds)
        for line in self._tensorrt.log.errors():
            _log.warning("TensorRT ran, but reported: %s", line)
        return outputs

    def _release(self) -> None:
        self._finalizer()


class Phases(NamedTuple):
    """Milliseconds on the GPU: copying the inputs there, running the engine, copying the outputs back."""

    copy_in: float
    engine: float
    copy_out: float


def depends_on_data(shape: tuple[int, ...]) -> bool:
    """Whether TensorRT can tell an output's shape only by computing it."""
    return -1 in shape


class _Resources:
    """What must be freed: engine, execution context, stream and buffers. Whoever uses them holds `lock`."""

    def __init__(
        self,
        plan: bytes,
        tensorrt: TensorRT,
        device: Device,
        kernel_specialization: str,
        *,
        allow_engine_host_code: bool,
        weights_from: Path | None,
        weight_streaming: bool,
    ) -> None:
        self.lock = threading.Lock()
        self._tensorrt = tensorrt
        self._device = device
        self._specialization = kernel_specialization
        self._host: dict[str, PinnedBuffer] = {}
        self._memory: dict[str, DeviceBuffer] = {}
        self._allocator: object = None
        self._allocated_shapes: dict[str, tuple[int, ...]] = {}
        self._allocation_error: Exception | None = None
        with device.current():
            tensorrt.log.errors()
            self._runtime: trt_api.Runtime | None = tensorrt.runtime(allow_engine_host_code=allow_engine_host_code)
            doubt = tensorrt.engine_validity(self._runtime, plan)
            engine = self._runtime.deserialize_cuda_engine(plan)
            if engine is None and doubt is not None:
                raise EngineMismatchError(
                    f"{tensorrt} cannot run this engine on {device.gpu}: {doubt} ({tensorrt.log.last_error()})"
                )
            if engine is None:
                raise self._failure("load the engine")
            if doubt is not None:
                _log.warning(
                    "%s does not officially run this engine on %s (%s). Its results may be wrong: compare them with "
                    "those of runtime='onnxruntime'.",
                    tensorrt,
                    device.gpu,
                    doubt,
                )
            if weights_from is not None:
                problem = tensorrt.refit(engine, str(weights_from))
                if problem is not None:
                    raise ExecutionError(
                        f"{tensorrt} could not put the weights of {weights_from.name} into its engine: {problem}"
                    )
            if weight_streaming:
                engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
            self._engine: trt_api.ICudaEngine | None = engine
            self._context: trt_api.IExecutionContext | None = self._new_context()
            self._stream = device.stream()
            names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
            self._dtypes = {name: tensorrt.dtype(engine, name) for name in names}
            self._shapes = {name: tuple(engine.get_tensor_shape(name)) for name in names}
            self._on_host = {name for name in names if tensorrt.is_on_host(engine, name)}
            self._inputs = [name for name in names if tensorrt.is_input(engine, name)]
            self._outputs = [name for name in names if name not in self._inputs]
            # An engine of fixed shapes may have no profile; it runs as if it had one that allows everything.
            numbers = range(max(engine.num_optimization_profiles, 1))
            self.profiles = tuple(self._read_profile(engine, number) for number in numbers)
            self._host = {name: device.pinned_buffer() for name in names}
            self._memory = {name: device.device_buffer() for name in names if name not in self._on_host}
            self._allocator = tensorrt.output_allocator(self._reallocate, self._notify_shape)

    def described(self, spec: TensorSpec) -> TensorSpec:
        """The tensor as the engine has it: its dtype, and fixed where the engine is."""
        if spec.name not in self._dtypes:
            raise ExecutionError(f"the engine has no tensor {spec.name!r}; it has {', '.join(self._dtypes)}")
        return TensorSpec(name=spec.name, dtype=self._dtypes[spec.name], shape=spec.shape)

    def execute(self, profile: int, feeds: Feeds) -> Outputs:
        """Run once. The caller holds the device and made sure that the shapes fit the profile."""
        if self._context is None:
            raise SessionClosedError
        try:
            return self._execute(self._context, self._stream, profile, feeds)
        except BaseException:
            # What was already sent off must not read or write the buffers during the next call. Where even waiting
            # fails, the first error is the one to tell.
            with contextlib.suppress(Exception):
                self._stream.synchronize()
            raise

    def time_phases(self, profile: int, feeds: Feeds, runs: int) -> list[Phases]:
        outputs = self.execute(profile, feeds)
        context, stream = cast("trt_api.IExecutionContext", self._context), self._stream
        copied = [name for name in (*self._inputs, *self._outputs) if name not in self._on_host]
        events = [self._device.event() for _ in range(4)]
        times = []
        for _ in range(runs):
            events[0].record(stream)
            for name in (name for name in copied if name in self._inputs):
                stream.upload(self._host[name], self._memory[name], feeds[name].nbytes)
            events[1].record(stream)
            if not context.execute_async_v3(stream.handle):
                raise self._failure("run the engine")
            events[2].record(stream)
            for name in (name for name in copied if name in self._outputs):
                stream.download(self._memory[name], self._host[name], outputs[name].nbytes)
            events[3].record(stream)
            stream.synchronize()
            times.append(Phases(*(later.milliseconds_since(e) for e, later in itertools.pairwise(events))))
        return times

    def time_layers(self, profile: int, feeds: Feeds, runs: int) -> dict[str, float]:
        self.execute(profile, feeds)
        context = cast("trt_api.IExecutionContext", self._context)
        totals: dict[str, float] = {}

        def report(name: str, milliseconds: float) -> None:
            totals[name] = totals.get(name, 0.0) + milliseconds

        profiler = self._tensorrt.profiler(report)
        context.profiler = profiler
        try:
            for _ in range(runs):
                if not context.execute_async_v3(self._stream.handle):
                    raise self._failure("run the engine")
                self._stream.synchronize()
        finally:
            # The context keeps no reference of its own, and cannot be told to stop: it is replaced.
            self._context = None
            self._context = self._new_context()
        return {name: total / runs for name, total in totals.items()}

    def layer_information(self) -> str:
        return self._tensorrt.layer_information(
            cast("trt_api.ICudaEngine", self._engine), cast("trt_api.IExecutionContext", self._context)
        )

    def _new_context(self) -> trt_api.IExecutionContext:
        self._profile = 0
        context = self._tensorrt.execution_context(cast("trt_api.ICudaEngine", self._engine), self._specialization)
        if context is None:
            raise self._failure("make an execution context")
        return context

    def _execute(self, context: trt_api.IExecutionContext, stream: Stream, profile: int, feeds: Feeds) -> Outputs:
        if profile != self._profile:
            if not context.set_optimization_profile_async(profile, stream.handle):
                raise self._failure(f"switch to optimization profile {profile}")
            stream.synchronize()
            self._profile = profile
        for name in self._inputs:
            self._bind_input(context, name, feeds[name])
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            raise self._failure(f"infer the output shapes from {_shapes_of(feeds)}", InputShapeError) from error
        if missing:
            raise self._failure(f"infer the output shapes, since {', '.join(missing)} is not specified")
        shapes = {name: tuple(context.get_tensor_shape(name)) for name in self._outputs}
        unknown = [name for name, shape in shapes.items() if depends_on_data(shape)]
        for name, shape in shapes.items():
            self._bind_output(context, name, None if name in unknown else shape)
        self._allocation_error = None
        if not context.execute_async_v3(stream.handle):
            raise self._allocation_error or self._failure("run the engine")
        if unknown:
            stream.synchronize()
            shapes |= {name: self._allocated_shapes[name] for name in unknown}
        return self._download(shapes)

    def _bind_input(self, context: trt_api.IExecutionContext, name: str, array: npt.NDArray[np.generic]) -> None:
        host = self._host[name]
        address = host.reserve(array.nbytes)
        np.copyto(host.array(array.shape, array.dtype), array)
        if name not in self._on_host:
            memory = self._memory[name]
            address = memory.reserve(array.nbytes)
            self._stream.upload(host, memory, array.nbytes)
        if not context.set_input_shape(name, array.shape):
            raise self._failure(f"take the shape {array.shape} for input {name!r}", InputShapeError)
        if not context.set_tensor_address(name, address):
            raise self._failure(f"bind input {name!r}")

    def _bind_output(self, context: trt_api.IExecutionContext, name: str, shape: tuple[int, ...] | None) -> None:
        """Give an output its memory; one of unknown shape asks the allocator for it while the engine runs."""
        if shape is None:
            if not context.set_output_allocator(name, self._allocator):
                raise self._failure(f"set an output allocator for {name!r}")
            return
        nbytes = self._nbytes(name, shape)
        address = self._host[name].reserve(nbytes)
        if name not in self._on_host:
            address = self._memory[name].reserve(nbytes)
        if not context.set_tensor_address(name, address):
            raise self._failure(f"bind output {name!r}")

    def _download(self, shapes: Mapping[str, tuple[int, ...]]) -> Outputs:
        for name, shape in shapes.items():
            if name not in self._on_host:
                nbytes = self._nbytes(name, shape)
                self._host[name].reserve(nbytes)
                self._stream.download(self._memory[name], self._host[name], nbytes)
        self._stream.synchronize()
        return {
            name: self._host[name].array(shape, numpy_dtype(self._dtypes[name])).copy()
            for name, shape in shapes.items()
        }

    def _reallocate(self, name: str, nbytes: int) -> int:
        try:
            return self._memory[name].reserve(nbytes)
        except Exception as error:  # noqa: BLE001  # must not travel through TensorRT, which takes 0 for a failure
            self._allocation_error = error
            return 0

    def _notify_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._allocated_shapes[name] = shape

    def _nbytes(self, name: str, shape: tuple[int, ...]) -> int:
        return int(np.prod(shape, dtype=np.int64)) * numpy_dtype(self._dtypes[name]).itemsize

    def _read_profile(self, engine: trt_api.ICudaEngine, index: int) -> ShapeProfile:
        ranges: dict[str, InputRange] = {}
        for name in self._inputs if engine.num_optimization_profiles else ():
            if name in self._on_host:
                triple = engine.get_tensor_profile_values(index, name)
            else:
                triple = engine.get_tensor_profile_shape(name, index)
            # TensorRT gives nothing for an input that a profile need not mention.
            low, usual, high = (tuple(map(int, shape)) for shape in triple or [self._shapes[name]] * 3)
            ranges[name] = InputRange(min=low, opt=usual, max=high, is_values=name in self._on_host and bool(triple))
        return ShapeProfile(ranges=ranges)

    def _failure(self, action: str, kind: type[InputShapeError | ExecutionError] = ExecutionError) -> Exception:
        said = self._tensorrt.log.last_error()
        if re.search("out ?of ?memory", said, re.IGNORECASE):
            return OutOfMemoryError(f"{self._tensorrt} has too little memory on {self._device.gpu.name}: {said}")
        return kind(f"{self._tensorrt} could not {action}: {said}")

    def release(self) -> None:
        """Free everything, after the call in flight. Also the last thing that happens before the interpreter ends."""
        with self.lock, self._device.current():
            try:
                self._stream.synchronize()
            finally:
                # In this order: a context needs its engine, an engine its runtime.
                self._context = None
                self._allocator = None
                self._engine = None
                self._runtime = None
                for pinned in self._host.values():
                    pinned.free()
                for memory in self._memory.values():
                    memory.free()
                self._stream.close()


def _shapes_of(feeds: Feeds) -> str:
    return ", ".join(f"{name} {array.shape}" for name, array in feeds.items())
