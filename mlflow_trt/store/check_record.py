"""What holds for every record that this package writes, checked for those that it reads.

A record is a file like any other: it may be damaged, or made by somebody else. What it says is found wrong here, and
not when the first request comes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mlflow_trt.core.types import LARGEST_DIMENSION, BatchAxis, ComputeCapability, InputRange, ShapeProfile, TensorSpec
from mlflow_trt.errors import ArtifactError

if TYPE_CHECKING:
    from mlflow_trt.store.record import Record

_LARGEST_FILE = 64 * 2**20
_LONGEST_NAME = 255
"""In bytes: what file systems allow for a part of a path."""
_DTYPES = frozenset({"float32", "float16", "bfloat16", "int8", "uint8", "int32", "int64", "bool", "float64"})

_RELEASE = re.compile(r"\d{1,9}(\.\d{1,9}){0,4}((a|b|rc)\d{1,9})?(\.post\d{1,9})?(\.dev\d{1,9})?")
"""A version as packages have it, all of which `packaging.version` can read: 10.0.0b6, 8.6.1.post1."""


def read_json(file: Path) -> tuple[Any, str]:
    """The content of a file of JSON, and its sha256.

    Raises ArtifactError for what is none, OSError where it cannot be read.
    """
    if file.stat().st_size > _LARGEST_FILE:
        raise ArtifactError(f"{file} is larger than any record, {_LARGEST_FILE >> 20} MiB", path=file)
    content = file.read_bytes()
    try:
        return json.loads(content), hashlib.sha256(content).hexdigest()
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise ArtifactError(f"{file} is damaged ({reason}); download the model again", path=file) from error


def check_record(record: Record, file: Path) -> None:
    """Raise ArtifactError for a record whose parts contradict each other, or that names what cannot be."""
    for name in map(PurePosixPath, files_of(record)):
        if name.is_absolute() or ".." in name.parts:
            raise ArtifactError(f"{file} names {name}, which is outside of the model folder", path=file)
    for model in (record.source, record.typed):
        if model.file not in model.files and not (record.is_engine_only and not model.files):
            raise ArtifactError(f"{file} gives no sha256 for {model.file}, so it is not used", path=file)
    for problems in (_problems_of_files, _problems_of_specs, _problems_of_profiles, _problems_of_engines):
        for problem in problems(record):
            raise ArtifactError(f"{file} is damaged: {problem}; download the model again", path=file)


def files_of(record: Record) -> dict[str, str]:
    """Every file that the record names, and its sha256."""
    files = {**record.source.files, **record.typed.files}
    for engine in record.engines:
        files[engine.file] = engine.sha256
        if engine.kernels is not None:
            files[engine.kernels.file] = engine.kernels.sha256
    if record.golden is not None:
        files[record.golden.file] = record.golden.sha256
    if record.whole is not None:
        files |= record.whole.files
    return files


def _problems_of_files(record: Record) -> Iterator[str]:
    for name, sha256 in files_of(record).items():
        if not name or "\0" in name or any(len(_utf8(part)) > _LONGEST_NAME for part in name.split("/")):
            yield f"{name[:80]!r} cannot be the name of a file"
        elif not re.fullmatch(r"[0-9a-f]{64}", sha256):
            yield f"the sha256 of {name} is {sha256[:80]!r}"


def _problems_of_specs(record: Record) -> Iterator[str]:
    if not record.outputs:
        yield "there is no output"
    for role, specs in (("input", record.inputs), ("output", record.outputs)):
        for name, count in Counter(spec.name for spec in specs).items():
            if count > 1:
                yield f"there are two {role}s {name!r}"
        for spec in specs:
            yield from _problems_of_spec(role, spec)


def _problems_of_spec(role: str, spec: TensorSpec) -> Iterator[str]:
    if not _utf8(spec.name):
        yield f"an {role} has the name {spec.name!r}"
    if spec.dtype not in _DTYPES:
        yield f"the {role} {spec.name!r} is of the unknown dtype {spec.dtype[:80]!r}"
    if len(spec.shape) > 8 or not all(0 <= dim <= LARGEST_DIMENSION for dim in spec.shape if isinstance(dim, int)):
        yield f"the {role} {spec.name!r} has the shape {str(spec.shape)[:80]}"


def _problems_of_profiles(record: Record) -> Iterator[str]:
    inputs = {spec.name: spec for spec in record.inputs}
    for number, profile in enumerate(record.profiles):
        for name, limits in profile.ranges.items():
            if name not in inputs:
                yield f"profile {number}: there is no input {name!r}"
            elif not _is_range(limits) or (not limits.is_values and not _fits(limits, inputs[name])):
                yield f"profile {number}: the range of {name!r} is {str(limits)[:80]}"
    if record.batch_axis is not None:
        yield from _problems_of_batch(record.batch_axis, inputs, record.profiles)


def _problems_of_batch(
    axis: BatchAxis, inputs: Mapping[str, TensorSpec], profiles: Iterable[ShapeProfile]
) -> Iterator[str]:
    if not axis.inputs:
        yield "the batch axis is that of no input"
    for name in axis.inputs:
        if name not in inputs or not inputs[name].shape:
            yield f"the batch axis is that of {name!r}, which is no input with dimensions"
        for number, profile in enumerate(profiles):
            if name not in profile.ranges or profile.ranges[name].is_values:
                yield f"profile {number} has no range for {name!r}, whose axis 0 is the batch axis"


def _is_range(limits: InputRange) -> bool:
    return len(limits.min) == len(limits.opt) == len(limits.max) and all(
        low <= usual <= high for low, usual, high in zip(limits.min, limits.opt, limits.max, strict=True)
    )


def _fits(limits: InputRange, spec: TensorSpec) -> bool:
    return len(limits.min) == len(spec.shape) and all(
        low >= 0 and high <= LARGEST_DIMENSION and (fixed is None or low == high == fixed)
        for low, high, fixed in zip(limits.min, limits.max, spec.fixed, strict=True)
    )


def _problems_of_engines(record: Record) -> Iterator[str]:
    for engine in record.engines:
        if not _RELEASE.fullmatch(engine.version):
            yield f"{engine.file} was built by {engine.version[:80]!r}, which is no release"
        for target in engine.compute_capabilities:
            try:
                ComputeCapability.parse(target)
            except ValueError as error:
                yield str(error)


def _utf8(name: str) -> bytes:
    """The bytes of a name; more than any file has for one with a lone surrogate, which JSON can write."""
    try:
        return name.encode()
    except UnicodeEncodeError:
        return b"?" * (_LONGEST_NAME + 1)
