"""What a user would run instead, arrays in and arrays out: milliseconds of each for some batch sizes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import mlflow.onnx
import numpy as np
import onnx
from onnx import numpy_helper

from benchmarks.models import BenchmarkModel, Feeds
from mlflow_trt.core.optional import is_installed
from mlflow_trt.runtime.latency import measure
from mlflow_trt.store.folder import read_folder

BATCHES = (1, 8, 32, 128)
Predict = Callable[[Feeds], object]


def alternatives(folder: Path, model: BenchmarkModel, seconds: float, *, compiled: bool = True) -> list[dict[str, Any]]:
    """Rows of a table, this package first. What is not installed is left out; `compiled` is torch's, of a minute."""
    found = []
    choices: list[tuple[str, Callable[[], Any]]] = [
        ("mlflow-trt, through mlflow.pyfunc", lambda: _ours(folder)),
        ("plain loop: pinned copy, upload, execute, download, wait", lambda: _plain(folder)),
    ]
    if is_installed("torch"):
        choices.append(("torch, eager, float16", lambda: _torch(folder, compiled=False)))
    if is_installed("torch") and compiled:
        choices.append(("torch.compile(mode='reduce-overhead'), float16", lambda: _torch(folder, compiled=True)))
    if is_installed("onnxruntime"):
        import onnxruntime  # what users run instead

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            choices.append(("mlflow.onnx on ONNX Runtime's CUDA provider", lambda: _onnxruntime(folder)))
    for what, make in choices:
        with make() as predict:
            times = {size: measure(partial(predict, model.feeds(size)), seconds).p50 for size in BATCHES}
        found.append({"what": what, "milliseconds": times})
    return found


@contextmanager
def _ours(folder: Path) -> Iterator[Predict]:
    loaded = mlflow.pyfunc.load_model(str(folder), model_config={"warm_up": "on"})
    with loaded.get_raw_model():
        yield loaded.predict


@contextmanager
def _plain(folder: Path) -> Iterator[Predict]:
    from mlflow_trt.runtime.cuda.device import open_device

    with open_device(0).current():
        loop = PlainLoop(folder)
        try:
            yield loop.predict
        finally:
            loop.close()


class PlainLoop:
    """One stream, one context, one pinned buffer each, as NVIDIA's samples have it."""

    def __init__(self, folder: Path) -> None:
        import pycuda.driver as cuda

        from mlflow_trt.backends import tensorrt as trt

        record = read_folder(folder).record
        module = trt.load()._module
        self.cuda = cuda
        self.runtime = module.Runtime(module.Logger(module.Logger.ERROR))
        self.engine = self.runtime.deserialize_cuda_engine((folder / record.engines[0].file).read_bytes())
        config = self.engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = module.DynamicShapesKernelSpecializationStrategy.EAGER
        self.context = self.engine.create_execution_context(config)
        (source,), (target,) = record.inputs, record.outputs
        self.input, self.output = source.name, target.name
        largest = tuple(self.engine.get_tensor_profile_shape(source.name, 0)[2])
        results = (largest[0], *(size or 1 for size in target.fixed[1:]))
        self.host_in = cuda.pagelocked_empty(largest, np.float32)
        self.host_out = cuda.pagelocked_empty(results, np.float32)
        self.device_in, self.device_out = cuda.mem_alloc(self.host_in.nbytes), cuda.mem_alloc(self.host_out.nbytes)
        self.stream = cuda.Stream()

    def predict(self, feeds: Feeds) -> object:
        array = feeds[self.input]
        rows = len(array)
        np.copyto(self.host_in[:rows], array)
        self.cuda.memcpy_htod_async(self.device_in, self.host_in[:rows], self.stream)
        self.context.set_input_shape(self.input, array.shape)
        self.context.set_tensor_address(self.input, int(self.device_in))
        self.context.set_tensor_address(self.output, int(self.device_out))
        self.context.execute_async_v3(self.stream.handle)
        self.cuda.memcpy_dtoh_async(self.host_out[:rows], self.device_out, self.stream)
        self.stream.synchronize()
        return self.host_out[:rows].copy()

    def close(self) -> None:
        self.context = self.engine = self.runtime = None
        self.device_in.free()
        self.device_out.free()


@contextmanager
def _torch(folder: Path, *, compiled: bool) -> Iterator[Predict]:
    import torch

    name = read_folder(folder).record.inputs[0].name
    network = _network(onnx.load(folder / "model.onnx")).half().cuda().eval()
    run = torch.compile(network, mode="reduce-overhead") if compiled else network

    def predict(feeds: Feeds) -> object:
        with torch.inference_mode():
            return run(torch.from_numpy(feeds[name]).cuda().half()).float().cpu().numpy()

    yield predict
    torch.cuda.empty_cache()


def _network(model: onnx.ModelProto) -> Any:
    """The graph of `benchmarks.resnet50` in torch, with the same weights."""
    import torch
    from torch.nn import functional

    class Network(torch.nn.Module):  # type: ignore[misc]  # torch is not installed where types are checked
        def __init__(self) -> None:
            super().__init__()
            for initializer in model.graph.initializer:
                self.register_buffer(initializer.name, torch.from_numpy(numpy_helper.to_array(initializer).copy()))
            self.steps = [
                (
                    node.op_type,
                    list(node.input),
                    node.output[0],
                    {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute},
                )
                for node in model.graph.node
            ]

        def forward(self, image: Any) -> Any:
            values = {model.graph.input[0].name: image}
            for operator, names, output, attributes in self.steps:
                inputs = [values[name] if name in values else getattr(self, name) for name in names]
                values[output] = result = operators[operator](inputs, attributes)
            return result

    operators: dict[str, Callable[[list[Any], dict[str, Any]], Any]] = {
        "Conv": lambda x, a: functional.conv2d(*x, stride=tuple(a["strides"]), padding=tuple(a["pads"][:2])),
        "Relu": lambda x, _: torch.relu(x[0]),
        "MaxPool": lambda x, a: functional.max_pool2d(x[0], a["kernel_shape"][0], a["strides"][0], a["pads"][0]),
        "Add": lambda x, _: x[0] + x[1],
        "GlobalAveragePool": lambda x, _: x[0].mean((2, 3), keepdim=True),
        "Flatten": lambda x, _: x[0].flatten(1),
        "Gemm": lambda x, _: torch.addmm(x[2], x[0], x[1]),
    }
    return Network()


@contextmanager
def _onnxruntime(folder: Path) -> Iterator[Predict]:
    with tempfile.TemporaryDirectory(prefix="mlflow-trt-benchmark-") as workdir:
        path = Path(workdir) / "model"
        mlflow.onnx.save_model(onnx.load(folder / "model.onnx"), path)
        yield mlflow.pyfunc.load_model(str(path)).predict
