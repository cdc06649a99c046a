"""The build process: typed model in, plan file out.

TensorRT runs here and not in the user's process, because its libraries print past their logger, abort on some models,
keep gigabytes until the process ends, and cannot be interrupted. `builder` starts this module, sends one line of JSON
to its standard input, and reads lines of JSON from a pipe of their own: standard output and error belong to the
libraries. The process ends when its standard input does, so it never outlives the one that asked.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_trt.backends import tensorrt_api as trt_api
from mlflow_trt.backends.cuda_driver import probe
from mlflow_trt.backends.tensorrt import PluginError, TensorRT, import_distribution
from mlflow_trt.convert.engine.timing_cache import TimingCacheError, TimingCacheFile
from mlflow_trt.core.files import write_whole
from mlflow_trt.core.types import ComputeCapability, Distribution, HardwareCompatibility, ProfilingVerbosity, Weights

_REPORT_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to build, in plain values that survive JSON.

    `inputs` and `outputs` are names and dtypes, as the network has to have them. With `only_reads` nothing is built,
    and the layers of the network are reported.
    """

    model: str
    plan: str
    distribution: str
    tf32: bool
    profiles: list[dict[str, dict[str, Any]]]
    workspace_bytes: int | None
    optimization_level: int | None
    avg_timing_iterations: int | None
    timing_cache: str | None
    builder_cache: bool
    memory_pools: dict[str, int]
    sparsity: bool
    weights: str
    weight_streaming: bool
    profiling_verbosity: str
    tactic_sources: list[str] | None
    version_compatible: bool
    hardware_compatibility: str
    plugins: list[str]
    targets: list[str]
    inputs: list[list[str]]
    outputs: list[list[str]]
    only_reads: bool = False


