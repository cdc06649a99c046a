"""The recipe: everything the user decides about an engine."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from mlflow_trt.core.types import (
    CalibrationMethod,
    ComputeCapability,
    HardwareCompatibility,
    Precision,
    ProfilingVerbosity,
    Weights,
)
from mlflow_trt.errors import RecipeError

TACTIC_SOURCES = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
"""The tactic sources that TensorRT 10.12 to 11 and TensorRT-RTX all have."""

MEMORY_POOLS = ("tactic_dram", "tactic_shared_memory")
"""The memory pools of TensorRT, besides the workspace, that are not for a DLA."""

_LARGEST = 2**31 - 1  # what TensorRT counts dimensions and iterations with

ShapeTriple = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
ShapeRequest = Mapping[str, ShapeTriple]
"""For each input its smallest, usual and largest shape."""

ShapesRequest = ShapeRequest | Sequence[ShapeRequest]
BatchRequest = int | tuple[int, int, int] | Sequence[int]
_Choice = TypeVar("_Choice", Precision, HardwareCompatibility, CalibrationMethod, Weights, ProfilingVerbosity)


class BatchRange(NamedTuple):
    """The smallest, usual and largest number of rows that the engine is built for."""

    min: int
    opt: int
    max: int

    def __str__(self) -> str:
        return str(self.max) if self.min == self.max else f"{self.min}:{self.opt}:{self.max}"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything the user decides about an engine. Values are checked and brought into one form when it is made.

    Args:
        precision: `fp32` (strict: the TF32 flag is cleared), `tf32`, `fp16`, `bf16`, `int8` or `fp8`; `best` for the
            fastest of these that is accurate enough, measured on the GPU of this machine.
        keep_float32: nodes, by name or by operator, that stay in float32 whatever the precision is.
        calibration_method: how int8 and fp8 derive the range of a tensor from what was seen: `minmax` (all of it),
            `entropy` (where most is told) or `percentile` (99.999 % of it).
        batch: how many rows, along axis 0 of the inputs: a number for a static batch, (min, opt, max) for a range, or
            None to take it from the model.
        shapes: for inputs with other axes that vary, the (min, opt, max) shapes; a list of such mappings makes several
            optimization profiles. A -1 in a shape is filled in from `batch` or the model. For a shape tensor (an
            integer input that other shapes are computed from) the numbers are its values.
        workspace_bytes: upper limit of the memory that a layer may use temporarily; None leaves TensorRT's default,
            the whole GPU.
        optimization_level: 0 (build fast) to 5 (search longest); None leaves TensorRT's default, 3.
        avg_timing_iterations: how often TensorRT times each candidate kernel; None leaves its default, 1.
        timing_cache: path of a timing cache that speeds up later builds; created where missing, and shared: what
            several builds learn at the same time is merged. TensorRT-RTX has none.
        builder_cache: whether TensorRT remembers timings while it builds; False is trtexec's `--noBuilderCache`.
        memory_pools: upper limits in bytes of `tactic_dram` and `tactic_shared_memory`.
        allow_tf32: whether layers that compute in float32 may round as TF32 does. `fp32` never lets them; with other
            precisions False keeps strict what is left in float32. TensorRT-RTX ignores it.
        sparsity: use the kernels for weights of which two of four are zero, where the weights are like that. Nothing is
            set to zero for it.
        weights: `included`; `refittable`, for tools that exchange them; or `stripped`: the plan holds none of those
            that can be put back from the stored model, which is done each time the engine is loaded.
        weight_streaming: let weights that do not fit on the GPU stay in host memory.
        profiling_verbosity: `layer_names_only`, `detailed` for `mlflow-trt inspect --layers`, or `none`.
        tactic_sources: which of `EDGE_MASK_CONVOLUTIONS` and `JIT_CONVOLUTIONS` to draw kernels from; None for the
            default.
        version_compatible: let later minor releases of the same TensorRT major version load the engine. Not for
            TensorRT-RTX.
        hardware_compatibility: `none`, `ampere_plus` or `same_compute_capability`: on which other GPUs an engine of
            the `tensorrt` distribution may run.
        plugins: libraries with plugins of TensorRT, which run the model's custom operators. They are loaded where the
            engine is built; whoever loads the model names them again. Not for TensorRT-RTX, which has no plugins.
        targets: compute capabilities to build for, such as `["sm86", "sm120"]`. TensorRT-RTX only; TensorRT builds for
            the GPU it runs on.

    Raises:
        RecipeError: a value is unknown, out of range or contradicts another one.
    """

    precision: Precision = Precision.FP32
    keep_float32: tuple[str, ...] = ()
    calibration_method: CalibrationMethod = CalibrationMethod.MINMAX
    batch: BatchRange | None = None
    shapes: tuple[ShapeRequest, ...] = ()
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    avg_timing_iterations: int | None = None
    timing_cache: str | None = None
    builder_cache: bool = True
    memory_pools: Mapping[str, int] = field(default_factory=dict)
    allow_tf32: bool = True
    sparsity: bool = False
    weights: Weights = Weights.INCLUDED
    weight_streaming: bool = False
    profiling_verbosity: ProfilingVerbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
    tactic_sources: tuple[str, ...] | None = None
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = HardwareCompatibility.NONE
    plugins: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    if TYPE_CHECKING:
        # What may be passed is wider than what is kept: __post_init__ brings it into the form declared above.
        def __init__(
            self,
            *,
            precision: Precision | str = ...,
            keep_float32: Sequence[str] | str = ...,
            calibration_method: CalibrationMethod | str = ...,
            batch: BatchRequest | None = ...,
            shapes: ShapesRequest = ...,
            workspace_bytes: int | None = ...,
            optimization_level: int | None = ...,
            avg_timing_iterations: int | None = ...,
            timing_cache: str | os.PathLike[str] | None = ...,
            builder_cache: bool = ...,
            memory_pools: Mapping[str, int] = ...,
            allow_tf32: bool = ...,
            sparsity: bool = ...,
            weights: Weights | str = ...,
            weight_streaming: bool = ...,
            profiling_verbosity: ProfilingVerbosity | str = ...,
            tactic_sources: Sequence[str] | None = ...,
            version_compatible: bool = ...,
            hardware_compatibility: HardwareCompatibility | str = ...,
            plugins: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] = ...,
            targets: Sequence[str] | str = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        normal: dict[str, Any] = {
            "precision": _choice(Precision, self.precision, "precision"),
            "keep_float32": _names(self.keep_float32, "keep_float32"),
            "calibration_method": _choice(CalibrationMethod, self.calibration_method, "calibration_method"),
            "batch": _batch(self.batch),
            "shapes": _shapes(self.shapes),
            "tactic_sources": _tactic_sources(self.tactic_sources),
            "hardware_compatibility": _choice(
                HardwareCompatibility, self.hardware_compatibility, "hardware_compatibility"
            ),
            "plugins": _paths(self.plugins, "plugins"),
            "targets": _targets(self.targets),
            "workspace_bytes": _number("workspace_bytes", self.workspace_bytes, 1, None),
            "optimization_level": _number("optimization_level", self.optimization_level, 0, 5),
            "avg_timing_iterations": _number("avg_timing_iterations", self.avg_timing_iterations, 1, _LARGEST),
            "timing_cache": _path("timing_cache", self.timing_cache),
            "builder_cache": bool(self.builder_cache),
            "memory_pools": _memory_pools(self.memory_pools),
            "allow_tf32": bool(self.allow_tf32),
            "sparsity": bool(self.sparsity),
            "weights": _choice(Weights, self.weights, "weights"),
            "weight_streaming": bool(self.weight_streaming),
            "profiling_verbosity": _choice(ProfilingVerbosity, self.profiling_verbosity, "profiling_verbosity"),
            "version_compatible": bool(self.version_compatible),
        }
        for name, value in normal.items():
            object.__setattr__(self, name, value)
        self._check_together()

    def _check_together(self) -> None:
        if self.precision is Precision.TF32 and not self.allow_tf32:
            raise RecipeError(
                "precision='tf32' and allow_tf32=False contradict each other; choose precision='fp32'",
                option="allow_tf32",
            )
        if self.timing_cache is not None and not self.builder_cache:
            raise RecipeError(
                "timing_cache= needs the builder's cache; leave builder_cache=False out", option="builder_cache"
            )
        if self.weight_streaming and self.weights is not Weights.INCLUDED:
            raise RecipeError(
                f"weight_streaming=True is for weights='included', not for {self.weights}: choose one of the two",
                option="weight_streaming",
            )

    @classmethod
    def of(
        cls,
        recipe: Recipe | None = None,
        *,
        precision: Precision | str | None = None,
        batch: BatchRequest | None = None,
        shapes: ShapesRequest | None = None,
        targets: Sequence[str] | str | None = None,
    ) -> Recipe:
        """The recipe that the keywords of `save_model` and `log_model` describe.

        Raises RecipeError where both a recipe and one of the keywords that it holds are given.
        """
        given: dict[str, Any] = {"precision": precision, "batch": batch, "shapes": shapes, "targets": targets}
        given = {name: value for name, value in given.items() if value is not None}
        if recipe is None:
            return cls(**given)
        if not isinstance(recipe, Recipe):
            raise RecipeError(f"recipe is a {type(recipe).__name__}; expected a mlflow_trt.Recipe", option="recipe")
        if given:
            raise RecipeError(
                f"both recipe= and {', '.join(name + '=' for name in given)} were given; put everything in the recipe",
                option=next(iter(given)),
            )
        return recipe


