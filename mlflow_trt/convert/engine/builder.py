"""Typed model and recipe in, engine out, through a process of its own (see `worker`)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, cast

import onnx

from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.backends.cuda_driver import probe
from mlflow_trt.convert.checks import check_recipe
from mlflow_trt.convert.engine.worker import Job
from mlflow_trt.convert.onnx.model import sha256_of
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.core.progress_event import BuildProgress, Progress
from mlflow_trt.core.types import Distribution, EngineRecord, Interface, PluginLibrary, Precision, Shape, ShapeProfile
from mlflow_trt.errors import BuildError, RecipeError, RuntimeUnavailableError, UnsupportedModelError

_WORKER = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from mlflow_trt.convert.engine.worker import main
main(int(sys.argv[2]))
"""
_LINES_QUOTED = 5
_INTEGER_OPERATOR = re.compile(r"\((QLinear\w+|ConvInteger|MatMulInteger|DynamicQuantizeLinear)\)$")
_FUSED = frozenset(
    {
        "BiasGelu", "BiasSoftmax", "BiasSplitGelu", "EmbedLayerNormalization", "FastGelu", "FusedConv", "FusedGemm",
        "FusedMatMul", "FusedMatMulActivation", "GroupNorm", "NhwcConv", "NhwcFusedConv", "QuickGelu", "SkipGroupNorm",
        "SkipLayerNormalization",
    }
)  # fmt: skip
"""Operators of com.microsoft that stand for several of ONNX, and that TensorRT has not."""


class Built(NamedTuple):
    """An engine, and the shapes that TensorRT's network gives its inputs and outputs, -1 for what varies."""

    engine: EngineRecord
    shapes: Mapping[str, Shape]


def build_engine(
    model: Path,
    plan: Path,
    recipe: Recipe,
    profiles: Sequence[ShapeProfile],
    *,
    interface: Interface,
    distribution: Distribution | None = None,
    gpu: str | None = None,
    progress: Progress | None = None,
) -> Built:
    """Build an engine from the typed model at `model` and write it to `plan`.

    Args:
        interface: the inputs and outputs that the engine has to have; their shapes do not matter here.
        distribution: which TensorRT builds; None for the preferred one of those installed.
        gpu: UUID of the only GPU that the build may see; None leaves the environment as it is.
        progress: called a few times a second. What it raises, KeyboardInterrupt included, ends the build at once.

    Raises:
        UnsupportedModelError: TensorRT's parser refuses nodes of the model, each of which is named with its operator,
            or makes other inputs or outputs of it.
        BuildError: TensorRT built nothing; its last words are in the text.
        RecipeError: an option or profile is refused, or a target cannot be built for.
        MissingDependencyError: no TensorRT is installed. RuntimeUnavailableError: the one that is needs a GPU to build.
    """
    tensorrt = trt.load(distribution)
    check_recipe(tensorrt, recipe)
    plugins = tuple(describe_plugins(recipe.plugins))
    job = _job(model, plan, recipe, profiles, interface, tensorrt.distribution)
    with _worker(job, gpu) as worker:
        outcome = _follow(worker, progress)
        words = worker.last_words()
    if outcome is None:
        raise BuildError(_crash_text(tensorrt, worker.status, words), log=words)
    if outcome["event"] == "failed":
        _raise(tensorrt, outcome, words)
    engine = EngineRecord(
        file=plan.name,
        sha256=sha256_of(plan),
        size=plan.stat().st_size,
        distribution=tensorrt.distribution,
        version=outcome["version"],
        compute_capabilities=tuple(outcome["compute_capabilities"]),
        hardware_compatibility=recipe.hardware_compatibility,
        version_compatible=recipe.version_compatible,
        gpu=outcome["gpu"],
        driver=outcome["driver"],
        build_seconds=round(outcome["seconds"], 3),
        weights=recipe.weights,
        timing_cache=outcome["timing_cache"],
        plugins=plugins,
    )
    return Built(engine, {name: tuple(shape) for name, shape in outcome["shapes"].items()})


