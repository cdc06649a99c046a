"""Loading and memory, which only a fresh process shows: `fresh` starts this module again, once for each measurement."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np


def fresh(folder: Path, model: str) -> dict[str, float]:
    """Seconds and megabytes: loading with and without stored kernels, and a bare TensorRT loop that does the same."""
    with tempfile.TemporaryDirectory(prefix="mlflow-trt-benchmark-") as cache:
        cold = _child("load", folder, model, cache)
        warm = _child("load", folder, model, cache)
        through_mlflow = _child("pyfunc", folder, model, cache)
        kernels = next((Path(cache) / "kernels").iterdir())
        bare = _child("bare", folder, model, cache, str(kernels))
    return {
        "cold_load": cold["seconds"],
        "warm_load": warm["seconds"],
        "pyfunc_load": through_mlflow["seconds"],
        "memory": warm["memory"],
        "memory_later": warm["memory_later"],
        "bare": sum(bare[name] for name in ("read", "deserialize", "context", "first")),
        **{f"bare_{name}": value for name, value in bare.items()},
    }


def _child(what: str, folder: Path, model: str, cache: str, *more: str) -> dict[str, Any]:
    environment = {**os.environ, "MLFLOW_TRT_CACHE_DIR": cache}
    command = [sys.executable, "-m", "benchmarks.fresh", what, str(folder), model, *more]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)  # itself
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _load(folder: Path, model: str, *, pyfunc: bool = False) -> dict[str, float]:
    """`load_model` and a call, as a user does it. Imports and CUDA's own start are not counted: both have them."""
    import mlflow
    import pycuda.driver as cuda

    import mlflow_trt
    import mlflow_trt.flavor.api
    import mlflow_trt.runtime.tensorrt_session
    from benchmarks.models import MODELS
    from mlflow_trt.backends import tensorrt as trt
    from mlflow_trt.runtime.cuda.device import open_device

    feeds = MODELS[model]().feeds(1)
    trt.load()
    device = open_device(0)
    with device.current():
        before = cuda.mem_get_info()[0]
    started = time.perf_counter()
    if pyfunc:
        loaded = mlflow.pyfunc.load_model(str(folder))
        session, call = loaded.get_raw_model(), loaded.predict
    else:
        session = mlflow_trt.load_model(str(folder))
        call = session.run
    call(feeds)
    took = time.perf_counter() - started
    with device.current():
        after = cuda.mem_get_info()[0]
    for _ in range(200):
        call(feeds)
    with device.current():
        later = cuda.mem_get_info()[0]
    session.close()
    return {"seconds": took, "memory": (before - after) / 2**20, "memory_later": (before - later) / 2**20}


def _bare(folder: Path, model: str, kernels: str) -> dict[str, float]:
    """TensorRT-RTX without this package: read plan and kernels, deserialize, make a context, execute once."""
    import pycuda.driver as cuda

    from benchmarks.models import MODELS
    from mlflow_trt.backends import tensorrt as trt
    from mlflow_trt.runtime.cuda.device import open_device
    from mlflow_trt.store.folder import read_folder

    feeds = MODELS[model]().feeds(1)
    record = read_folder(folder).record
    module = trt.load()._module
    with open_device(0).current():
        before = cuda.mem_get_info()[0]
        marks = [time.perf_counter()]
        plan = (folder / record.engines[0].file).read_bytes()
        stored = Path(kernels).read_bytes()[32:]  # after its sha256, as `mlflow_trt.store.kernel_cache` writes it
        marks.append(time.perf_counter())
        runtime = module.Runtime(module.Logger(module.Logger.ERROR))
        engine = runtime.deserialize_cuda_engine(plan)
        marks.append(time.perf_counter())
        config = engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = module.DynamicShapesKernelSpecializationStrategy.EAGER
        cache = config.create_runtime_cache()
        cache.deserialize(stored)
        config.set_runtime_cache(cache)
        context = engine.create_execution_context(config)
        marks.append(time.perf_counter())
        stream = cuda.Stream()
        buffers = []
        for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
            if engine.get_tensor_mode(name) == module.TensorIOMode.INPUT:
                largest = tuple(engine.get_tensor_profile_shape(name, 0)[2])
                buffers.append(cuda.mem_alloc(int(np.prod(largest)) * feeds[name].itemsize))
                cuda.memcpy_htod_async(int(buffers[-1]), np.ascontiguousarray(feeds[name]), stream)
                context.set_input_shape(name, feeds[name].shape)
                context.set_tensor_address(name, int(buffers[-1]))
        context.infer_shapes()
        results = []
        for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
            if engine.get_tensor_mode(name) == module.TensorIOMode.OUTPUT:
                shape = tuple(context.get_tensor_shape(name))
                buffers.append(cuda.mem_alloc(int(np.prod(shape)) * 4))
                context.set_tensor_address(name, int(buffers[-1]))
                results.append((np.empty(shape, np.float32), int(buffers[-1])))
        context.execute_async_v3(stream.handle)
        for array, address in results:
            cuda.memcpy_dtoh_async(array, address, stream)
        stream.synchronize()
        marks.append(time.perf_counter())
        memory = (before - cuda.mem_get_info()[0]) / 2**20
        del context, cache, config, engine, runtime
        for buffer in buffers:
            buffer.free()
    names = ("read", "deserialize", "context", "first")
    return {**dict(zip(names, np.diff(marks).tolist(), strict=True)), "memory": memory}


_MEASUREMENTS: dict[str, Callable[..., dict[str, float]]] = {
    "load": _load,
    "pyfunc": partial(_load, pyfunc=True),
    "bare": _bare,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One measurement of `python -m benchmarks.runtime`, which starts it.")
    parser.add_argument("what", choices=_MEASUREMENTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    parser.add_argument("kernels", nargs="*")
    options = parser.parse_args()
    print(json.dumps(_MEASUREMENTS[options.what](options.folder, options.model, *options.kernels)))
    sys.stdout.flush()
