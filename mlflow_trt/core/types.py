"""The nouns: what models, profiles, engines and GPUs are described by.

Plain values without behaviour, importable in a few milliseconds: the engine builder runs in a process of its own and
should not wait for anything it does not use.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

Dim = int | str | None
"""One dimension of an ONNX tensor: fixed, symbolic (named), or unknown."""

Shape = tuple[int, ...]

LARGEST_DIMENSION = 2**31 - 1
"""TensorRT and the libraries below it count with 32 bits in places; nothing real comes near."""


def is_placeholder(dim: Dim) -> bool:
    """Whether a dimension varies without a name that means anything: some exporters write `?` for any unknown."""
    return dim is None or (isinstance(dim, str) and not any(character.isalnum() for character in dim))


class StrEnum(str, enum.Enum):
    """Members that are written as their values, in texts and in JSON: `enum.StrEnum`, which Python 3.10 has not."""

    def __str__(self) -> str:
        return str(self.value)


class Precision(StrEnum):
    """The number formats that an engine may compute in.

    `FP32` is strict: the builder's TF32 flag is cleared. `TF32` sets it, which lets matrix products and convolutions
    round their float32 operands to 10 bits of mantissa. TensorRT-RTX ignores that flag and always behaves like `TF32`.
    `FP16` and `BF16` run in 16 bits every node that tolerates it. `INT8` and `FP8` quantize the operands of matrix
    products and convolutions. `BEST` stands for the fastest of these that is accurate enough; no engine has it.
    """

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"
    BEST = "best"


class CalibrationMethod(StrEnum):
    """How the range of a quantized tensor follows from values seen: from all, the most telling, or 99.999 % of them.

    Source: `onnxruntime.quantization.CalibrationMethod`.
    """

    MINMAX = "minmax"
    ENTROPY = "entropy"
    PERCENTILE = "percentile"


class Distribution(StrEnum):
    """Which TensorRT: the value is the name of the Python module."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt_rtx"

    @property
    def label(self) -> str:
        return {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}[self.value]

    @property
    def requirement(self) -> str:
        """Its name on PyPI."""
        return self.value.replace("_", "-")


class HardwareCompatibility(StrEnum):
    """On which other GPUs an engine of the `tensorrt` distribution may run, at some cost in speed."""

    NONE = "none"
    AMPERE_PLUS = "ampere_plus"
    SAME_COMPUTE_CAPABILITY = "same_compute_capability"


class Weights(StrEnum):
    """Which weights a plan holds, and whether they can be exchanged.

    `STRIPPED` plans hold none that can be put back from the typed model, which is done each time one is loaded.
    """

    INCLUDED = "included"
    REFITTABLE = "refittable"
    STRIPPED = "stripped"


class ProfilingVerbosity(StrEnum):
    """How much an engine tells about its layers."""

    NONE = "none"
    LAYER_NAMES_ONLY = "layer_names_only"
    DETAILED = "detailed"


class ComputeCapability(NamedTuple):
    """What a GPU can execute, for example 8.6; written `sm86`."""

    major: int
    minor: int

    @classmethod
    def parse(cls, text: str) -> ComputeCapability:
        """Read `sm86`, `SM86`, `86` or `8.6`. Raises ValueError for anything else."""
        match = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)", text.strip(), re.IGNORECASE)
        if not match:
            raise ValueError(f"{text!r} is no compute capability; write it like 'sm86' or '8.6'")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"sm{self.major}{self.minor}"


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output. `dtype` is numpy's name for the type, or `bfloat16`."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    @property
    def fixed(self) -> tuple[int | None, ...]:
        """The shape with None for every dimension that may vary."""
        return tuple(dim if isinstance(dim, int) else None for dim in self.shape)

    @property
    def narrowed(self) -> TensorSpec:
        """As a typed model and its engines have it: with float32 in place of float64, which TensorRT has not."""
        return replace(self, dtype="float32") if self.dtype == "float64" else self

    def __str__(self) -> str:
        dims = ", ".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.name}: {self.dtype}[{dims}]"


