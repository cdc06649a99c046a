"""Models that are converted name their tensors as the graph does, whatever the source's signature called them."""

from __future__ import annotations

import asyncio
import json

import httpx
import mlflow
import networks
import numpy as np
import pandas as pd
import pytest
from mlflow.models import ModelSignature, infer_signature
from mlflow.pyfunc import scoring_server
from mlflow.types import ColSpec, DataType, Schema, TensorSpec
from onnx import helper

import mlflow_trt
from mlflow_trt import InputError
from mlflow_trt.client import AsyncClient
from mlflow_trt.core import types as spec
from mlflow_trt.flavor.fetch import read_record
from mlflow_trt.flavor.signatures import with_graph_names

CPU = {"runtime": "onnxruntime"}
IMAGES = np.random.default_rng(0).standard_normal((4, 3, 6, 8)).astype(np.float32)


def channels():
    """The mean of each channel of an image, times 1, 2 and 3."""
    nodes = [
        helper.make_node("ReduceMean", ["image", ], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("Mul", ["means", "weights"], ["scores"]),
    ]  # fmt: skip
    image = networks.value("image", networks.FLOAT, ["batch", 3, 6, 8])
    scores = networks.value("scores", networks.FLOAT, ["batch", 3])
    return networks.model(nodes, [image], [scores], [networks.constant("weights", np.float32([1, 2, 3]))])


EXPECTED = IMAGES.mean((2, 3)) * np.float32([1, 2, 3])


@pytest.fixture
def converted(store):
    """From a model whose signature has no names, as mlflow.pytorch's and mlflow.sklearn's have."""
    signature = infer_signature(IMAGES, EXPECTED)
    assert not signature.inputs.has_input_names()
    mlflow.onnx.log_model(
        channels(), name="cnn", registered_model_name="cnn", signature=signature, pip_requirements=["onnx"],
        input_example=IMAGES[:1],
    )  # fmt: skip
    mlflow_trt.convert_model_version("models:/cnn/1", "cnn-trt", batch=(1, 4, 8))
    return signature


def test_the_signature_has_the_names_of_the_graph_and_the_record_the_source_s(converted):
    signature = mlflow.models.get_model_info("models:/cnn-trt/1").signature
    assert signature.inputs is None  # MLflow would refuse names, or DataFrames if there were one
    assert signature.outputs == Schema([TensorSpec(np.dtype("float32"), (-1, 3), "scores")])
    kept = ModelSignature.from_dict(json.loads(read_record("models:/cnn-trt/1").lineage["signature"]))
    assert kept == converted


def test_arrays_with_and_without_a_name_and_example_are_taken(converted):
    model = mlflow.pyfunc.load_model("models:/cnn-trt/1", model_config=CPU)
    for data in ({"image": IMAGES}, IMAGES):
        assert np.allclose(model.predict(data)["scores"], EXPECTED, rtol=1e-4)
    assert np.allclose(model.predict(model.input_example)["scores"], EXPECTED[:1], rtol=1e-4)


def test_requests_by_name_are_answered_and_another_layout_is_refused(converted):
    app = scoring_server.init(mlflow.pyfunc.load_model("models:/cnn-trt/1", model_config=CPU))

    async def ask():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as plain:
            for inputs in ({"image": IMAGES.tolist()}, IMAGES.tolist()):
                answer = await plain.post("/invocations", json={"inputs": inputs})
                assert answer.status_code == 200, answer.text
                assert np.allclose(answer.json()["predictions"]["scores"], EXPECTED, rtol=1e-4)
        async with AsyncClient("http://server", transport=transport) as client:
            assert np.allclose((await client.predict({"image": IMAGES}))["scores"], EXPECTED, rtol=1e-4)
            with pytest.raises(InputError, match="image"):
                await client.predict({"image": IMAGES.transpose(0, 2, 3, 1)})

    asyncio.run(ask())


def test_an_estimator_is_called_by_array_or_by_the_name_of_its_input(store):
    from sklearn.linear_model import LinearRegression

    x = np.random.default_rng(1).standard_normal((40, 5))
    estimator = LinearRegression().fit(x, x @ np.arange(1.0, 6.0))
    expected = estimator.predict(x)
    mlflow.sklearn.log_model(
        estimator, name="line", registered_model_name="line", signature=infer_signature(x, expected),
        pip_requirements=["scikit-learn"], serialization_format="pickle",
    )  # fmt: skip
    mlflow_trt.convert_model_version("models:/line/1", "line-trt", batch=(1, 4, 8))
    model = mlflow.pyfunc.load_model("models:/line-trt/1", model_config=CPU)
    (name,) = (spec.name for spec in model.get_raw_model().inputs)
    frame = pd.DataFrame(x, columns=list("abcde"), index=range(40, 80))
    for data in (x, {name: x}, frame, pd.DataFrame({name: list(x)})):
        (output,) = (np.asarray(values) for values in dict(model.predict(data)).values())
        assert np.allclose(output.ravel(), expected, rtol=1e-3, atol=1e-3)


def tensors(*names):
    return [spec.TensorSpec(name=name, dtype="float32", shape=("n", 3)) for name in names]


def unnamed(*names):
    return Schema([TensorSpec(np.dtype("float32"), (-1, 3), name) for name in names])


def test_names_of_the_graph_stay_and_others_do_not():
    own = ModelSignature(inputs=unnamed("a", "b"), outputs=unnamed("y"))
    assert with_graph_names(own, tensors("b", "a"), tensors("y")) == own
    other = with_graph_names(ModelSignature(inputs=unnamed("a", "b"), outputs=unnamed("p", "q")), tensors("c", "d"),
                             tensors("y", "z"))  # fmt: skip
    assert other.inputs is None
    assert other.outputs.input_names() == ["y", "z"]
    assert with_graph_names(ModelSignature(inputs=unnamed("a")), tensors("x"), []).inputs.input_names() == ["x"]
    nameless = with_graph_names(ModelSignature(inputs=unnamed(None), outputs=unnamed(None)), tensors("x"), tensors("y"))
    assert nameless == ModelSignature(outputs=unnamed("y"))
    assert with_graph_names(ModelSignature(inputs=unnamed("a", "b")), tensors("x"), []) is None


def test_the_columns_of_a_table_stay():
    columns = ModelSignature(inputs=Schema([ColSpec(DataType.double, name) for name in ("width", "height", "depth")]))
    assert with_graph_names(columns, tensors("X"), tensors("y")) == columns