def _choice(enumeration: type[_Choice], value: Any, option: str) -> _Choice:
    try:
        return enumeration(value)
    except ValueError:
        known = ", ".join(str(member) for member in enumeration)
        raise RecipeError(f"unknown {option} {value!r}; choose one of {known}", option=option) from None


def _names(value: Any, option: str) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value) if _is_iterable(value) else ()
    if not all(isinstance(name, str) and name for name in names) or (value and not names):
        raise RecipeError(f"{option} is {value!r}; expected names of nodes or operators", option=option)
    return names


def _batch(value: Any) -> BatchRange | None:
    if value is None:
        return None
    numbers = (value,) * 3 if _is_int(value) else tuple(value) if _is_iterable(value) else ()
    if len(numbers) != 3 or not all(map(_is_int, numbers)):
        raise RecipeError(f"batch is {value!r}; expected a number, or (min, opt, max)", option="batch")
    batch = BatchRange(*map(int, numbers))
    if not 1 <= batch.min <= batch.opt <= batch.max <= _LARGEST:
        raise RecipeError(f"batch is {tuple(batch)}; expected 1 <= min <= opt <= max < 2**31", option="batch")
    return batch


def _shapes(value: Any) -> tuple[ShapeRequest, ...]:
    profiles = [value] if isinstance(value, Mapping) else value
    if not isinstance(profiles, Sequence) or not all(isinstance(profile, Mapping) for profile in profiles):
        raise RecipeError(
            f"shapes is {value!r}; expected {{input: (min, opt, max)}} with three shapes, or a list of such mappings",
            option="shapes",
        )
    return tuple({str(name): _triple(name, triple) for name, triple in profile.items()} for profile in profiles)


