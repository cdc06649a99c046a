"""Session on a TensorRT engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from mlflow_trt.backends.tensorrt import TensorRT
from mlflow_trt.core.arrays import Feeds, numpy_dtype
from mlflow_trt.core.dummy_inputs import make_zeros
from mlflow_trt.core.forking import finalize
from mlflow_trt.core.inputs import prepare_feeds
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.types import BatchAxis, TensorSpec
from mlflow_trt.errors import ExecutionError, InputShapeError
from mlflow_trt.runtime.batching.choose_profile import choose_profile
from mlflow_trt.runtime.batching.own_threads import is_own_thread
from mlflow_trt.runtime.batching.scheduler import MOST_SLOTS, Scheduler
from mlflow_trt.runtime.batching.sizes import BatchRows
from mlflow_trt.runtime.cuda.device import Device
from mlflow_trt.runtime.cuda.device_array import DeviceArray
from mlflow_trt.runtime.engine import on_device
from mlflow_trt.runtime.engine import timing as slot_timing
from mlflow_trt.runtime.engine.engine import Engine, KernelStore
from mlflow_trt.runtime.engine.native_calls import native_batches
from mlflow_trt.runtime.engine.slot import EngineSlot
from mlflow_trt.runtime.engine.timing import Phases
from mlflow_trt.runtime.session import Session

__all__ = ["Phases", "TensorRTSession"]

_log = get_logger(__name__)


class TensorRTSession(Session):
    """Runs a plan on one GPU.

    Args:
        plan: the engine's bytes. They are executable content: check where they come from before.
        tensorrt: the distribution and release that built it.
        device: the GPU.
        inputs, outputs: the model's tensors, for their names and order; dtypes are the engine's own, but for float64,
            which the engine has as float32.
        batch_axis: what may be split and padded where a batch does not fit the engine's profiles.
        kernel_specialization: TensorRT-RTX only. `eager` compiles the kernels for a new shape before the first
            result, which then equals all later ones; `lazy` answers with generic kernels first.
        cuda_graphs: launch what comes again as a CUDA graph: the engine, and the copies of small inputs and outputs.
        max_batch_delay_ms: milliseconds for which a batch stays open at most for the calls of other threads while
            another batch runs; 0 runs each call by itself.
        compile_beside_calls: TensorRT-RTX only. Run calls in the batch sizes that have been compiled, and compile the
            others in a thread; the first one is what the first call needs.
        allow_engine_host_code: let the plan bring code that runs on the CPU.
        weights_from: the ONNX file with the weights of a plan that was stripped of them.
        weight_streaming: the plan was built for it: as many weights stay in host memory as TensorRT thinks best.
        kernel_store: where the kernels that TensorRT-RTX compiles are kept for the next process.

    Raises:
        EngineMismatchError: TensorRT says that this machine cannot run the plan.
        ExecutionError: TensorRT does not load it; OutOfMemoryError where the GPU lacks memory.
    """

    runtime: ClassVar[str] = "tensorrt"
    plan_sha256: str = ""
    """The digest of the plan, which whoever checked it sets."""

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
        cuda_graphs: bool = True,
        max_batch_delay_ms: float = 0.0,
        compile_beside_calls: bool = False,
        allow_engine_host_code: bool = False,
        weights_from: Path | None = None,
        weight_streaming: bool = False,
        kernel_store: KernelStore | None = None,
    ) -> None:
        self._tensorrt = tensorrt
        self._device = device
        with device.current():
            engine = Engine(
                plan,
                tensorrt,
                device,
                kernel_specialization=kernel_specialization,
                cuda_graphs=cuda_graphs,
                allow_engine_host_code=allow_engine_host_code,
                weights_from=weights_from,
                weight_streaming=weight_streaming,
                kernel_store=kernel_store,
            )
        scheduler: Scheduler[EngineSlot] = Scheduler(
            lambda: EngineSlot(engine, _count_sizes(scheduler, engine)),
            profiles=engine.profiles,
            axis=batch_axis,
            max_batch_delay=max_batch_delay_ms / 1e3,
            prepare=partial(_prepare, engine) if compile_beside_calls and tensorrt.is_rtx else None,
            native=partial(native_batches, engine, max_batch_delay_ms / 1e3),
        )
        super().__init__(
            scheduler,
            [_described(spec, engine) for spec in inputs],
            [_described(spec, engine) for spec in outputs],
            taken=[engine.described(spec) for spec in inputs],
        )
        # Runs at close(), at the latest before the interpreter ends: TensorRT and pycuda must still be alive.
        self._finalizer = finalize(self, _close, scheduler, engine)
        self._scheduler = scheduler
        self._batch_axis = batch_axis
        self.profiles = engine.profiles

    @property
    def description(self) -> str:
        return f"{self._tensorrt} on {self._device.gpu.name}"

    def broken(self) -> str | None:
        return self._device.loss()

    def run_on_device(self, inputs: Mapping[str, Any]) -> dict[str, DeviceArray]:
        self._check_open()
        slots = self._scheduler.slots
        with slots.kept_here(), slots.borrow() as slot, self._device.current():
            given = on_device.views(slot, inputs, self._taken)
            try:
                stand_ins = {
                    spec.name: np.broadcast_to(np.zeros((), numpy_dtype(spec.dtype)), given[spec.name].shape)
                    for spec in self._taken
                }
                choice = choose_profile(self.profiles, stand_ins, self._batch_axis)
                sizes = self._scheduler.sizes_of(choice.profile)
                return on_device.run(slot, given, choice.profile, self._batch_axis, sizes)
            except BaseException:
                slot.abandon()  # it may still read the inputs, which their owners get back now
                raise
            finally:
                for view in given.values():
                    view.release()

    def warm_up(self) -> None:
        """Run every batch size of every profile in every slot, other dimensions as they usually are.

        After it no call compiles kernels or makes contexts, unless it brings other shapes.
        """
        self._check_open()
        with self._scheduler.slots.borrow_several(MOST_SLOTS) as slots:
            # The second run captures a graph, which is no good any more once a later shape made scratch memory grow.
            for _ in range(3):
                self._run_every_size(slots)
            for number in range(len(self.profiles)):
                sizes = self._scheduler.sizes_of(number)
                if sizes is not None:
                    self._scheduler.prepare_native(self._usual_feeds(number, sizes.all[0]), slots)

    def _usual_feeds(self, number: int, size: int | None) -> Feeds:
        """Zeros of a profile's usual shape, so many rows of them."""
        batched = self._batch_axis.inputs if self._batch_axis is not None else ()
        ranges = self.profiles[number].ranges
        return {
            spec.name: make_zeros(spec, ranges.get(spec.name), size if spec.name in batched else None)
            for spec in self._taken
        }

    def _run_every_size(self, slots: Sequence[EngineSlot]) -> None:
        for number in range(len(self.profiles)):
            # The largest first, so that no buffer grows later and takes the CUDA graphs' addresses with it.
            sizes = self._scheduler.sizes_of(number)
            for size in reversed(sizes.all) if sizes else (None,):
                feeds = self._usual_feeds(number, size)
                for slot in slots:
                    slot.launch(BatchRows([feeds], None, 0), number)
                    slot.finish()
                self._scheduler.mark_ready(feeds, number, size)

    def time_phases(self, inputs: Mapping[str, npt.ArrayLike], runs: int) -> list[Phases]:
        """Milliseconds on the GPU for each of so many runs, after one that does not count.

        Raises InputShapeError where the engine takes this batch only in pieces, and what `run` raises.
        """
        with self._load_slot(inputs) as slot:
            return slot_timing.time_phases(slot, runs)

    def time_layers(self, inputs: Mapping[str, npt.ArrayLike], runs: int) -> dict[str, float]:
        """Mean milliseconds of each layer over so many runs, which TensorRT slows down to measure them."""
        with self._load_slot(inputs) as slot:
            return slot_timing.time_layers(slot, runs)

    def layer_information(self) -> str:
        """What TensorRT's engine inspector tells about the layers, as JSON."""
        self._check_open()
        with self._scheduler.slots.borrow() as slot:
            return slot_timing.layer_information(slot)

    @contextmanager
    def _load_slot(self, inputs: Mapping[str, npt.ArrayLike]) -> Iterator[EngineSlot]:
        """A slot with these inputs, as they are."""
        self._check_open()
        feeds = prepare_feeds(inputs, self._taken)
        choice = choose_profile(self.profiles, feeds, self._batch_axis)
        if choice.rows is not None:
            raise InputShapeError(f"the engine runs this batch in pieces of {choice.rows[0]} to {choice.rows[1]} rows")
        with self._scheduler.slots.borrow() as slot:
            with self._device.current():
                slot.load(BatchRows([feeds], None, 0), choice.profile)
            yield slot

    def _release(self) -> None:
        self._finalizer()


