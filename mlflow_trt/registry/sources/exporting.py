"""What the exporters share: the inputs of an MLflow model as arrays to trace it with, and what they report."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
from mlflow.models import Model

from mlflow_trt.core.optional import is_installed
from mlflow_trt.errors import MissingDependencyError, OnnxModelError

ROWS = "rows"
"""The name of an exported axis 0 that varies. Not `batch`: whether its rows are independent, only `batch=` says."""


@dataclass(frozen=True, kw_only=True)
class TracedInput:
    """An input: its name where one is known, an array of its dtype, and the axes that vary.

    `axis_names` names axes that are one and the same in all inputs, and `unknown` are those that vary and whose size in
    `array` is of no meaning.
    """

    name: str | None
    array: npt.NDArray[Any]
    varying: tuple[int, ...]
    axis_names: Mapping[int, str] = field(default_factory=lambda: {0: ROWS})
    unknown: tuple[int, ...] = ()

    def with_larger_axes(self, *, but: int | None = None) -> npt.NDArray[Any]:
        """The array with more than one element along every axis that varies: exporters take a size of 1 for fixed."""
        array = self.array
        for axis in self.varying:
            if axis < array.ndim and array.shape[axis] == 1 and axis != but:
                array = np.repeat(array, 2, axis)
        return np.asarray(array, order="C")

    def with_size(self, size: int) -> TracedInput:
        """With this size along every axis of unknown size."""
        array = self.array
        for axis in self.unknown:
            array = np.repeat(array.take([0], axis), size, axis)
        return replace(self, array=array, unknown=())


@dataclass(frozen=True, kw_only=True)
class Export:
    """The ONNX file that an exporter wrote, the modules that made it, and the outputs of the source that it lacks."""

    path: Path
    modules: Iterable[str]
    left_out: str | None = None

    def lineage(self, flavor: str) -> dict[str, str]:
        made_by = ", ".join(f"{name} {importlib.import_module(name).__version__}" for name in self.modules)
        facts = {"flavor": flavor, "exporter": made_by, "chain": f"{flavor} → ONNX ({made_by}) → typed → engine"}
        return facts if self.left_out is None else {**facts, "left_out": self.left_out}


class Exporter(Protocol):
    """Writes an MLflow model as an ONNX file into `target`."""

    def __call__(self, model: Model, folder: Path, target: Path) -> Export: ...


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The modules that an exporter imports, and the extra of this package that brings them."""

    extra: str
    modules: Mapping[str, str] = field(default_factory=dict)

    def check(self, source: str) -> None:
        """Raise MissingDependencyError, with the line that installs them, where one is not installed."""
        missing = [package for module, package in self.modules.items() if not is_installed(module)]
        if missing:
            raise MissingDependencyError(
                f"{source} is a model of flavor {self.extra}; exporting it to ONNX needs {', '.join(missing)}: "
                f"`pip install 'mlflow-trt[{self.extra}]'`",
                packages=missing,
            )


def traced_inputs(model: Model, folder: Path) -> list[TracedInput]:
    """The inputs that the model's signature describes, filled from its input example.

    An axis varies where the signature has -1. Without a signature, axis 0 of the example does. Raises OnnxModelError
    where neither tells the inputs.
    """
    arrays = _arrays(model, folder)
    specs = _specs(model)
    if specs is None and arrays is None:
        raise OnnxModelError(
            "the model has neither an input example nor a signature, and one of them has to tell the shapes of its "
            "inputs; log it again with input_example="
        )
    if specs is None:
        return [TracedInput(name=name, array=array, varying=(0,)) for name, array in arrays or []]
    if arrays is None:
        return [_without_example(*spec) for spec in specs]
    if len(arrays) != len(specs):
        raise OnnxModelError(f"the signature has {len(specs)} inputs and the input example {len(arrays)}")
    by_name = {name: array for name, array in arrays if name is not None}
    traced = []
    for (name, shape, dtype), (_, array) in zip(specs, arrays, strict=True):
        varying = tuple(axis for axis, size in enumerate(shape) if size == -1)
        given = array if name is None else by_name.get(name, array)
        traced.append(TracedInput(name=name, array=np.asarray(given, dtype, order="C"), varying=varying))
    return traced


_Spec = tuple[str | None, tuple[int, ...], np.dtype[Any]]


def _specs(model: Model) -> list[_Spec] | None:
    schema = model.signature.inputs if model.signature is not None else None
    if schema is None:
        return None
    if schema.is_tensor_spec():
        return [(spec.name, tuple(spec.shape), np.dtype(spec.type)) for spec in schema.inputs]
    kinds = {str(column.type) for column in schema.inputs}
    unusable = kinds - {"DataType.double", "DataType.float", "DataType.integer", "DataType.long", "DataType.boolean"}
    if unusable:
        raise OnnxModelError(f"the signature has columns that are no numbers ({', '.join(sorted(unusable))})")
    # Columns of numbers are what MLflow's flavors make one float array of.
    return [(None, (-1, len(schema.inputs)), np.dtype(np.float32))]


def _arrays(model: Model, folder: Path) -> list[tuple[str | None, npt.NDArray[Any]]] | None:
    example = model.load_input_example(str(folder))
    if example is None:
        return None
    if hasattr(example, "to_numpy"):
        return [(None, example.to_numpy().astype(np.float32))]
    if isinstance(example, Mapping):
        return [(str(name), np.asarray(value)) for name, value in example.items()]
    if isinstance(example, tuple):
        return [(None, np.asarray(value)) for value in example]
    return [(None, np.asarray(example))]


def _without_example(name: str | None, shape: Sequence[int], dtype: np.dtype[Any]) -> TracedInput:
    varying = tuple(axis for axis, size in enumerate(shape) if size == -1)
    array = np.zeros([2 if size == -1 else size for size in shape], dtype)
    return TracedInput(name=name, array=array, varying=varying, unknown=tuple(axis for axis in varying if axis))


def check_exported_inputs(proto: onnx.ModelProto, names: Sequence[str]) -> None:
    """Raise OnnxModelError where an exported graph has other inputs than the model that it was exported from.

    Exporters turn tensors that they did not recognize as constants into inputs, and leave unused inputs out.
    """
    present = {value.name for value in proto.graph.input} - {tensor.name for tensor in proto.graph.initializer}
    more, missing = sorted(present - set(names)), sorted(set(names) - present)
    if more or missing:
        facts = [f"has the further inputs {', '.join(more)}"] * bool(more)
        facts += [f"lacks the inputs {', '.join(missing)}"] * bool(missing)
        raise OnnxModelError(
            f"the exported graph {' and '.join(facts)}, compared with the model's own ({', '.join(names)}); "
            "export the model to ONNX yourself, and convert the ONNX file"
        )
