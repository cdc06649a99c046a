"""Models of flavor sklearn, by skl2onnx."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from mlflow.models import Model

from mlflow_trt.convert.onnx.graph import label_of
from mlflow_trt.convert.onnx.model import MODEL_FILE
from mlflow_trt.core.log import get_logger
from mlflow_trt.errors import OnnxModelError, UnsupportedModelError
from mlflow_trt.registry.sources.exporting import ROWS, Export, Needs, check_exported_inputs, traced_inputs

NEEDS = Needs(extra="sklearn", modules={"sklearn": "scikit-learn", "skl2onnx": "skl2onnx"})
INPUT = "X"

# What TensorRT runs. Of ONNX's operators for classical machine learning it has none: skl2onnx knows how to do without
# these, and TensorRT's parser names what is left.
_OPSETS = {"": 17, "ai.onnx.ml": 3}
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
_AVOIDED = {"LinearRegressor", "LinearClassifier", "Scaler", "Normalizer"}

_log = get_logger(__name__)


def export(model: Model, folder: Path, target: Path) -> Export:
    """Export an estimator that takes numbers: one float32 input, a row for each sample.

    A classifier gives its probabilities, or the scores that it decides by, and not its labels, which TensorRT has no
    operator to look up. Raises OnnxModelError where nothing tells its inputs, or skl2onnx cannot export it, and
    UnsupportedModelError where it computes something that TensorRT cannot.
    """
    import mlflow.sklearn
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages about each other
        estimator = mlflow.sklearn.load_model(str(folder))
        columns = _columns(estimator, model, folder)
        chooses = getattr(estimator, "classes_", None) is not None
        try:
            proto = to_onnx(
                estimator,
                initial_types=[(INPUT, FloatTensorType([None, columns]))],
                target_opset=_OPSETS,
                black_op=_AVOIDED,
                options={"zipmap": False} if chooses else None,
            )
        except Exception as error:  # skl2onnx raises many
            raise OnnxModelError(f"skl2onnx cannot export the model: {str(error).strip() or repr(error)}") from error
    if chooses:
        proto = _scores_only(proto, estimator)
    _check_operators(proto, estimator)
    check_exported_inputs(proto, [INPUT])
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_param = ROWS
    left_out = None
    if chooses:
        classes = ", ".join(map(str, estimator.classes_))
        what = "probabilities" if hasattr(estimator, "predict_proba") else "scores"
        _log.info("TensorRT gives the %s of the classes %s; the labels are left out", what, classes)
        left_out = f"label, the most probable of the classes {classes}"
    onnx.save(proto, target / MODEL_FILE)
    return Export(path=target / MODEL_FILE, modules=NEEDS.modules, left_out=left_out)


def _columns(estimator: Any, model: Model, folder: Path) -> int:
    """How many numbers a row has. Raises UnsupportedModelError for an estimator of text or other things."""
    columns = getattr(estimator, "n_features_in_", None)
    if columns is not None:
        return int(columns)
    steps = [type(step).__name__ for _, step in getattr(estimator, "steps", [])] or [type(estimator).__name__]
    example = model.load_input_example(str(folder))
    try:
        array = np.asarray(example) if example is not None else traced_inputs(model, folder)[0].array
        if array.dtype.kind in "fiub" and array.ndim == 2:
            return int(array.shape[1])
    except OnnxModelError as error:
        if example is None and model.signature is None:
            raise
        _log.debug("%s", error.message)
    raise UnsupportedModelError(
        f"{', '.join(steps)} does not take rows of numbers: TensorRT has no operators for text and categories. Export "
        "the part behind them that computes with numbers, and convert that",
        nodes=steps,
    )


def _scores_only(proto: onnx.ModelProto, estimator: Any) -> onnx.ModelProto:
    """The graph with nothing but the probabilities, or scores, of a classifier as its output."""
    from skl2onnx.helpers.onnx_helper import select_model_inputs_outputs

    scores = [
        value
        for value in proto.graph.output
        if value.type.WhichOneof("value") == "tensor_type" and value.type.tensor_type.elem_type in _FLOATS
    ]
    if len(scores) != 1:
        listing = ", ".join(f"{value.name} ({value.type.WhichOneof('value')})" for value in proto.graph.output)
        raise UnsupportedModelError(
            f"{type(estimator).__name__} gives {listing}: there is no one tensor of scores among it, which is all that "
            "TensorRT could compute",
            nodes=[type(estimator).__name__],
        )
    selected: onnx.ModelProto = select_model_inputs_outputs(proto, scores[0].name)
    selected.graph.output[0].CopyFrom(scores[0])  # with its shape, which the selection forgets
    _remove_unused(selected)
    return selected


def _check_operators(proto: onnx.ModelProto, estimator: Any) -> None:
    """Raise UnsupportedModelError for ONNX's operators for classical machine learning, of which TensorRT has none."""
    nodes = [label_of(node) for node in proto.graph.node if node.domain not in ("", "ai.onnx")]
    others = [value.name for value in proto.graph.output if value.type.WhichOneof("value") != "tensor_type"]
    if nodes or others:
        raise UnsupportedModelError(
            f"{type(estimator).__name__} needs {', '.join([*nodes, *others])}, which TensorRT cannot run: it runs "
            "linear models, neural networks, PCA and scalers, and neither trees nor support vectors nor neighbours",
            nodes=[*nodes, *others],
        )


def _remove_unused(proto: onnx.ModelProto) -> None:
    """Labels are left behind as initializers, and are of a type that TensorRT does not have where they are text."""
    used = {name for node in proto.graph.node for name in node.input}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
