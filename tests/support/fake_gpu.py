"""A GPU and a TensorRT that exist only in host memory, for what a session does with its memory and its streams.

They are strict where a real one lets mistakes pass: nothing runs before somebody waits for it, freed memory is
overwritten and its address given away again, a graph uses the memory it was captured with, and whatever reaches beyond
its memory, comes without a current context or disturbs a capture is an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import threading
import time
import types

import numpy as np
from helpers import PATIENCE

from mlflow_trt.core.types import BatchAxis, ComputeCapability, Gpu, TensorSpec
from mlflow_trt.runtime.cuda import dlpack
from mlflow_trt.runtime.cuda.device import Device
from mlflow_trt.runtime.cuda.graphs import EntryPoints
from mlflow_trt.runtime.tensorrt_session import TensorRTSession

GARBAGE = 0xA5
OUT_OF_MEMORY, LAUNCH_FAILED = 2, 719  # CUresult
BATCH_AXIS = BatchAxis(inputs=("x",), splits=True, declared=True)


class Driver:
    """What `Device` uses of `pycuda.driver`."""

    class Error(Exception):
        pass

    class MemoryError(Error):  # noqa: A001  # as pycuda calls it
        pass

    def __init__(self):
        self.blocks = {}
        self.freed = []
        self.missed = []
        self.refused = []  # what the extension was answered with a status
        self.streams = {}
        self.running = threading.RLock()
        self.room = 1 << 40
        self.gives_addresses_again = True
        self._numbers = itertools.count(1)
        self._pushed = threading.local()
        self.capturing = 0
        self.graphs = 0  # that were not closed
        self.captures = 0
        self.launches = 0
        self.native_launches = 0  # of these, from the extension
        self.native_uploads = 0
        self.graphs_by_handle = {}
        self.waiting = 0  # callers of the extension's for whom the GPU works
        self.may_run = threading.Event()  # held up where a test clears it
        self.may_run.set()
        self.Context = types.SimpleNamespace(pop=self._pop, synchronize=self.check_no_capture)

    def init(self):
        pass

    def Device(self, _ordinal):  # noqa: N802
        context = types.SimpleNamespace(push=self._push)
        return types.SimpleNamespace(retain_primary_context=lambda: context)

    def Stream(self):  # noqa: N802
        self.check_current()
        stream = FakeStream(self, next(self._numbers))
        self.streams[stream.handle] = stream
        return stream

    def Event(self):  # noqa: N802
        return FakeEvent()

    def mem_alloc(self, nbytes):
        self.check_no_capture()
        if sum(map(len, list(self.blocks.values()))) + nbytes > self.room:
            raise self.MemoryError("out of memory")
        address = self.freed.pop(0) if self.freed and self.gives_addresses_again else next(self._numbers) << 32
        self.blocks[address] = np.full(nbytes, GARBAGE, np.uint8)
        return Allocation(self, address)

    def pagelocked_empty(self, nbytes, _dtype):
        self.check_no_capture()
        return np.asarray(Pinned(nbytes))

    def memcpy_htod_async(self, address, source, stream):
        stream.enqueue(lambda: np.copyto(self.at(address, source.nbytes), source))

    def memcpy_dtoh_async(self, target, address, stream):
        stream.enqueue(lambda: np.copyto(target, self.at(address, target.nbytes)))

    def memcpy_dtod_async(self, target, address, nbytes, stream):
        stream.enqueue(lambda: np.copyto(self.at(target, nbytes), self.at(address, nbytes)))

    def memcpy_dtoh(self, target, address):
        self.check_no_capture()
        np.copyto(target, self.at(address, target.nbytes))

    def at(self, address, nbytes):
        """The memory there. An error where it is nobody's, which a real GPU survives as little as the tests do."""
        for start, block in list(self.blocks.items()):  # others allocate meanwhile
            if start <= address and address + nbytes <= start + len(block):
                return block[address - start : address - start + nbytes]
        self.missed.append(f"{nbytes} bytes at {address:#x} are not allocated")
        raise self.Error(self.missed[-1])

    def check_current(self):
        if not getattr(self._pushed, "depth", 0):
            raise self.Error("no context is current")

    def check_no_capture(self):
        """What waits for the whole GPU is refused while a graph is captured, whichever thread does it."""
        self.check_current()
        if self.capturing:
            raise self.Error("operation not permitted when stream is capturing")

    def capture(self, handle, enqueue):
        """As `Graphs` does: what is sent to the stream is kept instead of done."""
        self.check_no_capture()
        stream = self.streams[handle]
        self.capturing += 1
        stream.captured = work = []
        try:
            time.sleep(0.002)
            enqueue()
        finally:
            stream.captured = None
            self.capturing -= 1
        self.graphs += 1
        self.captures += 1
        return FakeGraph(self, stream, work)

    def entry_points(self):
        """As `Graphs` does: functions with the signatures of the driver's, for the extension to call."""

        def function(work, *arguments):
            def call(*values):
                try:
                    return work(*values) or 0
                except self.MemoryError:
                    return OUT_OF_MEMORY
                except self.Error as error:
                    self.refused.append(error)
                    return LAUNCH_FAILED
                except Exception as error:  # noqa: BLE001  # which ctypes would drop, and say that all went well
                    self.missed.append(f"a function of the driver failed: {error!r}")
                    return LAUNCH_FAILED

            return ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(call)

        def launch(graph, stream):
            if graph not in self.graphs_by_handle:
                self.missed.append("a graph was launched that is closed")
                return LAUNCH_FAILED
            assert self.graphs_by_handle[graph].stream is self.streams[stream]
            self.native_launches += 1
            return self.graphs_by_handle[graph].launch()

        def synchronize(stream):
            self.waiting += 1
            try:
                assert self.may_run.wait(PATIENCE)
                self.streams[stream].synchronize()
            finally:
                self.waiting -= 1

        def upload(address, source, nbytes, stream):
            memory = np.ctypeslib.as_array(ctypes.cast(source, ctypes.POINTER(ctypes.c_uint8)), (nbytes,))
            self.native_uploads += 1
            self.memcpy_htod_async(address, memory, self.streams[stream])

        pointer = ctypes.c_void_p
        functions = {
            "push": function(lambda _: self._push(), pointer),
            "pop": function(lambda _: self._pop(), pointer),
            "upload": function(upload, ctypes.c_ulonglong, pointer, ctypes.c_size_t, pointer),
            "launch": function(launch, pointer, pointer),
            "synchronize": function(synchronize, pointer),
        }
        found = {name: ctypes.cast(each, pointer).value for name, each in functions.items()}
        return EntryPoints(**found, context=1, owner=functions)

    def _push(self):
        self._pushed.depth = getattr(self._pushed, "depth", 0) + 1

    def _pop(self):
        self.check_current()
        self._pushed.depth -= 1