def _described(spec: TensorSpec, engine: Engine) -> TensorSpec:
    """The tensor as callers see it."""
    described = engine.described(spec)
    return spec if spec.narrowed.dtype == described.dtype else described


def _count_sizes(scheduler: Scheduler[EngineSlot], engine: Engine) -> int:
    """How many shapes calls are run in, rows of the usual shape of each profile."""
    every = [scheduler.sizes_of(number) for number in range(len(engine.profiles))]
    return sum(len(sizes.all) if sizes else 1 for sizes in every)


def _prepare(engine: Engine, profile: int, feeds: Feeds) -> None:
    """Run feeds in a slot of their own, so that nobody waits for them."""
    slot = EngineSlot(engine)
    try:
        slot.launch(BatchRows([feeds], None, 0), profile)
        slot.finish()
    finally:
        slot.close()


def _close(scheduler: Scheduler[EngineSlot], engine: Engine) -> None:
    """Free everything, after the calls in flight.

    The garbage collector, too, calls this, in any thread. One of the session's own would wait for what it is at itself.
    """
    if not is_own_thread():
        _free(scheduler, engine)
        return
    try:
        threading.Thread(target=_free, args=(scheduler, engine)).start()
    except RuntimeError as error:  # the system has no thread to give
        _log.warning("Nothing could be freed: %s", error)


def _free(scheduler: Scheduler[EngineSlot], engine: Engine) -> None:
    """Where the GPU is lost, this is left to the end of the process."""
    try:
        with engine.device.current():
            try:
                scheduler.close()
            except Exception:
                engine.close()
                raise
            # Not after Ctrl-C: calls that were waited for may still run.
            engine.close()
    except ExecutionError as error:
        _log.warning("Not everything could be freed: %s", error.message)