class Interface(NamedTuple):
    """The inputs and outputs of a model, in their order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class InputRange:
    """What one optimization profile allows for one input: its smallest, usual and largest shape.

    With `is_values`, the numbers are the values of a shape tensor, an integer input of rank 0 or 1 that other shapes
    are computed from, instead of its shape.
    """

    min: Shape
    opt: Shape
    max: Shape
    is_values: bool = False

    @property
    def row(self) -> InputRange:
        """The range of the dimensions but axis 0."""
        return replace(self, min=self.min[1:], opt=self.opt[1:], max=self.max[1:])

    def contains(self, shape: Shape) -> bool:
        return len(shape) == len(self.min) and all(
            low <= dim <= high for low, dim, high in zip(self.min, shape, self.max, strict=True)
        )

    def __str__(self) -> str:
        return ":".join("x".join(map(str, shape)) or "scalar" for shape in (self.min, self.opt, self.max))


@dataclass(frozen=True, kw_only=True)
class ShapeProfile:
    """An optimization profile: the range of every input that may vary."""

    ranges: Mapping[str, InputRange]

    def __str__(self) -> str:
        return ", ".join(f"{name} {limits}" for name, limits in self.ranges.items())


@dataclass(frozen=True, kw_only=True)
class RowDependence:
    """What was measured of rows that depend on each other: how far `output` is off where they do not run together.

    `arrangement` is how they ran instead. `relative_error` is that of the worst row, None where nothing could be
    compared; `problem` then says why.
    """

    output: str | None
    arrangement: str
    relative_error: float | None = None
    problem: str | None = None

    def __str__(self) -> str:
        if self.output is None:
            return f"{self.arrangement}: {self.problem}"
        said = f"is off by {self.relative_error:.2g} (relative error)" if self.problem is None else self.problem
        return f"{self.arrangement}, output {self.output!r} {said}"


@dataclass(frozen=True, kw_only=True)
class BatchAxis:
    """Axis 0 of `inputs` counts rows.

    With `splits`, every output carries the axis too, so that a batch of any size is run in pieces. `declared` tells
    that the user said by `batch=` that rows do not depend on each other; otherwise that was read off the graph and
    measured. `dependence` is what was measured where they do: then only a declared axis `splits`.
    """

    inputs: tuple[str, ...]
    splits: bool
    declared: bool
    dependence: RowDependence | None = None


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as the CUDA driver describes it. `memory` is in bytes."""

    ordinal: int
    name: str
    compute_capability: ComputeCapability
    memory: int
    uuid: str

    def __str__(self) -> str:
        return f"{self.name} ({self.compute_capability})"


@dataclass(frozen=True, kw_only=True)
class KernelsRecord:
    """Kernels that TensorRT-RTX compiled for an engine: the digest of their file, and on what they were compiled.

    They serve GPUs of the same compute capability under the same release of TensorRT-RTX.
    """

    file: str
    sha256: str
    size: int
    gpu: str
    compute_capability: str
    version: str
    driver: str | None = None


@dataclass(frozen=True, kw_only=True)
class PluginLibrary:
    """A library with plugins of TensorRT: the name of its file, without the folder, and its digest."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """How an engine was made, where it runs, and the digest of its plan.

    `compute_capabilities` lists its targets, empty where TensorRT-RTX was left its default: one engine for Ampere and
    every later architecture that this release knows. `gpu` and `driver` are empty where it was built without a GPU.
    `timing_cache` is the sha256 of the timing cache that it was built with, as it was afterwards. `kernels` are those
    that were stored with it. `plugins` are the libraries that were loaded where it was built, which it needs to run.
    """

    file: str
    sha256: str
    size: int
    distribution: Distribution
    version: str
    compute_capabilities: tuple[str, ...] = ()
    hardware_compatibility: HardwareCompatibility = HardwareCompatibility.NONE
    version_compatible: bool = False
    gpu: str | None = None
    driver: str | None = None
    build_seconds: float = 0.0
    weights: Weights = Weights.INCLUDED
    timing_cache: str | None = None
    kernels: KernelsRecord | None = None
    plugins: tuple[PluginLibrary, ...] = ()

    @property
    def is_ampere_plus(self) -> bool:
        """Whether it was built for Ampere and later, not for certain compute capabilities."""
        return not self.compute_capabilities or self.hardware_compatibility is HardwareCompatibility.AMPERE_PLUS

    @property
    def target(self) -> str:
        """The part of its file name that tells where it runs."""
        return "sm80plus" if self.is_ampere_plus else "-".join(self.compute_capabilities)

    def __str__(self) -> str:
        return f"{self.distribution.label} {self.version} for {self.target}"


@dataclass(frozen=True, kw_only=True)
class KeptNode:
    """A node that computes in float32 although the precision is another, and why."""

    name: str
    operator: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What ranges were seen on. `sha256` is the digest of the samples, `method` how ranges follow from them."""

    samples: str
    sha256: str
    method: CalibrationMethod | None = None


@dataclass(frozen=True, kw_only=True)
class PrecisionReport:
    """What a precision pass did to the graph, and why.

    `nodes` counts all nodes, `changed_nodes` those that compute in the precision that was asked for, and `share` is how
    much of the arithmetic with floats these do, 0 to 1; None for fp32 and tf32. `node_types` and
    `weight_types` tell how many nodes that compute with floats, and how many values of weights, are of which type.
    `kept` lists the nodes that stayed in float32, `weight_only` those that compute in float32 with quantized weights.
    `largest` has the tensors with the largest magnitudes seen, and `not_finite` counts what was NaN or infinite there
    and elsewhere. Sizes are in bytes, of the model before and after the
    pass.
    """

    precision: Precision
    nodes: int
    changed_nodes: int = 0
    share: float | None = None
    node_types: Mapping[str, int] = field(default_factory=dict)
    weight_types: Mapping[str, int] = field(default_factory=dict)
    kept: tuple[KeptNode, ...] = ()
    weight_only: tuple[KeptNode, ...] = ()
    largest: Mapping[str, float] = field(default_factory=dict)
    not_finite: Mapping[str, int] = field(default_factory=dict)
    calibration: Calibration | None = None
    size_before: int | None = None
    size_after: int | None = None
    remarks: tuple[str, ...] = field(default=())
