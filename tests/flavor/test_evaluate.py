"""`mlflow.models.evaluate` on a model before it is converted, and after."""

from __future__ import annotations

import mlflow
import networks
import numpy as np
import pandas as pd
import pytest
from mlflow.models import infer_signature
from onnx import helper
from sklearn.linear_model import LinearRegression

import mlflow_trt

CPU = {"runtime": "onnxruntime"}
COLUMNS = ["a", "b", "c", "d"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:(?s).*integer column:UserWarning"),  # of MLflow about a target of labels
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's use of pandas, in many places
]


def linear(node, width, dtype, row):
    """x @ w, and what one more node makes of it."""
    weights = np.random.default_rng(5).standard_normal((4, width)).astype(np.float32)
    return networks.model(
        [helper.make_node("MatMul", ["x", "w"], ["scores"]), node],
        [networks.value("x", networks.FLOAT, ["batch", 4])],
        [networks.value("y", dtype, ["batch", *row])],
        [networks.constant("w", weights)],
    )


def regressor():
    return linear(helper.make_node("Neg", ["scores"], ["y"]), 1, networks.FLOAT, [1])


def classifier():
    node = helper.make_node("ArgMax", ["scores"], ["y"], axis=1, keepdims=1)
    return linear(node, 3, networks.INT64, [1])


@pytest.fixture
def rows():
    return pd.DataFrame(np.random.default_rng(6).standard_normal((60, 4)).astype(np.float32), columns=COLUMNS)


def evaluated(model, data, kind, **more):
    with mlflow.start_run():
        config = {"log_model_explainability": False, "log_explainer": False, **more}
        result = mlflow.models.evaluate(
            model,
            data,
            targets="target" if isinstance(data, pd.DataFrame) else None,
            model_type=kind,
            evaluators="default",
            evaluator_config=config,
        )
    return {name: float(value) for name, value in result.metrics.items()}


def versions(model, name):
    """A registered model as `mlflow.onnx` has it, and what it was converted to."""
    mlflow.onnx.log_model(model, name=name, registered_model_name=name, pip_requirements=["onnx"])
    version = mlflow_trt.convert_model_version(f"models:/{name}/1", f"{name}-trt", batch=(1, 8, 64), model_config=CPU)
    return f"models:/{name}/1", f"models:/{name}-trt/{version.version}"


def test_a_regressor_by_its_uri(store, rows):
    before, after = versions(regressor(), "regressor")
    exact = mlflow.pyfunc.load_model(before).predict(rows)["y"]
    data = rows.assign(target=exact + np.random.default_rng(7).standard_normal(60).astype(np.float32))
    expected, found = (evaluated(uri, data, "regressor") for uri in (before, after))
    assert found == pytest.approx(expected, rel=1e-5)
    assert found["root_mean_squared_error"] == pytest.approx(
        np.sqrt(np.mean((data["target"] - exact) ** 2)), rel=1e-5
    )  # it measured this model, and not another


@pytest.mark.filterwarnings("ignore:X has feature names:UserWarning")  # of scikit-learn, before the conversion
@pytest.mark.parametrize("form", ["DataFrame", "array"])
def test_an_estimator_whose_signature_names_no_input(form, store, rows):
    """As `infer_signature` makes it of an array: MLflow takes the columns of a DataFrame for the input then."""
    exact = rows.to_numpy() @ np.arange(1.0, 5.0)
    mlflow.sklearn.log_model(
        LinearRegression().fit(rows.to_numpy(), exact), name="line", registered_model_name="line",
        signature=infer_signature(rows.to_numpy(), exact), pip_requirements=["scikit-learn"],
        serialization_format="pickle",
    )  # fmt: skip
    mlflow_trt.convert_model_version("models:/line/1", "line-trt", batch=(1, 8, 64), model_config=CPU)
    target = exact + np.random.default_rng(7).standard_normal(60)
    data = rows.assign(target=target)
    if form == "array":
        data = mlflow.data.from_numpy(rows.to_numpy(), targets=target)  # type: ignore[attr-defined]
    expected, found = (evaluated(f"models:/{name}/1", data, "regressor") for name in ("line", "line-trt"))
    del expected["score"]  # the estimator's own
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("known", [{}, {"label_list": [0, 1, 2]}], ids=["labels found", "labels given"])
def test_a_classifier_by_its_uri_is_refused_before_and_after(known, store, rows):
    """MLflow's evaluator takes what `predict` returns for a vector of labels, which the DataFrame of both is not.

    It concatenates it with the targets to find the labels, and makes a table of it where they are given.
    """
    message = "you must pass an index" if known else "same number of dimensions"
    for uri in versions(classifier(), "classifier"):
        labels = mlflow.pyfunc.load_model(uri).predict(rows)
        assert labels.shape == (60, 1)
        with pytest.raises(ValueError, match=message):
            evaluated(uri, rows.assign(target=labels["y"]), "classifier", **known)
        mlflow.end_run()


def test_a_classifier_by_the_column_of_its_labels(store, rows):
    before, after = versions(classifier(), "classifier")
    labels = mlflow.pyfunc.load_model(before).predict(rows)["y"]
    data = rows.assign(target=labels.where(labels.index >= 12, (labels + 1) % 3))

    def predictor(uri):
        model = mlflow.pyfunc.load_model(uri)
        return lambda frame: model.predict(frame)["y"]

    expected, found = (evaluated(predictor(uri), data, "classifier") for uri in (before, after))
    assert found == pytest.approx(expected)
    assert found["accuracy_score"] == pytest.approx(48 / 60)


def test_predictions_that_were_made_before(store, rows):
    _, after = versions(classifier(), "classifier")
    labels = mlflow.pyfunc.load_model(after).predict(rows)["y"]
    with mlflow.start_run():
        result = mlflow.models.evaluate(
            data=rows.assign(target=labels, prediction=labels),
            targets="target",
            predictions="prediction",
            model_type="classifier",
        )
    assert result.metrics["accuracy_score"] == 1