def read_network(
    model: Path, recipe: Recipe, *, interface: Interface, distribution: Distribution | None = None
) -> list[dict[str, Any]]:
    """The layers of the network that TensorRT's parser makes of a typed model, before the builder fuses them.

    In the form of the engine inspector. TensorRT-RTX needs no GPU for that. Raises what `build_engine` raises.
    """
    tensorrt = trt.load(distribution)
    job = replace(_job(model, model, recipe, (), interface, tensorrt.distribution), only_reads=True)
    with _worker(job, None) as worker:
        outcome = _follow(worker, None)
        words = worker.last_words()
    if outcome is None:
        raise BuildError(_crash_text(tensorrt, worker.status, words), log=words)
    if outcome["event"] == "failed":
        _raise(tensorrt, outcome, words)
    layers: list[dict[str, Any]] = outcome["layers"]
    return layers


def describe_plugins(libraries: Iterable[str]) -> Iterator[PluginLibrary]:
    """The names and digests of libraries. Raises OSError for one that cannot be read."""
    for library in libraries:
        yield PluginLibrary(name=Path(library).name, sha256=sha256_of(Path(library)))


def _job(
    model: Path,
    plan: Path,
    recipe: Recipe,
    profiles: Sequence[ShapeProfile],
    interface: Interface,
    distribution: Distribution,
) -> Job:
    return Job(
        # Not resolved: external weights are beside the path that was given, not beside what a link points to.
        model=str(model.absolute()),
        plan=str(plan.absolute()),
        distribution=distribution.value,
        tf32=recipe.precision is not Precision.FP32 and recipe.allow_tf32,
        profiles=[{name: asdict(limits) for name, limits in profile.ranges.items()} for profile in profiles],
        workspace_bytes=recipe.workspace_bytes,
        optimization_level=recipe.optimization_level,
        avg_timing_iterations=recipe.avg_timing_iterations,
        timing_cache=recipe.timing_cache,
        builder_cache=recipe.builder_cache,
        memory_pools=dict(recipe.memory_pools),
        sparsity=recipe.sparsity,
        weights=recipe.weights.value,
        weight_streaming=recipe.weight_streaming,
        profiling_verbosity=recipe.profiling_verbosity.value,
        tactic_sources=None if recipe.tactic_sources is None else list(recipe.tactic_sources),
        version_compatible=recipe.version_compatible,
        hardware_compatibility=recipe.hardware_compatibility.value,
        plugins=[str(Path(library).absolute()) for library in recipe.plugins],
        targets=list(recipe.targets),
        inputs=[[spec.name, spec.narrowed.dtype] for spec in interface.inputs],
        outputs=[[spec.name, spec.narrowed.dtype] for spec in interface.outputs],
    )


@dataclass(frozen=True, kw_only=True)
class _Worker:
    """The build process, the reports that it sends, and the file that it and the libraries in it print to."""

    process: subprocess.Popen[bytes]
    reports: IO[str]
    printed: IO[bytes]

    @property
    def status(self) -> int:
        return self.process.wait()

    def last_words(self) -> list[str]:
        self.printed.seek(0)
        lines = [line.strip() for line in self.printed.read().decode(errors="replace").splitlines()]
        return [line for line in lines if line][-_LINES_QUOTED:]


@contextmanager
def _worker(job: Job, gpu: str | None) -> Iterator[_Worker]:
    """Run the build process; however this block ends, the process has ended too."""
    environment = dict(os.environ)
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    paths = json.dumps([entry for entry in sys.path if entry and isinstance(entry, str)])
    reading, writing = os.pipe()
    with os.fdopen(reading) as reports, tempfile.TemporaryFile() as printed:
        try:
            process = subprocess.Popen(  # noqa: S603  # this interpreter, with our own module
                # Isolated: else the current folder would come first where even json is looked for.
                [sys.executable, "-I", "-c", _WORKER, paths, str(writing)],
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=printed,
                pass_fds=[writing],
                env=environment,
                # Ctrl-C reaches this process alone, which then ends the worker: no half of a build goes on.
                start_new_session=True,
            )
        finally:
            os.close(writing)
        jobs = cast("IO[bytes]", process.stdin)
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended already, and last_words() says why
                jobs.write(json.dumps(asdict(job)).encode() + b"\n")
                jobs.flush()
            yield _Worker(process=process, reports=reports, printed=printed)
        finally:
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                jobs.close()


def _follow(worker: _Worker, progress: Progress | None) -> dict[str, Any] | None:
    """Pass on the progress until the worker reports how it ended; None where it ended without a word."""
    for line in worker.reports:
        event: dict[str, Any] = json.loads(line)
        if event["event"] != "progress":
            return event
        if progress is not None:
            progress(BuildProgress(phase=event["phase"], fraction=event["fraction"]))
    return None