class Allocation:
    def __init__(self, driver, address):
        self._driver = driver
        self._address = address

    def __int__(self):
        return self._address

    def free(self):
        self._driver.check_no_capture()
        del self._driver.blocks[self._address]
        self._driver.freed.append(self._address)


class Pinned:
    """What pycuda's arrays in pinned memory have as their base."""

    def __init__(self, nbytes):
        self._memory = np.full(nbytes, GARBAGE, np.uint8)
        self.__array_interface__ = self._memory.__array_interface__

    def free(self):
        self._memory[:] = GARBAGE


class FakeGraph:
    def __init__(self, driver, stream, work):
        self._driver = driver
        self.stream = stream
        self._work = work
        self.handle = next(driver._numbers) << 8
        driver.graphs_by_handle[self.handle] = self

    def launch(self):
        if self._work is None:
            raise self._driver.Error("the graph was closed")
        self._driver.launches += 1
        for work in self._work:
            self.stream.enqueue(work)

    def close(self):
        self._driver.check_current()
        if self._work is not None:
            del self._driver.graphs_by_handle[self.handle]
            self._driver.graphs -= 1
            self._work = None


class FakeStream:
    """Work that is done when somebody waits for it."""

    def __init__(self, driver, handle):
        self.handle = handle
        self._driver = driver
        self._work = []
        self._done = 0
        self.captured = None

    def enqueue(self, work):
        self._driver.check_current()
        (self._work if self.captured is None else self.captured).append(work)

    def run(self, until=None):
        failures = []
        with self._driver.running:
            while self._done < (len(self._work) if until is None else until):
                work, self._work[self._done] = self._work[self._done], None
                self._done += 1
                try:
                    work()
                except self._driver.Error as error:  # what comes after it is done all the same
                    failures.append(error)
        if failures:
            raise failures[0]

    def position(self):
        return len(self._work)

    def check_no_capture(self):
        if self.captured is not None:
            raise self._driver.Error("operation not permitted when stream is capturing")

    def wait_for_event(self, event):
        self.check_no_capture()
        stream, position = event.recorded
        self.enqueue(lambda: stream.run(position))

    def synchronize(self):
        self._driver.check_current()
        self.check_no_capture()
        self.run()