def _triple(name: str, value: Any) -> ShapeTriple:
    usable = isinstance(value, Sequence) and len(value) == 3 and all(isinstance(shape, Sequence) for shape in value)
    if not usable or not all(_is_int(dim) for shape in value for dim in shape):
        raise RecipeError(
            f"shapes[{name!r}] is {value!r}; expected three shapes (min, opt, max), "
            "for example ((1, 3, 32, 32), (1, 3, 640, 640), (4, 3, 960, 960))",
            option="shapes",
        )
    low, usual, high = (tuple(int(dim) for dim in shape) for shape in value)
    if not len(low) == len(usual) == len(high):
        raise RecipeError(
            f"shapes[{name!r}]: min {low}, opt {usual} and max {high} differ in their number of dimensions",
            option="shapes",
        )
    return low, usual, high


def _tactic_sources(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    items = [value] if isinstance(value, str) or not _is_iterable(value) else value
    names = tuple(str(name).upper() for name in items)
    unknown = [name for name in names if name not in TACTIC_SOURCES]
    if unknown:
        raise RecipeError(
            f"unknown tactic source {unknown[0]!r}; TensorRT 11 and TensorRT-RTX have {', '.join(TACTIC_SOURCES)}",
            option="tactic_sources",
        )
    return names


def _targets(value: Any) -> tuple[str, ...]:
    items: Iterable[Any] = [value] if isinstance(value, str) or not _is_iterable(value) else value
    try:
        targets = {ComputeCapability.parse(str(item)) for item in items}
    except ValueError as error:
        raise RecipeError(f"targets: {error}", option="targets") from None
    return tuple(str(target) for target in sorted(targets))


def _memory_pools(value: Any) -> dict[str, int]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"memory_pools is {value!r}; expected {{pool: bytes}}", option="memory_pools")
    unknown = [name for name in value if name not in MEMORY_POOLS]
    if unknown:
        raise RecipeError(
            f"unknown memory pool {unknown[0]!r}; there are {', '.join(MEMORY_POOLS)}, and workspace_bytes= for the "
            "workspace. The pools of a DLA are not supported",
            option="memory_pools",
        )
    return {name: _number("memory_pools", size, 1, None) or 0 for name, size in value.items()}


def _paths(value: Any, option: str) -> tuple[str, ...]:
    items = [value] if isinstance(value, (str, os.PathLike)) or not _is_iterable(value) else value
    paths = [path for item in items if (path := _path(option, item)) is not None]
    return tuple(dict.fromkeys(paths))


def _path(option: str, value: Any) -> str | None:
    if value is None:
        return None
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(path, str) or not path or "\0" in path:
        raise RecipeError(f"{option} is {value!r}; expected the path of a file", option=option)
    return path


def _number(option: str, value: Any, low: int, high: int | None) -> int | None:
    if value is None:
        return None
    if not _is_int(value) or not low <= value <= (2**63 - 1 if high is None else high):
        limits = f"{low} or more" if high is None else f"{low} to {high}"
        raise RecipeError(f"{option} is {value!r}; expected {limits}", option=option)
    return int(value)


def _is_int(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _is_iterable(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str)
