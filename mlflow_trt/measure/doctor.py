"""What this machine can do: not guessed from what is installed, but tried."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mlflow_trt._version import __version__
from mlflow_trt.backends import cuda_driver as hardware
from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.convert.conversion import Conversion, ConversionTask, convert_source
from mlflow_trt.convert.onnx.model import read_onnx
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.core.scratch import scratch_folder
from mlflow_trt.errors import ExecutionError, MlflowTrtError
from mlflow_trt.store import cache

_ROWS = 5
# Far below any wrong result, far above what TF32 rounds away.
_TOLERANCE = 1e-2


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding: `ok` is False where something is missing or fails."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All findings. `can_build` and `can_run` are about TensorRT, `can_run_on_cpu` about ONNX Runtime."""

    checks: tuple[Check, ...]
    can_build: bool
    can_run: bool
    can_run_on_cpu: bool


def examine() -> Diagnosis:
    """Look at the packages and the hardware, build a small engine, and run it on the GPU and on ONNX Runtime."""
    checks = [Check(name="Python", ok=True, detail=platform.python_version())]
    checks.append(Check(name="mlflow-trt", ok=True, detail=__version__))
    checks += [_package(name) for name in ("mlflow", "onnx", "numpy")]
    checks += [_onnxruntime(), *_tensorrt(), *_hardware(), _cuda_package(), _native()]
    with scratch_folder() as workdir:
        build, conversion = _try_build(workdir)
        run = _try_tensorrt(conversion)
        reference = _try_onnxruntime(workdir)
    checks += [build, run, reference]
    checks.append(Check(name="cache", ok=cache.problem() is None, detail=cache.problem() or str(cache.directory())))
    return Diagnosis(checks=tuple(checks), can_build=build.ok, can_run=run.ok, can_run_on_cpu=reference.ok)


def _package(name: str) -> Check:
    try:
        return Check(name=name, ok=True, detail=importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name=name, ok=False, detail="not installed as a package")


def _onnxruntime() -> Check:
    names = [name for name in ("onnxruntime", "onnxruntime-gpu") if _package(name).ok]
    if len(names) == 2:
        detail = "onnxruntime and onnxruntime-gpu overwrite each other; uninstall both and install one"
        return Check(name="ONNX Runtime", ok=False, detail=detail)
    if not names:
        detail = "not installed: pip install onnxruntime, or onnxruntime-gpu"
        return Check(name="ONNX Runtime", ok=False, detail=detail)
    return Check(name="ONNX Runtime", ok=True, detail=f"{names[0]} {_package(names[0]).detail}")


def _tensorrt() -> list[Check]:
    distributions = trt.installed()
    if not distributions:
        return [Check(name="TensorRT", ok=False, detail=f"not installed. {trt.INSTALL_HINT}")]
    checks = []
    for distribution in distributions:
        try:
            tensorrt = trt.load(distribution)
        except MlflowTrtError as error:
            checks.append(Check(name=distribution.label, ok=False, detail=error.message))
        else:
            targets = ", ".join(tensorrt.compute_capabilities())
            detail = f"{tensorrt.version}{f', builds for {targets}' if targets else ''}"
            checks.append(Check(name=distribution.label, ok=True, detail=detail))
    return checks


def _hardware() -> list[Check]:
    found = hardware.probe()
    driver = f"{found.driver or 'release unknown'}, CUDA {found.cuda}" if found.cuda else found.problem or "unknown"
    wanted = _cuda_of_tensorrt()
    is_too_old = found.cuda is not None and wanted is not None and int(found.cuda.split(".")[0]) < wanted
    if is_too_old:
        driver += f", which is too old: the TensorRT installed here is for CUDA {wanted}. Install a newer driver"
    checks = [Check(name="driver", ok=found.cuda is not None and not is_too_old, detail=driver)]
    checks += [
        Check(name=f"GPU {gpu.ordinal}", ok=True, detail=f"{gpu}, {gpu.memory / 2**30:.0f} GiB") for gpu in found.gpus
    ]
    return checks


def _cuda_of_tensorrt() -> int | None:
    """The release of CUDA that the TensorRT in use is for, as its package tells: tensorrt_rtx_cu13_bindings."""
    for distribution in trt.installed()[:1]:
        names = {major: f"{distribution.value}_cu{major}_bindings" for major in range(12, 20)}
        return max((major for major, name in names.items() if _package(name).ok), default=None)
    return None


def _cuda_package() -> Check:
    """What calls the CUDA driver."""
    from mlflow_trt.runtime.cuda.driver import load_driver

    try:
        package, _ = load_driver()
    except MlflowTrtError as error:
        return Check(name="CUDA calls", ok=False, detail=error.message)
    return Check(name="CUDA calls", ok=True, detail=f"{package} {_package(package).detail}")


def _native() -> Check:
    """What callers run on: the extension, or Python, which is slower and otherwise the same."""
    from mlflow_trt.runtime import native

    return Check(name="extension", ok=True, detail=native.description())


def _small_model() -> onnx.ModelProto:
    """A row-wise product with weights of which no two outputs agree."""
    weights = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "doctor",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(weights, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _rows() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.sin(np.arange(_ROWS * 4, dtype=np.float32)).reshape(_ROWS, 4)


def _check_rows(outputs: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]) -> None:
    weights = numpy_helper.to_array(_small_model().graph.initializer[0])
    error = float(np.abs(outputs["y"].astype(np.float64) - _rows() @ weights).max())
    if not error < _TOLERANCE:
        raise ExecutionError(f"it answers wrongly: a product of small matrices is off by {error:.3g}")


def _try_build(workdir: Path) -> tuple[Check, Conversion | None]:
    try:
        conversion = convert_source(
            ConversionTask(
                source=read_onnx(_small_model(), workdir),
                recipe=Recipe(precision="tf32", batch=(1, 4, 8)),
                workdir=workdir,
            )
        )
    except MlflowTrtError as error:
        return Check(name="can build", ok=False, detail=error.message), None
    engine = conversion.engine
    return Check(name="can build", ok=True, detail=f"{engine}, in {engine.build_seconds:.1f} s"), conversion


def _try_tensorrt(conversion: Conversion | None) -> Check:
    from mlflow_trt.runtime.cuda.device import open_device
    from mlflow_trt.runtime.tensorrt_session import TensorRTSession

    name = "can run on TensorRT"
    if conversion is None:
        return Check(name=name, ok=False, detail="there is no engine to try")
    try:
        device = open_device(0)
        with TensorRTSession(
            conversion.plan.read_bytes(),
            tensorrt=trt.load(conversion.engine.distribution),
            device=device,
            inputs=conversion.source.inputs,
            outputs=conversion.source.outputs,
            batch_axis=conversion.profiles.batch_axis,
        ) as session:
            _check_rows(session.run({"x": _rows()}))
            return Check(name=name, ok=True, detail=session.description)
    except MlflowTrtError as error:
        return Check(name=name, ok=False, detail=error.message)


def _try_onnxruntime(workdir: Path) -> Check:
    from mlflow_trt.runtime.onnxruntime_session import OnnxRuntimeSession

    name = "can run on ONNX Runtime"
    try:
        model = read_onnx(_small_model(), workdir)
        with OnnxRuntimeSession(model.path, model.inputs, model.outputs) as session:
            _check_rows(session.run({"x": _rows()}))
            detail = f"{session.description}; the load setting runtime takes it as `auto` or `onnxruntime`"
            return Check(name=name, ok=True, detail=detail)
    except MlflowTrtError as error:
        return Check(name=name, ok=False, detail=error.message)
