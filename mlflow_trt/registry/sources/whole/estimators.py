"""Estimators of scikit-learn as whole models: they answer what `predict` answers, labels of classifiers included."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from mlflow import pyfunc
from mlflow.models import Model

from mlflow_trt.core.whole_model import NetworkCall, NetworkKind
from mlflow_trt.errors import UnsupportedModelError
from mlflow_trt.flavor.whole.loading import load_impl
from mlflow_trt.flavor.whole.package import WholeSource
from mlflow_trt.registry.sources import sklearn
from mlflow_trt.registry.sources.whole.convert import OpenedWhole, WholeOptions
from mlflow_trt.registry.sources.whole.examples import inputs_of, variations

SKLEARN = "sklearn"


def open_estimator(model: Model, folder: Path, target: Path, options: WholeOptions) -> OpenedWhole:
    """Export an estimator, and see what it answers to its input example.

    Raises UnsupportedModelError for a classifier without probabilities, whose labels no engine's output tells, and for
    a model that was logged with another `pyfunc_predict_fn`.
    """
    export = sklearn.export(model, folder, target)
    conf = model.flavors[pyfunc.FLAVOR_NAME]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages about each other
        impl = load_impl(folder, conf.get(pyfunc.MODEL_CONFIG) or {})
        estimator = impl.sklearn_model
        _check(estimator, conf.get("predict_fn", "predict"))
        face = pyfunc.PyFuncModel(model_meta=model, model_impl=impl)
        examples = [(one, face.predict(one)) for one in variations(inputs_of(model, folder, options.data))]
    outputs = [value.name for value in onnx.load(export.path, load_external_data=False).graph.output]
    dtype = str(np.asarray(examples[0][1]).dtype)  # as that of its own input example, which the signature describes
    call = NetworkCall(
        kind=NetworkKind.SKLEARN, inputs=(sklearn.INPUT,), outputs=tuple(outputs), constants={"dtype": dtype}
    )
    return OpenedWhole(
        source=WholeSource(
            folder=folder,
            flavor=SKLEARN,
            network="sklearn_model",
            call=call,
            config=conf.get(pyfunc.MODEL_CONFIG) or {},
            examples=tuple(examples),
            answers_its_example=options.data is None,
        ),
        export=type(export)(path=export.path, modules=export.modules),  # nothing is left out
        shapes=(),
        samples=[{sklearn.INPUT: np.asarray(one, np.float32)} for one, _ in examples],
    )


def _check(estimator: Any, predict_fn: str) -> None:
    name = type(estimator).__name__
    if predict_fn != "predict":
        raise UnsupportedModelError(
            f"the model answers with {predict_fn}; as a whole it is converted with predict alone"
        )
    if getattr(estimator, "classes_", None) is not None and not hasattr(estimator, "predict_proba"):
        raise UnsupportedModelError(
            f"{name} gives no probabilities (predict_proba), from which its labels would follow"
        )
