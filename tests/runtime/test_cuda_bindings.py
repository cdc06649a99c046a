"""A session whose calls to the GPU go through cuda-bindings, on the GPU that exists only in host memory."""

from __future__ import annotations

import ctypes
import gc
import sys
import types

import fake_gpu
import numpy as np
import pytest

from mlflow_trt.errors import ExecutionError, MissingDependencyError, OptionError, OutOfMemoryError
from mlflow_trt.runtime.cuda.bindings_driver import BindingsDriver
from mlflow_trt.runtime.cuda.driver import PACKAGE_VARIABLE, load_driver

SUCCESS, INVALID_VALUE, OUT_OF_MEMORY = 0, 1, 2


class Bindings:
    """What `cuda.bindings.driver` has: functions that return a status, and then what they give."""

    def __init__(self, gpu: fake_gpu.Driver) -> None:
        self.gpu = gpu
        self.pinned: dict[int, np.ndarray] = {}
        self.events: dict[int, fake_gpu.FakeEvent] = {}
        self.destroyed: list[int] = []

    def __getattr__(self, name: str):
        function = getattr(self, f"_{name}", None)
        if function is None:
            raise AttributeError(name)

        def call(*arguments):
            try:
                value = function(*arguments)
            except fake_gpu.Driver.MemoryError:
                return (OUT_OF_MEMORY, None)
            except fake_gpu.Driver.Error:
                return (INVALID_VALUE,)
            return (SUCCESS,) if value is None else (SUCCESS, value)

        return call

    def _cuInit(self, flags):
        assert flags == 0

    def _cuDeviceGet(self, ordinal):
        return ordinal

    def _cuDevicePrimaryCtxRetain(self, device):
        return ("context", device)

    def _cuCtxPushCurrent(self, context):
        assert context == ("context", 0)
        self.gpu._push()

    def _cuCtxPopCurrent(self):
        self.gpu._pop()
        return ("context", 0)

    def _cuCtxSynchronize(self):
        self.gpu.check_no_capture()

    def _cuStreamCreate(self, flags):
        assert flags == 0
        return self.gpu.Stream().handle

    def _cuStreamDestroy(self, stream):
        self.destroyed.append(stream)

    def _cuStreamSynchronize(self, stream):
        self.gpu.streams[stream].synchronize()

    def _cuStreamWaitEvent(self, stream, event, flags):
        assert flags == 0
        self.gpu.streams[stream].wait_for_event(self.events[event])

    def _cuEventCreate(self, flags):
        assert flags == 0
        event = -1 - len(self.events)
        self.events[event] = self.gpu.Event()
        return event

    def _cuEventDestroy(self, event):
        self.destroyed.append(event)

    def _cuEventRecord(self, event, stream):
        self.events[event].record(self.gpu.streams[stream])

    def _cuEventSynchronize(self, event):
        self.events[event].synchronize()

    def _cuEventElapsedTime(self, start, end):
        return float(start - end)  # the later an event was made, the lower its number

    def _cuMemAlloc(self, nbytes):
        return int(self.gpu.mem_alloc(nbytes))

    def _cuMemFree(self, address):
        fake_gpu.Allocation(self.gpu, address).free()

    def _cuMemHostAlloc(self, nbytes, flags):
        assert flags == 0
        self.gpu.check_no_capture()
        memory = np.full(nbytes, fake_gpu.GARBAGE, np.uint8)
        self.pinned[memory.ctypes.data] = memory
        return memory.ctypes.data

    def _cuMemFreeHost(self, address):
        del self.pinned[address]

    def _cuMemcpyHtoDAsync(self, target, source, nbytes, stream):
        self.gpu.memcpy_htod_async(target, host_memory(source, nbytes), self.gpu.streams[stream])

    def _cuMemcpyDtoHAsync(self, target, source, nbytes, stream):
        self.gpu.memcpy_dtoh_async(host_memory(target, nbytes), source, self.gpu.streams[stream])

    def _cuMemcpyDtoDAsync(self, target, source, nbytes, stream):
        self.gpu.memcpy_dtod_async(target, source, nbytes, self.gpu.streams[stream])

    def _cuMemcpyDtoH(self, target, source, nbytes):
        self.gpu.memcpy_dtoh(host_memory(target, nbytes), source)

    def _cuGetErrorName(self, status):
        return {INVALID_VALUE: b"CUDA_ERROR_INVALID_VALUE", OUT_OF_MEMORY: b"CUDA_ERROR_OUT_OF_MEMORY"}[status]

    def _cuGetErrorString(self, status):
        return {INVALID_VALUE: b"invalid argument", OUT_OF_MEMORY: b"out of memory"}[status]


