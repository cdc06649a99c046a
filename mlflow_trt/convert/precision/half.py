"""fp16 and bf16: retype the graph, but for the nodes that have a reason to stay in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.shape_inference
from onnx import ModelProto, NodeProto, TensorProto, helper

from mlflow_trt.convert.onnx.graph import FlatModel, allows, consumers_of, outer_names, producers_of, schema_of
from mlflow_trt.convert.onnx.model import copy_of
from mlflow_trt.convert.onnx.weights import WeightFile
from mlflow_trt.convert.precision.ranges import Evidence
from mlflow_trt.convert.precision.report import report_of
from mlflow_trt.convert.precision.sensitivity import HalfFormat, Sensitivity
from mlflow_trt.convert.precision.typed_graph import TypedGraph

_EXACT = frozenset(
    """Abs ArgMax ArgMin Ceil Clip Compress Concat DepthToSpace Dropout Equal Expand Flatten Floor Gather GatherElements
    GatherND GlobalMaxPool Greater GreaterOrEqual Identity IsInf IsNaN Less LessOrEqual Max MaxPool Min Neg NonZero Pad
    ReduceMax ReduceMin Relu Reshape Round ScatterElements ScatterND Shape Sign Size Slice SpaceToDepth Split Squeeze
    Tile TopK Transpose Unsqueeze Where""".split()  # noqa: SIM905  # easier to read than a list of quotes
)
"""Operators that move or choose values without computing new ones: in 16 bits they gain nothing by themselves."""


@dataclass(frozen=True)
class HalfPass:
    """Retypes what may be retyped, and casts where types meet.

    1. A node stays in float32 where `kept` or Sensitivity gives a reason.
    2. A node that only moves values stays too where all around it stay: its neighbours decide.
    3. Every other node takes and gives 16 bits wherever its operator's schema lets it; where it does not (the scales of
       Resize, say), that tensor is float32.
    4. A tensor that is wanted in both types exists in both, and is cast once. Constants are converted, not cast.
    5. Inputs and outputs of the model keep their names and types.
    """

    target: HalfFormat

    def opsets(self, *, has_float16: bool) -> tuple[int, ...]:
        del has_float16  # it is widened first
        return self.target.opsets

    def prepare(self, model: FlatModel, evidence: Evidence) -> Callable[[Mapping[str, str]], TypedGraph]:
        sensitivity = Sensitivity(model, evidence, self.target)
        floats = _float_nodes(model)
        inherent = {node.name: reason for node in floats if (reason := sensitivity.reason(node)) is not None}
        constants = _HalfConstants(model, self.target)
        native = _native_nodes(model, self.target)

        def typed(kept: Mapping[str, str]) -> TypedGraph:
            reasons = inherent | {node.name: kept[node.name] for node in floats if node.name in kept}
            _join_islands(model, reasons)
            changed = frozenset(node.name for node in floats) - reasons.keys()
            proto = _Retyping(model, self.target, reasons, constants).run()
            report = report_of(
                model,
                proto,
                precision=self.target.precision,
                evidence=evidence,
                changed=changed | native,
                type_name=self.target.name,
                kept=reasons,
            )
            emulation = _Retyping(model, self.target, reasons, constants, emulated=True).run()
            return TypedGraph(proto=proto, emulation=emulation, report=report, changed=changed)

        return typed


def _float_nodes(model: FlatModel) -> list[NodeProto]:
    """The nodes that read or write float32."""
    return [
        node for node in model.proto.graph.node if any(model.is_float32(name) for name in (*node.input, *node.output))
    ]


def _native_nodes(model: FlatModel, target: HalfFormat) -> frozenset[str]:
    """The nodes that come in the target's type, and so run in it without a change."""
    return frozenset(
        node.name
        for node in model.proto.graph.node
        if any(model.types.get(name) == target.onnx_type for name in (*node.input, *node.output))
        and not any(model.is_float32(name) for name in (*node.input, *node.output))
    )


def _join_islands(model: FlatModel, reasons: dict[str, str]) -> None:
    """Keep nodes that only move values between float32 neighbours: casting there and back gains nothing."""
    producers, consumers = producers_of(model), consumers_of(model)
    movers = [node for node in _float_nodes(model) if node.op_type in _EXACT]

    def is_surrounded(node: NodeProto) -> bool:
        before = [producers.get(name) for name in node.input if model.is_float32(name)]
        after = [reader for name in node.output if model.is_float32(name) for reader in consumers.get(name, ())]
        return all(other is None or other.name in reasons for other in (*before, *after))

    grown = True
    while grown:
        joining = [node.name for node in movers if node.name not in reasons and is_surrounded(node)]
        reasons.update(dict.fromkeys(joining, "it only moves values between nodes that stay in float32"))
        grown = bool(joining)


