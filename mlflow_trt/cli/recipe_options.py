"""The options of a conversion under the names that trtexec's users look for, and the recipe that they make."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlflow_trt.cli.options import combine_profiles, parse_batch

if TYPE_CHECKING:
    from mlflow_trt.convert.recipe import Recipe

PRECISIONS = ("fp16", "bf16", "int8", "fp8", "best")
TACTIC_SOURCES = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
_MEMORY_POOLS = {"workspace": "", "tacticsharedmem": "tactic_shared_memory", "tacticdram": "tactic_dram"}
_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_COMPATIBILITY = {"ampere+": "ampere_plus", "samecomputecapability": "same_compute_capability"}

Precision = Annotated[
    str, typer.Option(help="The number format to compute in: fp32, tf32, fp16, bf16, int8, fp8 or best. Default: fp32.")
]
Fp16 = Annotated[bool, typer.Option("--fp16/--no-fp16", show_default=False, help="The same as --precision fp16.")]
Bf16 = Annotated[bool, typer.Option("--bf16/--no-bf16", show_default=False, help="The same as --precision bf16.")]
Int8 = Annotated[bool, typer.Option("--int8/--no-int8", show_default=False, help="The same as --precision int8.")]
Fp8 = Annotated[bool, typer.Option("--fp8/--no-fp8", show_default=False, help="The same as --precision fp8.")]
Best = Annotated[
    bool,
    typer.Option(
        "--best/--no-best",
        show_default=False,
        help="The fastest precision that is accurate enough, measured on this machine's GPU.",
    ),
]
NoTf32 = Annotated[
    bool, typer.Option("--no-tf32", help="Keep layers that compute in float32 from rounding as TF32 does.")
]
Batch = Annotated[str, typer.Option(help="Rows along axis 0: 64, or min:opt:max like 1:8:64.")]
MinShapes = Annotated[
    list[str] | None,
    typer.Option(help="Smallest shapes, like x:1x3x224x224,y:1x16. Repeat all three for several profiles."),
]
OptShapes = Annotated[list[str] | None, typer.Option(help="Usual shapes.")]
MaxShapes = Annotated[list[str] | None, typer.Option(help="Largest shapes.")]
Target = Annotated[
    list[str] | None,
    typer.Option(help="Compute capability to build for, like sm86. TensorRT-RTX only; may be repeated."),
]
Workspace = Annotated[
    float | None, typer.Option(help="Most memory that a layer may use temporarily, in MiB. Default: the whole GPU.")
]
MemPoolSize = Annotated[
    str, typer.Option(help="Limits of memory pools: workspace, tacticSharedMem, tacticDRAM; like workspace:2G. MiB.")
]
AvgTiming = Annotated[int | None, typer.Option(help="How often each candidate kernel is timed.")]
OptimizationLevel = Annotated[int | None, typer.Option(help="0 (build fast) to 5 (search longest).")]
TimingCacheFile = Annotated[
    str, typer.Option(help="Timing cache to use and to add to; several builds may share it. None with TensorRT-RTX.")
]
NoBuilderCache = Annotated[bool, typer.Option("--no-builder-cache", help="Do not remember timings within the build.")]
TacticSources = Annotated[
    str, typer.Option(help="EDGE_MASK_CONVOLUTIONS and JIT_CONVOLUTIONS: a list, or changes like -JIT_CONVOLUTIONS.")
]
Sparsity = Annotated[str, typer.Option(help="enable: use kernels for weights of which two of four are zero.")]
VersionCompatible = Annotated[
    bool, typer.Option("--version-compatible", help="Let later minor releases of TensorRT load the engine.")
]
HardwareCompatibilityLevel = Annotated[
    str, typer.Option(help="none, ampere_plus or same_compute_capability. Not with TensorRT-RTX: see --target.")
]
Refit = Annotated[bool, typer.Option("--refit", help="Build an engine whose weights tools can exchange.")]
StripWeights = Annotated[
    bool, typer.Option("--strip-weights", help="Leave the weights out of the engine; put back at each load.")
]
WeightStreaming = Annotated[
    bool, typer.Option("--weight-streaming", help="Let weights that do not fit on the GPU stay in host memory.")
]
DynamicPlugins = Annotated[
    list[str] | None,
    typer.Option(help="A library with plugins for custom operators; may be repeated. Not TensorRT-RTX."),
]
KeepFloat32 = Annotated[
    list[str] | None,
    typer.Option("--keep-float32", help="A node or an operator that stays in float32; may be repeated."),
]
CalibrationMethod = Annotated[
    str, typer.Option(help="How int8 and fp8 derive ranges: minmax, entropy or percentile. Default: minmax.")
]
ProfilingVerbosity = Annotated[
    str, typer.Option(help="none, layer_names_only, or detailed for `inspect --layers`. Default: layer_names_only.")
]


def recipe_from(given: Mapping[str, Any]) -> Recipe:
    """The recipe that the options of a command describe. Raises BadParameter, and what Recipe raises."""
    from mlflow_trt.convert.recipe import Recipe

    workspace, pools = _memory_pools(given["mem_pool_size"])
    if given["workspace"] is not None:
        workspace = _positive(given["workspace"], "--workspace")
    return Recipe(
        precision=_precision(given),
        keep_float32=given["keep_float32"] or (),
        calibration_method=given["calibration_method"] or "minmax",
        allow_tf32=not given["no_tf32"],
        batch=parse_batch(given["batch"]) if given["batch"] else None,
        shapes=combine_profiles(given["min_shapes"] or (), given["opt_shapes"] or (), given["max_shapes"] or ()),
        targets=given["target"] or (),
        workspace_bytes=workspace,
        memory_pools=pools,
        avg_timing_iterations=given["avg_timing"],
        optimization_level=given["builder_optimization_level"],
        timing_cache=given["timing_cache_file"] or None,
        builder_cache=not given["no_builder_cache"],
        tactic_sources=_tactic_sources(given["tactic_sources"]),
        sparsity=_sparsity(given["sparsity"]),
        version_compatible=given["version_compatible"],
        hardware_compatibility=_compatibility(given["hardware_compatibility_level"]),
        weights=_weights(refit=given["refit"], stripped=given["strip_weights"]),
        weight_streaming=given["weight_streaming"],
        plugins=given["dynamic_plugins"] or (),
        profiling_verbosity=given["profiling_verbosity"] or "layer_names_only",
    )


def _precision(given: Mapping[str, Any]) -> str:
    named = [given["precision"]] if given["precision"] else []
    named += [name for name in PRECISIONS if given[name] and name not in named]
    if len(named) > 1:
        raise typer.BadParameter(f"{' and '.join(named)}: a graph has one precision since TensorRT 11; choose one")
    if named == ["tf32"] and given["no_tf32"]:
        raise typer.BadParameter("tf32 and --no-tf32 contradict each other; leave one of them out")
    return str(named[0]) if named else "fp32"


def _memory_pools(text: str) -> tuple[int | None, dict[str, int]]:
    workspace, pools = None, {}
    for item in filter(None, text.split(",")):
        match = re.fullmatch(r"(\w+):([0-9]{1,18}(?:\.[0-9]*)?)([BKMG]?)", item, re.IGNORECASE)
        if not match:
            raise typer.BadParameter(f"--mem-pool-size: {item!r}: expected pool:size, like workspace:2G")
        name, amount, unit = match.groups()
        if name.lower() not in _MEMORY_POOLS:
            known = "workspace, tacticSharedMem, tacticDRAM"
            raise typer.BadParameter(f"--mem-pool-size: there is no pool {name!r} (no DLA is supported), but {known}")
        size = _positive(float(amount), f"--mem-pool-size: {item!r}", _UNITS[unit.upper() or "M"])
        if pool := _MEMORY_POOLS[name.lower()]:
            pools[pool] = size
        else:
            workspace = size
    return workspace, pools


def _positive(amount: float, where: str, unit: int = 2**20) -> int:
    if not (math.isfinite(amount) and int(amount * unit) >= 1):
        raise typer.BadParameter(f"{where}: expected more than 0")
    return int(amount * unit)


def _tactic_sources(text: str) -> list[str] | None:
    """`A,B` lists the sources; `-A` and `+A` change TensorRT's default, which is both."""
    items = [item.strip().upper() for item in text.split(",") if item.strip()]
    if not items:
        return None
    signed = [item for item in items if item[0] in "+-"]
    if signed and len(signed) != len(items):
        raise typer.BadParameter("--tactic-sources: give either a list, or + or - before every name")
    removed = {item[1:] for item in signed if item[0] == "-"}
    for name in [item.lstrip("+") for item in items if item[0] != "-"]:
        if name in ("CUBLAS", "CUBLAS_LT", "CUDNN"):
            known = ", ".join(TACTIC_SOURCES)
            raise typer.BadParameter(f"--tactic-sources: TensorRT 11 removed {name}; it has {known}")
    if not signed:
        return items
    added = [item[1:] for item in signed if item[0] == "+"]
    return [name for name in dict.fromkeys([*TACTIC_SOURCES, *added]) if name not in removed]


def _sparsity(text: str) -> bool:
    if text == "force":
        raise typer.BadParameter("--sparsity force would overwrite the model's weights, so it is not done; see enable")
    if text not in ("", "enable", "disable"):
        raise typer.BadParameter(f"--sparsity is {text!r}; expected enable or disable")
    return text == "enable"


def _compatibility(text: str) -> str:
    return _COMPATIBILITY.get(text.lower(), text.lower()) or "none"


def _weights(*, refit: bool, stripped: bool) -> str:
    return "stripped" if stripped else "refittable" if refit else "included"