def host_memory(address: int, nbytes: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)


def rows(count: int, columns: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, columns)).astype(np.float32)


@pytest.mark.parametrize("late", [False, True], ids=["shapes known", "shapes late"])
@pytest.mark.parametrize("delay", [0, 5.0], ids=["each by itself", "together"])
def test_a_session_answers_right_and_frees_everything(late, delay):
    gpu = fake_gpu.Driver()
    bindings = Bindings(gpu)
    with fake_gpu.session(late=late, driver=gpu, calls=BindingsDriver(bindings), max_batch_delay_ms=delay) as (
        session,
        *_,
    ):
        for seed, (count, columns) in enumerate([(1, 1), (16, 2), (3, 2), (16, 64), (1, 1), (40, 64), (3, 2), (3, 2)]):
            x = rows(count, columns, seed)
            outputs = session.run({"x": x})
            assert np.array_equal(outputs["y"], x * 2)
            assert np.array_equal(outputs["z"], x[:, 0])
    assert not bindings.pinned
    gc.collect()
    assert sorted(bindings.destroyed) == sorted([*gpu.streams, *bindings.events])


def test_lack_of_memory_is_told_from_other_failures():
    gpu = fake_gpu.Driver()
    with fake_gpu.session(driver=gpu, calls=BindingsDriver(Bindings(gpu))) as (session, *_):
        device = session._device
        gpu.room = 0
        with pytest.raises(OutOfMemoryError, match="CUDA_ERROR_OUT_OF_MEMORY: out of memory"), device.current():
            device.device_buffer().reserve(1 << 20)
        with pytest.raises(ExecutionError, match="CUDA_ERROR_INVALID_VALUE: invalid argument") as caught:
            device.fetch(types.SimpleNamespace(address=12345), (1,), np.dtype(np.float32))
        assert not isinstance(caught.value, OutOfMemoryError)
        gpu.missed.clear()


def test_events_tell_the_time_between_them():
    gpu = fake_gpu.Driver()
    driver = BindingsDriver(Bindings(gpu))
    first, second = driver.Event(), driver.Event()
    assert second.time_since(first) == 1.0


class TestWhichPackage:
    @pytest.fixture(autouse=True)
    def packages(self, monkeypatch):
        """Both are there."""
        monkeypatch.delenv(PACKAGE_VARIABLE, raising=False)
        self.pycuda, self.bindings = types.ModuleType("pycuda.driver"), Bindings(fake_gpu.Driver())
        pycuda, cuda, bindings = (types.ModuleType(name) for name in ("pycuda", "cuda", "cuda.bindings"))
        vars(pycuda)["driver"], vars(bindings)["driver"] = self.pycuda, self.bindings
        modules = {
            "pycuda": pycuda,
            "pycuda.driver": self.pycuda,
            "cuda": cuda,
            "cuda.bindings": bindings,
            "cuda.bindings.driver": self.bindings,
        }
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)

    def test_pycuda_where_it_is_installed(self):
        assert load_driver() == ("pycuda", self.pycuda)

    def test_cuda_bindings_where_it_is_not(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pycuda", None)
        package, driver = load_driver()
        assert package == "cuda-bindings"
        assert isinstance(driver, BindingsDriver)

    def test_the_one_that_the_environment_names(self, monkeypatch):
        monkeypatch.setenv(PACKAGE_VARIABLE, "cuda-bindings")
        assert load_driver()[0] == "cuda-bindings"
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        with pytest.raises(MissingDependencyError, match="cuda-bindings cannot be imported") as caught:
            load_driver()
        assert caught.value.packages == ("cuda-bindings",)

    def test_a_name_that_is_none(self, monkeypatch):
        monkeypatch.setenv(PACKAGE_VARIABLE, "cupy")
        with pytest.raises(OptionError, match="'cupy'; choose one of pycuda, cuda-bindings"):
            load_driver()