class _Retyping:
    """One run over the graph. Of every float32 tensor there is the float32 form, the 16-bit form, or both.

    When `emulated`, the 16-bit form is a float32 tensor too, of values that were rounded to 16 bits.
    """

    def __init__(
        self,
        model: FlatModel,
        target: HalfFormat,
        reasons: Mapping[str, str],
        constants: _HalfConstants,
        *,
        emulated: bool = False,
    ) -> None:
        self._model = model
        self._emulated = emulated
        self._target = target
        self._reasons = reasons
        self._constants = constants
        self._nodes: list[NodeProto] = []
        self._initializers: list[TensorProto] = []
        self._halves: dict[str, str] = {}
        self._wide: set[str] = {value.name for value in model.proto.graph.input} | constants.names
        self._taken = set(model.types) | {name for node in model.proto.graph.node for name in node.output}

    def run(self) -> ModelProto:
        source = self._model.proto
        for node in source.graph.node:
            self._add(node)
        for value in source.graph.output:
            if self._model.is_float32(value.name):
                self._as_wide(value.name)
        retyped = ModelProto()
        retyped.CopyFrom(source)
        graph = retyped.graph
        del graph.node[:]
        graph.node.extend(self._nodes)
        del graph.value_info[:]
        used = {name for node in self._nodes for name in (*node.input, *outer_names(node))}
        used |= {value.name for value in graph.output}
        kept = [tensor for tensor in source.graph.initializer if tensor.name in used]
        del graph.initializer[:]
        graph.initializer.extend([*kept, *self._initializers])
        return retyped

    def _add(self, node: NodeProto) -> None:
        added = copy_of(node)
        schema = schema_of(node, self._model.opset)
        if node.name in self._reasons or schema is None:  # None: it has no floats, or a reason
            for name in {*node.input, *outer_names(node)}:
                self._as_wide(name)
            self._wide.update(node.output)
            self._nodes.append(added)
            return
        for position, name in enumerate(node.input):
            if allows(schema, position, output=False, type_name=self._target.type_name):
                added.input[position] = self._as_half(name)
            else:
                self._as_wide(name)
        _take_type_from_scale(added)
        narrow = self._narrow_outputs(added, schema)
        for position, name in enumerate(node.output):
            if name in narrow:
                added.output[position] = self._new_half(name)
            else:
                self._wide.add(name)
        self._nodes.append(added)
        if self._emulated:
            self._round_outputs(added, node)

    def _narrow_outputs(self, node: NodeProto, schema: onnx.defs.OpSchema) -> set[str]:
        """The outputs that have 16 bits now that the inputs are what they are: onnx knows for each operator."""
        halves = set(self._halves.values())
        types = {
            name: self._target.onnx_type if name in halves else self._model.types.get(name, TensorProto.UNDEFINED)
            for name in node.input
            if name
        }
        known = {name: helper.make_tensor_type_proto(kind, None) for name, kind in types.items() if kind}
        opsets = list(self._model.proto.opset_import)
        try:
            inferred = onnx.shape_inference.infer_node_outputs(schema, node, known, opset_imports=opsets)
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
            return set()
        return {name for name, kind in inferred.items() if kind.tensor_type.elem_type == self._target.onnx_type}

    def _round_outputs(self, added: NodeProto, node: NodeProto) -> None:
        for position, half in enumerate(added.output):
            if half != node.output[position]:
                added.output[position] = f"{half}_exact"
                self._round(f"{half}_exact", half)

    def _as_wide(self, name: str) -> None:
        """Make sure that the float32 form, which has the tensor's own name, exists."""
        if name in self._wide or name not in self._halves:
            return
        self._wide.add(name)
        self._cast(self._halves[name], name, TensorProto.FLOAT)

    def _as_half(self, name: str) -> str:
        """The name of the 16-bit form, which is made where it is missing; the tensor itself where it is no float32."""
        if not self._model.is_float32(name):
            return name
        if name not in self._halves:
            half = self._new_half(name)
            if name in self._constants.names:
                self._add_constant(name, half)
            else:
                self._to_half(name, half)
        return self._halves[name]

    def _new_half(self, name: str) -> str:
        """A name for the 16-bit form of a tensor; the tensor itself where it is no float32."""
        if not self._model.is_float32(name):
            return name
        half = f"{name}_{self._target.name}"
        while half in self._taken:
            half += "_"
        self._taken.add(half)
        self._halves[name] = half
        return half

    def _to_half(self, name: str, half: str) -> None:
        if self._emulated:
            self._round(name, half)
        else:
            self._cast(name, half, self._target.onnx_type)

    def _round(self, name: str, rounded: str) -> None:
        self._cast(name, f"{rounded}_narrow", self._target.onnx_type)
        self._cast(f"{rounded}_narrow", rounded, TensorProto.FLOAT)

    def _cast(self, source: str, target: str, to: int) -> None:
        self._nodes.append(helper.make_node("Cast", [source], [target], name=f"{target}_cast", to=to))

    def _add_constant(self, name: str, half: str) -> None:
        if self._emulated:
            self._initializers.append(self._constants.tensor(name, f"{half}_narrow"))
            self._cast(f"{half}_narrow", half, TensorProto.FLOAT)
        else:
            self._initializers.append(self._constants.tensor(name, half))


def _take_type_from_scale(node: NodeProto) -> None:
    """Take off a DequantizeLinear what would keep its output float32 whatever its scale is."""
    if node.op_type == "DequantizeLinear":
        kept = [copy for copy in node.attribute if copy.name != "output_dtype"]
        if len(kept) != len(node.attribute):
            attributes = [onnx.AttributeProto.FromString(one.SerializeToString()) for one in kept]
            del node.attribute[:]
            node.attribute.extend(attributes)


class _HalfConstants:
    """The float32 constants of a model in 16 bits. Each is converted once, however many graphs are made."""

    def __init__(self, model: FlatModel, target: HalfFormat) -> None:
        self.names = {name for name in model.constants if model.is_float32(name)}
        self._constants = model.constants
        self._target = target
        self._file = WeightFile(model.folder / f"{target.name}.weights")
        self._tensors: dict[str, TensorProto] = {}

    def tensor(self, constant: str, name: str) -> TensorProto:
        if constant not in self._tensors:
            with np.errstate(over="ignore"):
                array = self._constants[constant].astype(self._target.dtype)
            self._tensors[constant] = self._file.add(name, array, self._target.onnx_type)
        named = TensorProto()
        named.CopyFrom(self._tensors[constant])
        named.name = name
        return named
