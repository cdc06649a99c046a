"""Models of flavor tensorflow or keras, by tf2onnx: Keras models, and modules of TensorFlow 2 that can be called."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
from mlflow.models import Model

from mlflow_trt.convert.onnx.model import MODEL_FILE
from mlflow_trt.errors import OnnxModelError
from mlflow_trt.registry.sources.exporting import (
    ROWS,
    Export,
    Needs,
    TracedInput,
    check_exported_inputs,
    traced_inputs,
)

NEEDS = Needs(extra="tensorflow", modules={"tensorflow": "tensorflow", "tf2onnx": "tf2onnx"})
_OPSET = 17


def export(model: Model, folder: Path, target: Path) -> Export:
    """Export the model for inference. Its code runs here, as it does wherever MLflow loads such a model.

    Raises OnnxModelError where nothing tells its inputs, or tf2onnx cannot export it.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    inputs = traced_inputs(model, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages about each other
        import tensorflow as tf
        import tf2onnx

        loaded = _load(model, folder)
        names = [traced.name or ("input" if len(inputs) == 1 else f"input_{n}") for n, traced in enumerate(inputs)]
        specs = [_spec(tf, name, traced) for name, traced in zip(names, inputs, strict=True)]

        def call(*tensors: Any) -> Any:
            if len(tensors) == 1 and inputs[0].name is None:
                return loaded(tensors[0])
            return loaded(dict(zip(names, tensors, strict=True)))

        try:
            function = tf.function(call, input_signature=specs)
            captured = _find_captured(tf, function.get_concrete_function(*specs))
            proto, _ = tf2onnx.convert.from_function(function, input_signature=specs, opset=_OPSET)
        except Exception as error:  # TensorFlow raises many
            raise OnnxModelError(f"tf2onnx cannot export the model: {str(error).strip() or repr(error)}") from error
    _restore_captured(proto, captured)
    check_exported_inputs(proto, names)
    _name_rows(proto, [name for name, traced in zip(names, inputs, strict=True) if 0 in traced.varying])
    onnx.save(proto, target / MODEL_FILE)
    return Export(path=target / MODEL_FILE, modules=NEEDS.modules)


def _load(model: Model, folder: Path) -> Any:
    if "tensorflow" in model.flavors:
        import mlflow.tensorflow

        return mlflow.tensorflow.load_model(str(folder))
    import mlflow.keras

    return mlflow.keras.load_model(str(folder))


def _spec(tf: Any, name: str, traced: TracedInput) -> Any:
    shape = [None if axis in traced.varying else size for axis, size in enumerate(traced.array.shape)]
    return tf.TensorSpec(shape, traced.array.dtype, name=name)


def _find_captured(tf: Any, concrete: Any) -> dict[str, npt.NDArray[Any]]:
    """Tensors from outside of the function, such as the mean that a layer normalizes by, by their names in its graph.

    Variables are no such tensors: tf2onnx makes constants of them by itself.
    """
    return {
        inner.name: outer.numpy()
        for outer, inner in concrete.graph.captures
        if outer.dtype not in (tf.resource, tf.variant)
    }


def _restore_captured(proto: onnx.ModelProto, captured: Mapping[str, npt.NDArray[Any]]) -> None:
    """Make constants of captured tensors, of which tf2onnx makes inputs."""
    inputs = [value for value in proto.graph.input if value.name not in captured]
    found = [value.name for value in proto.graph.input if value.name in captured]
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(captured[name], name) for name in found)
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)


def _name_rows(proto: onnx.ModelProto, varying: Sequence[str]) -> None:
    """tf2onnx gives every axis that varies a name of its own; axis 0 of inputs and outputs is one and the same."""
    leading = {value.name: value.type.tensor_type.shape.dim for value in proto.graph.input}
    for dims in (*(leading[name] for name in varying), *(v.type.tensor_type.shape.dim for v in proto.graph.output)):
        if varying and dims and not dims[0].HasField("dim_value"):
            dims[0].dim_param = ROWS