class BuildFailure(Exception):  # noqa: N818  # not an error of this process but the report of one
    """Ends the job: `event` says why, in the form that `builder` reads."""

    def __init__(self, kind: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.event = {"event": "failed", "kind": kind, "message": message, **details}


def main(reports_descriptor: int) -> None:
    """Do the job that stands on standard input, and report to the file descriptor."""
    reports = os.fdopen(reports_descriptor, "w", buffering=1)
    job = Job(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def report(event: dict[str, Any]) -> None:
        reports.write(json.dumps(event) + "\n")

    tensorrt = import_distribution(Distribution(job.distribution))
    try:
        report(build(tensorrt, job, report))
    except BuildFailure as failure:
        report(failure.event)
    except (PluginError, TimingCacheError) as error:
        report(BuildFailure("option", str(error)).event)
    except Exception as error:  # noqa: BLE001  # whatever it is, the one that asked has to hear of it
        log = tensorrt.log.errors()
        report({"event": "failed", "kind": "build", "message": f"{type(error).__name__}: {error}", "log": log})
    reports.flush()
    # Tearing TensorRT down can take seconds and has nothing left to do: the plan is written.
    os._exit(0)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def build(tensorrt: TensorRT, job: Job, report: Any) -> dict[str, Any]:
    """Parse, configure, build, write the plan. Returns the event that describes it; raises BuildFailure."""
    hardware = probe()
    if not tensorrt.is_rtx and hardware.problem is not None:
        raise BuildFailure("no_gpu", hardware.problem)
    tensorrt.load_plugins(job.plugins)
    builder = tensorrt.builder()
    network = tensorrt.network(builder)
    parser = tensorrt.parser(network)
    if not parser.parse_from_file(job.model):
        raise _parser_failure(tensorrt, parser)
    tensorrt.allow_decomposed_attention(network)
    _check_interface(tensorrt, network, job)
    if job.only_reads:
        return {"event": "read", "layers": _layers(tensorrt, network)}
    config = builder.create_builder_config()
    _configure(tensorrt, config, job)
    _add_profiles(tensorrt, builder, network, config, job.profiles)
    caching = None if job.timing_cache is None or tensorrt.is_rtx else TimingCacheFile(Path(job.timing_cache))
    if caching is not None:
        caching.attach(tensorrt, config)
    monitor = tensorrt.progress_monitor(_throttled(report))
    config.progress_monitor = monitor
    started = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - started
    if plan is None:
        raise BuildFailure("build", "TensorRT built no engine", log=tensorrt.log.errors())
    write_whole(Path(job.plan), plan)
    digest = None if caching is None else caching.merge(tensorrt, config)
    gpu = hardware.gpus[0] if hardware.gpus else None
    return {
        "event": "built",
        "version": tensorrt.version,
        "seconds": seconds,
        "timing_cache": digest,
        "shapes": {tensor.name: list(tensor.shape) for tensor in (*_inputs(network), *_outputs(network))},
        "compute_capabilities": job.targets if tensorrt.is_rtx else [str(gpu.compute_capability)] if gpu else [],
        "gpu": gpu.name if gpu else None,
        "driver": hardware.driver,
    }


def _layers(tensorrt: TensorRT, network: trt_api.INetworkDefinition) -> list[dict[str, Any]]:
    """The layers that the parser made, in the form of the engine inspector."""

    def described(tensor: trt_api.ITensor | None) -> dict[str, Any]:
        if tensor is None:  # an input that is left out
            return {"Name": ""}
        return {"Name": tensor.name, "Dimensions": list(tensor.shape), "Datatype": tensorrt.dtype_name(tensor.dtype)}

    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return [
        {
            "Name": layer.name,
            "LayerType": layer.type.name,
            "Inputs": [described(layer.get_input(index)) for index in range(layer.num_inputs)],
            "Outputs": [described(layer.get_output(index)) for index in range(layer.num_outputs)],
        }
        for layer in layers
    ]


def _inputs(network: trt_api.INetworkDefinition) -> list[trt_api.ITensor]:
    return [network.get_input(index) for index in range(network.num_inputs)]


def _outputs(network: trt_api.INetworkDefinition) -> list[trt_api.ITensor]:
    return [network.get_output(index) for index in range(network.num_outputs)]


def _check_interface(tensorrt: TensorRT, network: trt_api.INetworkDefinition, job: Job) -> None:
    """Raise BuildFailure where inputs or outputs have other names, types or another order than they are recorded with.

    TensorRT's parser renames what it cannot tell apart, and gives an output the type that its own reading leads to.
    """
    for role, tensors, wanted in (
        ("inputs", _inputs(network), job.inputs),
        ("outputs", _outputs(network), job.outputs),
    ):
        found = [[tensor.name, tensorrt.dtype_name(tensor.dtype)] for tensor in tensors]
        if found != wanted:
            raise BuildFailure(
                "interface",
                f"its network has the {role} {_text(found)}, and the model {_text(wanted)}",
                log=tensorrt.log.errors(),
            )


def _text(tensors: list[list[str]]) -> str:
    return ", ".join(f"{name}: {dtype}" for name, dtype in tensors) or "none"


def _parser_failure(tensorrt: TensorRT, parser: trt_api.OnnxParser) -> BuildFailure:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    nodes = [f"{error.node_name() or 'unnamed'} ({error.node_operator()})" for error in errors if error.node_operator()]
    reasons = dict.fromkeys(error.desc().strip() for error in errors)
    # Of operators that it never takes it only says that a check of theirs is false.
    message = "; ".join(reason for reason in reasons if reason != "false") or "the parser gives no reason"
    return BuildFailure("parse", message, nodes=list(dict.fromkeys(nodes)), log=tensorrt.log.errors())


def _configure(tensorrt: TensorRT, config: trt_api.IBuilderConfig, job: Job) -> None:
    _set_flags(tensorrt.builder_flag, config, job)
    if job.workspace_bytes is not None:
        config.set_memory_pool_limit(tensorrt.memory_pool("workspace"), job.workspace_bytes)
    for name, size in job.memory_pools.items():
        config.set_memory_pool_limit(tensorrt.memory_pool(name), size)
    config.profiling_verbosity = tensorrt.profiling_verbosity(ProfilingVerbosity(job.profiling_verbosity))
    if job.optimization_level is not None:
        config.builder_optimization_level = job.optimization_level
    if job.avg_timing_iterations is not None:
        config.avg_timing_iterations = job.avg_timing_iterations
    if job.tactic_sources is not None and not config.set_tactic_sources(tensorrt.tactic_sources(job.tactic_sources)):
        raise BuildFailure("option", f"TensorRT refused the tactic sources: {tensorrt.log.last_error()}")
    level = HardwareCompatibility(job.hardware_compatibility)
    if level is not HardwareCompatibility.NONE:
        config.hardware_compatibility_level = tensorrt.hardware_compatibility(level)
    if job.targets and tensorrt.is_rtx:
        targets = [ComputeCapability.parse(target) for target in job.targets]
        if not tensorrt.set_targets(config, targets):
            raise BuildFailure("option", f"TensorRT-RTX refused a target: {tensorrt.log.last_error()}")


def _set_flags(flags: trt_api.BuilderFlag, config: trt_api.IBuilderConfig, job: Job) -> None:
    wanted = {
        flags.TF32: job.tf32,
        flags.VERSION_COMPATIBLE: job.version_compatible,
        flags.DISABLE_TIMING_CACHE: not job.builder_cache,
        flags.SPARSE_WEIGHTS: job.sparsity,
        flags.REFIT: job.weights == Weights.REFITTABLE.value,
        flags.STRIP_PLAN: job.weights == Weights.STRIPPED.value,
        flags.WEIGHT_STREAMING: job.weight_streaming,
    }
    for flag, is_wanted in wanted.items():
        if is_wanted:
            config.set_flag(flag)
        else:
            config.clear_flag(flag)


def _add_profiles(
    tensorrt: TensorRT,
    builder: trt_api.Builder,
    network: trt_api.INetworkDefinition,
    config: trt_api.IBuilderConfig,
    profiles: list[dict[str, dict[str, Any]]],
) -> None:
    inputs = {tensor.name: tensor for tensor in _inputs(network)}
    values = {name for profile in profiles for name, limits in profile.items() if limits["is_values"]}
    for name, tensor in inputs.items():
        if tensor.is_shape_tensor and name not in values:
            raise BuildFailure("shape_tensor", "other shapes are computed from its values", tensor=name)
        if not tensor.is_shape_tensor and name in values:
            raise BuildFailure("no_shape_tensor", "no shape is computed from its values", tensor=name)
    _fix_constant_dimensions(inputs, profiles)
    for number, ranges in enumerate(profiles):
        profile = builder.create_optimization_profile()
        for name, limits in ranges.items():
            triple = (limits["min"], limits["opt"], limits["max"])
            try:
                if limits["is_values"]:
                    profile.set_shape_input(name, *triple)
                else:
                    profile.set_shape(name, *triple)
            except (RuntimeError, ValueError) as error:
                raise BuildFailure("profile", f"{error} {tensorrt.log.last_error()}", tensor=name) from error
        if config.add_optimization_profile(profile) < 0:
            raise BuildFailure("profile", f"profile {number}: {tensorrt.log.last_error()}")


def _fix_constant_dimensions(inputs: dict[str, trt_api.ITensor], profiles: list[dict[str, dict[str, Any]]]) -> None:
    """Make a dimension static that has one size in all profiles: TensorRT then optimizes for it."""
    for name, tensor in inputs.items():
        ranges = [profile[name] for profile in profiles if name in profile and not profile[name]["is_values"]]
        if not ranges:
            continue
        sizes = [
            {size for limits in ranges for size in (limits["min"][i], limits["max"][i])}
            for i in range(len(ranges[0]["min"]))
        ]
        tensor.shape = [
            next(iter(size)) if dim == -1 and len(size) == 1 else dim
            for dim, size in zip(tensor.shape, sizes, strict=True)
        ]


def _throttled(report: Any) -> Any:
    last = 0.0

    def progress(phase: str, fraction: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _REPORT_SECONDS:
            last = now
            report({"event": "progress", "phase": phase, "fraction": round(fraction, 4)})

    return progress
