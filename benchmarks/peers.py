"""What a user would pick instead, beside this package: `python -m benchmarks.runtime --peers`.

Each peer runs in a process of its own, in turns; arrays in and arrays out. What is not installed is left out. Measured:
milliseconds a call of one caller, answers a second to threads that send one row each, and seconds from loading to the
first answer. ONNX Runtime gets the typed model, so that its TensorRT-RTX provider builds the engine that this package
runs; torch gets the source model in float16.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.models import MODELS, BenchmarkModel, Feeds
from mlflow_trt.core.optional import is_installed

MODELS_OF_PEERS = ("resnet50", "bert", "detector")
BATCHES = (1, 8, 32, 128)
THREADS = (16, 64)
_SECONDS_TO_ANSWER = 400
PROVIDER = "ONNX Runtime, TensorRT-RTX"
Predict = Callable[[Feeds], object]


def compare(
    folders: dict[str, Path], *, peers: Sequence[str], rounds: int, seconds: float
) -> dict[str, dict[str, dict[str, Any]]]:
    """By model and peer the medians of all rounds. A peer that fails is left out, with its reason on stderr."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {model: {} for model in folders}
    failed: set[tuple[str, str]] = set()
    for _ in range(rounds):
        for model, folder in folders.items():
            for peer in peers:
                if (model, peer) in failed:
                    continue
                measured = _in_a_process(peer, model, folder, seconds)
                if measured is None:
                    failed.add((model, peer))
                else:
                    found[model].setdefault(peer, []).append(measured)
    return {
        model: {
            peer: {name: float(np.median([run[name] for run in runs])) for name in runs[0]}
            for peer, runs in by_peer.items()
            if (model, peer) not in failed
        }
        for model, by_peer in found.items()
    }


def table(measured: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows for one model."""
    names = list(next(iter(measured.values()), {}))
    return ["what", *names], [[peer, *(f"{run[name]:.4g}" for name in names)] for peer, run in measured.items()]


def _in_a_process(peer: str, model: str, folder: Path, seconds: float) -> dict[str, Any] | None:
    command = [sys.executable, "-m", "benchmarks.peers", peer, model, str(folder), "--seconds", str(seconds)]
    try:
        done = subprocess.run(  # of this repository
            command, capture_output=True, text=True, timeout=_SECONDS_TO_ANSWER, env=os.environ, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"{peer} gave no answer for {model} in {_SECONDS_TO_ANSWER} s", file=sys.stderr)
        return None
    if done.returncode != 0:
        print(f"{peer} failed on {model}: {' | '.join(done.stderr.splitlines()[-3:])}", file=sys.stderr)
        return None
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure_peer(peer: str, model: BenchmarkModel, folder: Path, seconds: float) -> dict[str, float]:
    """All that is measured of one peer, in this process."""
    one = model.feeds(1)
    started = time.perf_counter()
    predict = PEERS[peer](model, folder)
    predict(one)
    found = {"first answer, s": time.perf_counter() - started}
    for size in (size for size in BATCHES if size <= largest_batch(model)):
        found[f"batch {size}, ms"] = median_milliseconds(partial(predict, model.feeds(size)), seconds)
    for count in THREADS:
        found[f"{count} threads, rows/s"] = _rate(partial(predict, one), count, 2 * seconds)
    return found


def largest_batch(model: BenchmarkModel) -> int:
    """The largest batch of the engine's profile."""
    return int(model.recipe["batch"][2])


def median_milliseconds(call: Callable[[], object], seconds: float) -> float:
    """Of as many calls as fit, after some that do not count."""
    for _ in range(5):
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1e3 * float(np.median(times))


def _rate(call: Callable[[], object], threads: int, seconds: float) -> float:
    from benchmarks.runtime import call_from_threads

    call_from_threads(call, threads, seconds / 4)
    calls, took = call_from_threads(call, threads, seconds)
    return len(calls) / took


def _session(_model: BenchmarkModel, folder: Path) -> Predict:
    import mlflow_trt

    return mlflow_trt.load_model(str(folder), warm_up="on").run


def _pyfunc(_model: BenchmarkModel, folder: Path) -> Predict:
    import mlflow

    predict: Predict = mlflow.pyfunc.load_model(str(folder), model_config={"warm_up": "on"}).predict
    return predict


def _plain(_model: BenchmarkModel, folder: Path) -> Predict:
    """For one thread alone: others wait."""
    import threading

    from benchmarks.alternatives import PlainLoop
    from mlflow_trt.runtime.cuda.device import open_device

    device, lock = open_device(0), threading.Lock()
    with device.current():
        loop = PlainLoop(folder)

    def predict(feeds: Feeds) -> object:
        with lock, device.current():
            return loop.predict(feeds)

    return predict


def _onnxruntime(model: BenchmarkModel, folder: Path, *, provider: str) -> Predict:
    import onnxruntime  # what users run instead

    from mlflow_trt.store.folder import read_folder

    record = read_folder(folder).record
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    providers = None
    if provider == "rtx":
        import onnxruntime_ep_nv_tensorrt_rtx as plugin

        if not (devices := _rtx_devices()):
            onnxruntime.register_execution_provider_library("rtx", plugin.get_library_path())
            devices = _rtx_devices()
        limits = {name: array.shape[1:] for name, array in model.feeds(1).items()}

        def shapes(rows: int) -> str:
            return ",".join(f"{name}:{'x'.join(map(str, (rows, *row)))}" for name, row in limits.items())

        profile = {f"nv_profile_{which}_shapes": shapes(rows)
                   for which, rows in zip(("min", "opt", "max"), model.recipe["batch"], strict=True)}  # fmt: skip
        options.add_provider_for_devices(devices[:1], profile)
    else:
        providers = ["CUDAExecutionProvider"]
    session = onnxruntime.InferenceSession(str(folder / record.typed.file), sess_options=options, providers=providers)
    return partial(session.run, None)


def _rtx_devices() -> list[Any]:
    import onnxruntime  # what users run instead

    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == "rtx"]


