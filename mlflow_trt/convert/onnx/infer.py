"""The types and shapes of the tensors of a graph, from onnx, and from ONNX Runtime where onnx knows an operator not."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.shape_inference
from google.protobuf.message import EncodeError
from onnx import ModelProto, helper

from mlflow_trt.backends.onnxruntime_process import IsolatedModel
from mlflow_trt.errors import ExecutionError

Types = dict[str, int]
Shapes = dict[str, tuple[int | None, ...]]


def infer_types(model: ModelProto, folder: Path) -> tuple[Types, Shapes]:
    """By tensor, the number of its element type and its dimensions; the weights are in files of `folder`.

    onnx knows nothing of what comes after an operator of another domain, such as com.microsoft. ONNX Runtime does.
    """
    types, shapes = _infer_by_onnx(model)
    unknown = [name for node in model.graph.node for name in node.output if name and name not in types]
    if any(node.domain not in ("", "ai.onnx") for node in model.graph.node) and unknown:
        _infer_by_onnxruntime(model, unknown, folder, types, shapes)
    return types, shapes


def _infer_by_onnx(model: ModelProto) -> tuple[Types, Shapes]:
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, EncodeError, ValueError):
        inferred = model
    graph = inferred.graph
    types: Types = {}
    shapes: Shapes = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type:
            tensor = value.type.tensor_type
            types[value.name] = tensor.elem_type
            if tensor.HasField("shape"):
                shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    for constant in graph.initializer:
        types[constant.name] = constant.data_type
        shapes[constant.name] = tuple(constant.dims)
    return types, shapes


def _infer_by_onnxruntime(model: ModelProto, names: list[str], folder: Path, types: Types, shapes: Shapes) -> None:
    exposed = ModelProto()
    exposed.CopyFrom(model)
    for name in names:
        exposed.graph.output.append(helper.make_empty_tensor_value_info(name))
    path = folder / "types.onnx"
    onnx.save_model(exposed, path)
    try:
        asked = IsolatedModel(path, optimize=False)
    except ExecutionError:
        return  # what it cannot run is refused where ranges are looked for
    outputs, sizes = asked.output_types, asked.output_shapes
    for name in names:
        if outputs[name] is not None:
            types[name] = helper.np_dtype_to_tensor_dtype(outputs[name])
            shapes[name] = sizes[name]
