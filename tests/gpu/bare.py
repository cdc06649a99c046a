"""A TensorRT loop without this package: what its results are compared with, bit for bit."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pycuda.driver as cuda

from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.core.arrays import numpy_dtype
from mlflow_trt.runtime.batching.sizes import Piece


class BareLoop:
    """One context on one engine; synchronous copies from pageable memory, new buffers for each call."""

    def __init__(self, plan: bytes) -> None:
        loaded = trt.load()
        self._trt = loaded._module
        cuda.init()
        # pycuda's own, or it would not know that a device is current where cuda-bindings made it so.
        self._gpu = cuda.Device(0).retain_primary_context()
        with self._current():
            logger = self._trt.Logger(self._trt.Logger.ERROR)
            self._runtime = self._trt.Runtime(logger)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if loaded.is_rtx:
                config = self._engine.create_runtime_config()
                strategies = self._trt.DynamicShapesKernelSpecializationStrategy
                config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
                self._execution = self._engine.create_execution_context(config)
            else:
                self._execution = self._engine.create_execution_context()

    def run(self, feeds):
        with self._current():
            return self._run(feeds)  # whose memory and stream go before the device does

    def _run(self, feeds):
        stream = cuda.Stream()
        kept, outputs = [], {}
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        for name in names:
            if self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT:
                array = np.ascontiguousarray(feeds[name])
                assert self._execution.set_input_shape(name, array.shape)
                kept.append(cuda.to_device(array))
                assert self._execution.set_tensor_address(name, int(kept[-1]))
        assert self._execution.infer_shapes() == []
        for name in names:
            if self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.OUTPUT:
                dtype = numpy_dtype(trt._DTYPES[self._engine.get_tensor_dtype(name).name])
                array = np.empty(tuple(self._execution.get_tensor_shape(name)), dtype)
                outputs[name] = array, cuda.mem_alloc(max(array.nbytes, 1))
                assert self._execution.set_tensor_address(name, int(outputs[name][1]))
        assert self._execution.execute_async_v3(stream.handle)
        stream.synchronize()
        for array, memory in outputs.values():
            cuda.memcpy_dtoh(array, memory)
        return {name: array for name, (array, _) in outputs.items()}

    def run_piece(self, feeds, axis, piece: Piece):
        """The rows of one piece, padded by hand: its last row once more."""
        taken = dict(feeds)
        for name in axis.inputs:
            rows = list(range(piece.start, piece.stop))
            taken[name] = feeds[name][rows + [rows[-1]] * (piece.size - len(rows))]
        return {name: array[: piece.stop - piece.start] for name, array in self.run(taken).items()}

    @contextmanager
    def _current(self):
        self._gpu.push()
        try:
            yield
        finally:
            cuda.Context.pop()

    def close(self):
        with self._current():
            del self._execution, self._engine, self._runtime