def _torch(_model: BenchmarkModel, folder: Path, *, how: str) -> Predict:
    import onnx
    import torch

    from benchmarks.alternatives import _network
    from mlflow_trt.store.folder import read_folder

    name = read_folder(folder).record.inputs[0].name
    network = _network(onnx.load(folder / "model.onnx")).half().cuda().eval()
    if how == "compile":
        network = torch.compile(network, mode="reduce-overhead")
    elif how == "tensorrt-rtx":
        import torch_tensorrt

        shapes = [(rows, *_model.feeds(1)[name].shape[1:]) for rows in _model.recipe["batch"]]
        limits = dict(zip(("min_shape", "opt_shape", "max_shape"), shapes, strict=True))
        inputs = [torch_tensorrt.Input(**limits, dtype=torch.half)]
        network = torch_tensorrt.compile(network, ir="dynamo", inputs=inputs, use_explicit_typing=True)

    def predict(feeds: Feeds) -> object:
        with torch.inference_mode():
            return network(torch.from_numpy(feeds[name]).cuda().half()).float().cpu().numpy()

    return predict


PEERS: dict[str, Callable[[BenchmarkModel, Path], Predict]] = {
    "mlflow-trt, session.run": _session,
    "mlflow-trt, pyfunc": _pyfunc,
    PROVIDER: partial(_onnxruntime, provider="rtx"),
    "ONNX Runtime, CUDA": partial(_onnxruntime, provider="cuda"),
    "torch.compile": partial(_torch, how="compile"),
    "torch-tensorrt-rtx": partial(_torch, how="tensorrt-rtx"),
    "plain loop": _plain,
}


def installed(model: str) -> list[str]:
    """The peers that can run a model here; those of torch know the operators of ResNet-50 only."""
    found = ["mlflow-trt, session.run", "mlflow-trt, pyfunc"]
    if is_installed("onnxruntime_ep_nv_tensorrt_rtx"):
        found.append(PROVIDER)
    if is_installed("onnxruntime"):
        import onnxruntime  # what users run instead

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            found.append("ONNX Runtime, CUDA")
    if model == "resnet50":
        found += ["torch.compile"] * is_installed("torch") + ["torch-tensorrt-rtx"] * is_installed("torch_tensorrt")
        found.append("plain loop")
    return found


def main() -> int:
    """Measure one peer, and print what was found as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    found = measure_peer(options.peer, MODELS[options.model](), options.folder, options.seconds)
    print(json.dumps(found), flush=True)
    os._exit(0)  # some of them crash where they unload their libraries


if __name__ == "__main__":
    sys.exit(main())