class FakeEvent:
    recorded = None

    def record(self, stream):
        stream.check_no_capture()
        self.recorded = stream, stream.position()

    def synchronize(self):
        stream, position = self.recorded
        stream.run(position)


class FakeTensorRT:
    """An engine for y = 2 x of two dimensions, and z, the first of each row, whose shape may depend on data."""

    is_rtx = True
    profiles = (((1, 1), (4, 2), (16, 64)),)

    def __init__(self, driver, *, late=False, profiles=profiles):
        self.driver = driver
        self.late = late
        self.profiles = profiles
        self.made = 0
        self.compiled = set()
        self.computed = []  # what each run was given
        self.bad = None  # a number that no run survives
        self.most_rows = 1 << 30  # that there is memory for
        self.may_compile = threading.Event()  # held up where a test clears it
        self.may_compile.set()
        self.late_shape = lambda rows: (rows,)
        self._compiling = threading.Lock()
        self.log = types.SimpleNamespace(errors=list, last_error=lambda: "nothing")

    def __str__(self):
        return "a TensorRT of the tests"

    def runtime(self, **_):
        engine = types.SimpleNamespace(
            num_io_tensors=3,
            num_optimization_profiles=len(self.profiles),
            get_tensor_name=lambda index: "xyz"[index],
            get_tensor_shape=lambda name: {"x": (-1, -1), "y": (-1, -1), "z": (-1,)}[name],
            get_tensor_profile_shape=lambda _name, index: self.profiles[index],
        )

        def deserialize(_plan):
            self.driver.check_no_capture()
            return engine

        return types.SimpleNamespace(deserialize_cuda_engine=deserialize)

    def engine_validity(self, *_):
        return None

    def dtype(self, _engine, _name):
        return "float32"

    def is_on_host(self, _engine, _name):
        return False

    def is_input(self, _engine, name):
        return name == "x"

    def output_allocator(self, reallocate, notify_shape):
        return types.SimpleNamespace(reallocate=reallocate, notify_shape=notify_shape)

    def contexts(self, *_):
        def new():
            self.driver.check_no_capture()
            self.made += 1
            return FakeContext(self)

        return types.SimpleNamespace(new=new, close=lambda: None, kernels=self._kernels)

    def compile(self, shape):
        """Into a cache that is not safe for several threads."""
        if shape not in self.compiled:
            with self._alone():
                time.sleep(0.002)
                assert self.may_compile.wait(PATIENCE)
                self.compiled.add(shape)

    def _kernels(self, _others):
        with self._alone():
            time.sleep(0.002)
            return str(sorted(self.compiled)).encode()

    @contextlib.contextmanager
    def _alone(self):
        if not self._compiling.acquire(blocking=False):
            raise self.driver.Error("the cache of kernels is read and written at the same time")
        try:
            yield
        finally:
            self._compiling.release()


