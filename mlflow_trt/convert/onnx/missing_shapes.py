"""The shapes of outputs that a model declares none for: some exporters leave them out."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.shape_inference
from google.protobuf.message import EncodeError
from onnx import ModelProto, ValueInfoProto, helper

from mlflow_trt.backends.onnxruntime_process import IsolatedModel
from mlflow_trt.errors import ExecutionError, MissingDependencyError


def add_missing_shapes(proto: ModelProto, path: Path) -> bool:
    """Give the outputs of the model at `path` the types and shapes that onnx infers, or else ONNX Runtime, in place.

    Whether there was anything to do. What neither knows stays as it is.
    """
    if not any(map(_lacks_shape, proto.graph.output)):
        return False
    for infer in (_infer_by_onnx, _ask_onnxruntime):
        if any(map(_lacks_shape, proto.graph.output)):
            known = infer(proto, path)
            for value in filter(_lacks_shape, proto.graph.output):
                if value.name in known:
                    value.type.CopyFrom(known[value.name].type)
    return True


def _lacks_shape(value: ValueInfoProto) -> bool:
    """Whether it is a tensor of which not even the number of dimensions is known, or nothing is said of it."""
    kind = value.type.WhichOneof("value")
    return kind is None or (kind == "tensor_type" and not value.type.tensor_type.HasField("shape"))


def _infer_by_onnx(proto: ModelProto, path: Path) -> dict[str, ValueInfoProto]:
    del path
    try:
        outputs = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph.output
    except (onnx.shape_inference.InferenceError, EncodeError, ValueError):
        return {}
    return {value.name: value for value in outputs if not _lacks_shape(value)}


def _ask_onnxruntime(proto: ModelProto, path: Path) -> dict[str, ValueInfoProto]:
    """Those with a dimension at least: ONNX Runtime says of what it does not know what it says of a scalar."""
    del proto
    try:
        asked = IsolatedModel(path, optimize=False)
    except (ExecutionError, MissingDependencyError):
        return {}
    types = asked.output_types
    return {
        name: helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)
        for name, shape in asked.output_shapes.items()
        if shape and (dtype := types[name]) is not None
    }
