"""Models of flavor sklearn, by skl2onnx."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
from mlflow.models import Model

from mlflow_trt.convert.onnx.model import MODEL_FILE
from mlflow_trt.core.log import get_logger
from mlflow_trt.errors import OnnxModelError
from mlflow_trt.registry.sources.exporting import ROWS, Export, Needs, traced_inputs

NEEDS = Needs(extra="sklearn", modules={"sklearn": "scikit-learn", "skl2onnx": "skl2onnx"})
INPUT = "X"
PROBABILITIES = "probabilities"

# What TensorRT runs. Of ONNX's operators for classical machine learning it has none: skl2onnx knows how to do without
# these, and TensorRT's parser names what is left.
_OPSETS = {"": 17, "ai.onnx.ml": 3}
_AVOIDED = {"LinearRegressor", "LinearClassifier", "Scaler", "Normalizer"}

_log = get_logger(__name__)


def export(model: Model, folder: Path, target: Path) -> Export:
    """Export an estimator that takes numbers: one float32 input, a row for each sample.

    A classifier gives its probabilities and not its labels, which TensorRT has no operator to look up. Raises
    OnnxModelError where nothing tells its inputs, or skl2onnx cannot export it.
    """
    import mlflow.sklearn
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType
    from skl2onnx.helpers.onnx_helper import select_model_inputs_outputs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages about each other
        estimator = mlflow.sklearn.load_model(str(folder))
        columns = getattr(estimator, "n_features_in_", None)
        if columns is None:
            columns = traced_inputs(model, folder)[0].array.shape[1]
        is_classifier = hasattr(estimator, "predict_proba")
        try:
            proto = to_onnx(
                estimator,
                initial_types=[(INPUT, FloatTensorType([None, columns]))],
                target_opset=_OPSETS,
                black_op=_AVOIDED,
                options={"zipmap": False} if is_classifier else None,
            )
            if is_classifier:
                (probabilities,) = (value for value in proto.graph.output if value.name == PROBABILITIES)
                proto = select_model_inputs_outputs(proto, PROBABILITIES)
                proto.graph.output[0].CopyFrom(probabilities)  # with its shape, which the selection forgets
                _remove_unused(proto)
        except Exception as error:  # skl2onnx raises many
            raise OnnxModelError(f"skl2onnx cannot export the model: {str(error).strip() or repr(error)}") from error
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = ROWS
    left_out = None
    if is_classifier:
        classes = ", ".join(map(str, estimator.classes_))
        _log.info("TensorRT gives the probabilities of the classes %s; the labels are left out", classes)
        left_out = f"label, the most probable of the classes {classes}"
    onnx.save(proto, target / MODEL_FILE)
    return Export(path=target / MODEL_FILE, modules=NEEDS.modules, left_out=left_out)


def _remove_unused(proto: onnx.ModelProto) -> None:
    """Labels are left behind as initializers, and are of a type that TensorRT does not have where they are text."""
    used = {name for node in proto.graph.node for name in node.input}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
