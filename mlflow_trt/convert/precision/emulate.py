"""A typed model in float32, with every value rounded as the typed model rounds it.

ONNX Runtime's CPU has no kernels for bfloat16, and runs neighbouring float16 nodes in float32, where nothing overflows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from mlflow_trt.convert.onnx.infer import infer_types
from mlflow_trt.convert.onnx.model import copy_of, graphs_below, subgraphs_of
from mlflow_trt.convert.onnx.weights import write_model

_HALVES = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})


def write_emulation(typed: Path, path: Path) -> None:
    """Write the float32 form of a typed model to `path`, in a folder of its own; its weights, if large, beside it.

    It is to be run node by node: a runtime that fuses nodes would round less often.
    """
    model = onnx.load(typed, load_external_data=False)
    write_model(emulate(model, typed.parent), typed.parent, path)


def emulate(model: ModelProto, folder: Path) -> ModelProto:
    """The float32 form of a model whose weights may lie in `folder`.

    1. Of every 16-bit tensor there is the 16-bit form, under its name, and a float32 form of the same values.
    2. Every node reads the float32 form, and what it computes is rounded to the 16-bit form.
    3. Inputs, outputs and initializers of the model stay as they are; those of graphs inside of nodes become float32.
    """
    emulated = ModelProto()
    emulated.CopyFrom(model)
    halves = _halves_of(emulated, folder)
    if halves:
        _Emulation(halves, _free_suffix(halves)).rewrite(emulated.graph, is_main=True)
    return emulated


def _halves_of(model: ModelProto, folder: Path) -> Mapping[str, int]:
    """The 16-bit tensors and their types, also of the graphs inside of nodes: no two in a model share a name."""
    types, _ = infer_types(model, folder)
    for graph in graphs_below(model.graph.node):
        for value in (*graph.input, *graph.output, *graph.value_info):
            types[value.name] = value.type.tensor_type.elem_type
        types.update({tensor.name: tensor.data_type for tensor in graph.initializer})
    return {name: kind for name, kind in types.items() if kind in _HALVES}


def _free_suffix(names: Iterable[str]) -> str:
    suffix = "_wide"
    while any(name.endswith(suffix) for name in names):
        suffix += "_"
    return suffix


class _Emulation:
    """`halves` are the 16-bit tensors and their types; their float32 forms are called the same with a suffix."""

    def __init__(self, halves: Mapping[str, int], suffix: str) -> None:
        self._halves = halves
        self._suffix = suffix

    def rewrite(self, graph: GraphProto, *, is_main: bool) -> None:
        given = [tensor.name for tensor in graph.initializer]
        if is_main:
            given += [value.name for value in graph.input if value.name not in given]
        nodes = [self._widen(name) for name in given if name in self._halves]
        for node in graph.node:
            for inner in subgraphs_of([node]):
                self.rewrite(inner, is_main=False)
            nodes += self._emulated(node)
        del graph.node[:]
        graph.node.extend(nodes)
        del graph.value_info[:]
        if not is_main:
            for value in (*graph.input, *graph.output):
                if value.name in self._halves:
                    value.name = self._wide(value.name)
                    value.type.tensor_type.elem_type = TensorProto.FLOAT

    def _emulated(self, node: NodeProto) -> list[NodeProto]:
        added = copy_of(node)
        rounded = []
        for position, name in enumerate(node.input):
            added.input[position] = self._wide(name)
        for position, name in enumerate(node.output):
            if name in self._halves:
                exact = f"{self._wide(name)}_exact"
                added.output[position] = exact
                rounded += [_cast(exact, name, self._halves[name]), self._widen(name)]
        return [added, *rounded]

    def _wide(self, name: str) -> str:
        return f"{name}{self._suffix}" if name in self._halves else name

    def _widen(self, name: str) -> NodeProto:
        return _cast(name, self._wide(name), TensorProto.FLOAT)


def _cast(source: str, target: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], to=to)