class FakeContext:
    """Compiles and allocates in its first run of a shape, and so may not be captured before."""

    def __init__(self, tensorrt):
        self._tensorrt = tensorrt
        self._shape = ()
        self._addresses = {}
        self._allocator = None
        self._scratch = 0
        self._scratch_bytes = 0
        self._has_run = False

    def set_input_shape(self, _name, shape):
        self._shape = shape
        self._has_run = False
        return True

    def set_optimization_profile_async(self, _index, _handle):
        return True

    def set_tensor_address(self, name, address):
        self._addresses[name] = address
        return True

    def set_output_allocator(self, _name, allocator):
        self._allocator = allocator
        return True

    def infer_shapes(self):
        return []

    def get_tensor_shape(self, name):
        if name == "z":
            return (-1,) if self._tensorrt.late else self._shape[:1]
        return self._shape

    def update_device_memory_size_for_shapes(self):
        self._scratch_bytes = -1  # it is parted anew, and has to be given again
        return 4 * math.prod(self._shape)

    def set_device_memory(self, address, nbytes):
        self._tensorrt.driver.at(address, nbytes)
        self._scratch = address
        self._scratch_bytes = nbytes

    def execute_async_v3(self, handle):
        driver, (rows, columns) = self._tensorrt.driver, self._shape
        if self._scratch_bytes < 4 * math.prod(self._shape):
            return False
        if not self._has_run:
            driver.check_no_capture()
            self._tensorrt.compile(self._shape)
        self._has_run = True
        numbers = rows if self._allocator is None else self._allocate_late(rows)
        scratch, addresses = self._scratch, dict(self._addresses)

        def work():
            driver.at(scratch, 4 * rows * columns)[:] = GARBAGE
            x, y, z = (
                driver.at(addresses[name], count * 4).view(np.float32)
                for name, count in (("x", rows * columns), ("y", rows * columns), ("z", numbers))
            )
            self._tensorrt.computed.append(x.reshape(rows, columns).copy())
            if self._tensorrt.bad is not None and (x == self._tensorrt.bad).any():
                raise driver.Error(f"{self._tensorrt.bad} is a bad number")
            if rows > self._tensorrt.most_rows:
                raise driver.MemoryError(f"no room for {rows} rows")
            y[:] = x * 2
            z.reshape(rows, -1)[:] = x.reshape(rows, columns)[:, :1]

        driver.streams[handle].enqueue(work)
        return True

    def _allocate_late(self, rows):
        shape = self._tensorrt.late_shape(rows)
        numbers = math.prod(shape)
        self._addresses["z"] = self._allocator.reallocate("z", numbers * 4)
        self._allocator.notify_shape("z", shape)
        return numbers


class Lent:
    """Another library's array on the GPU, which is freed when nobody uses it any more."""

    def __init__(self, driver, array):
        self._array = array
        self._address = next(driver._numbers) << 32
        self._blocks = driver.blocks
        driver.blocks[self._address] = array.copy().reshape(-1).view(np.uint8)

    def __dlpack_device__(self):
        return dlpack.CUDA, 0

    def __dlpack__(self, *, stream):
        return dlpack.export(Owner(self._blocks, self._address), self._address, "float32", self._array.shape, 0)


class Owner:
    def __init__(self, blocks, address):
        self._blocks = blocks
        self._address = address

    def __del__(self):
        del self._blocks[self._address]


def open_session(
    *,
    late=False,
    batch_axis=BATCH_AXIS,
    profiles=FakeTensorRT.profiles,
    driver=None,
    calls=None,
    dtype="float32",
    **settings,
):
    """A session on such a GPU, and the GPU's driver and TensorRT. `calls` is what the session calls the driver by.

    `dtype` is the model's; the engine has float32.
    """
    driver = driver or Driver()
    tensorrt = FakeTensorRT(driver, late=late, profiles=profiles)
    gpu = Gpu(ordinal=0, name="a GPU of the tests", compute_capability=ComputeCapability(9, 0), memory=0, uuid="")
    opened = TensorRTSession(
        b"",
        tensorrt=tensorrt,
        device=Device(gpu, None, calls or driver, driver),
        inputs=[TensorSpec(name="x", dtype=dtype, shape=("rows", "columns"))],
        outputs=[TensorSpec(name=name, dtype=dtype, shape=shape)
                 for name, shape in (("y", ("rows", "columns")), ("z", ("rows",)))],
        batch_axis=batch_axis,
        **settings,
    )  # fmt: skip
    return opened, driver, tensorrt


@contextlib.contextmanager
def session(**settings):
    """The same, closed at the end, which leaves nothing behind."""
    opened, driver, tensorrt = open_session(**settings)
    with opened:
        yield opened, driver, tensorrt
    assert not driver.blocks
    assert not driver.graphs
    assert not driver.missed