def _crash_text(tensorrt: trt.TensorRT, status: int, words: Sequence[str]) -> str:
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    said = f" Its last words: {' | '.join(words)}" if words else ""
    crashed = -status in (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV)
    advice = " Try another release of it, or log the model with mlflow.onnx, which runs it on ONNX Runtime."
    return f"{tensorrt}'s build process {how} without building an engine.{advice if crashed else ''}{said}"


def _is_about_no_gpu(line: str) -> bool:
    """Whether TensorRT-RTX only complains that there is no GPU here, which it builds without."""
    return "CUDA driver version is insufficient" in line and probe().driver is None


def _advice(message: str, nodes: Sequence[str]) -> str:
    """What to do about nodes, each a name with its operator, that TensorRT's parser refuses."""
    operators = list(dict.fromkeys(node.rpartition("(")[2].removesuffix(")") for node in nodes))
    has_no_layer = "Plugin not found" in message or "is not supported in TensorRT-RTX" in message
    fused = [operator for operator in operators if operator in _FUSED]
    if has_no_layer and fused:
        return (
            f"{', '.join(fused)}: ONNX Runtime's optimizer makes such operators of others. Convert the model from "
            "before ONNX Runtime optimized it, or log it with mlflow.onnx"
        )
    if has_no_layer and not (operators and all(map(onnx.defs.has, operators))):
        return (
            "Operators that are not of ONNX are custom operators, which TensorRT runs as plugins: name their libraries "
            "with Recipe(plugins=[...]) or --dynamic-plugins, for the tensorrt distribution, since TensorRT-RTX has no "
            "plugins. Or export the model with operators of ONNX, or log it with mlflow.onnx"
        )
    if any(map(_INTEGER_OPERATOR.search, nodes)):
        return (
            "A model that computes with integers was quantized for CPUs: convert the float model with precision int8, "
            "or quantize it in the QDQ format"
        )
    lacking = f"TensorRT has no {', '.join(operators)}: export" if has_no_layer else "Export"
    return f"{lacking} the model with other operators there, or log it with mlflow.onnx, which runs it on ONNX Runtime"


def _raise(tensorrt: trt.TensorRT, outcome: dict[str, Any], words: Sequence[str]) -> NoReturn:
    """Turn the worker's report into the error that the user gets."""
    kind, message, tensor = outcome["kind"], outcome["message"], outcome.get("tensor")
    # The parser's reasons quote the lines that were logged meanwhile.
    message = "; ".join(line for line in message.splitlines() if not _is_about_no_gpu(line))
    words = [line for line in words if not _is_about_no_gpu(line)]
    log = [*(line for line in outcome.get("log", ()) if not _is_about_no_gpu(line)), *words]
    if kind == "parse":
        nodes = outcome["nodes"]
        which = f" {len(nodes)} node(s), {', '.join(nodes[:10])}" if nodes else " the model"
        said = f" ({' | '.join(words)})" if words else ""
        said = f"{said}. {_advice(message, nodes)}"
        raise UnsupportedModelError(f"{tensorrt} cannot run{which}: {message}{said}", nodes=nodes, log=log)
    if kind == "interface":
        raise UnsupportedModelError(
            f"{tensorrt} reads this model in another way than ONNX means it: {message}. Its engine would be no good; "
            "export the model with other operators there, or log it with mlflow.onnx, which runs it on ONNX Runtime",
            log=log,
        )
    if kind == "shape_tensor":
        raise RecipeError(
            f"input {tensor!r} is a shape tensor: {message}. Give its smallest, usual and largest values: "
            f"shapes={{{tensor!r}: ((...), (...), (...))}}",
            option="shapes",
        )
    if kind in ("no_shape_tensor", "profile"):
        raise RecipeError(f"{tensorrt} refuses the shapes of input {tensor!r}: {message}", option="shapes")
    if kind == "option":
        raise RecipeError(message)
    if kind == "no_gpu":
        raise RuntimeUnavailableError(
            f"TensorRT builds engines on the GPU that they are for: {message}. TensorRT-RTX builds without one: "
            f"`pip install 'mlflow-trt[rtx]'` and set {trt.DISTRIBUTION_VARIABLE}=tensorrt_rtx."
        )
    raise BuildError(f"{tensorrt} built no engine: {log[-1] if log else message}", log=log)
