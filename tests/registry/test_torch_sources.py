"""Modules of torch, as `mlflow.pytorch` keeps them: their axes vary together, and only those do that were asked to."""

from __future__ import annotations

import mlflow
import numpy as np
import pytest
from compare import relative_error
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

import mlflow_trt
from mlflow_trt import OnnxModelError
from mlflow_trt.flavor.fetch import read_record
from mlflow_trt.registry.sources.exporting import ROWS
from mlflow_trt.registry.sources.open import open_source

torch = pytest.importorskip("torch", reason="needs the extra test-torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and MLflow's own

CPU = {"runtime": "onnxruntime"}
nn = torch.nn


def tokens(*names, shape=(-1, -1)):
    return ModelSignature(inputs=Schema([TensorSpec(np.dtype(np.int64), shape, name) for name in names]))


class Encoder(nn.Module):
    """Like BERT: an embedding, a mask, attention, and rows that are pooled."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 16)
        self.key = nn.Linear(16, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        x = self.embedding(input_ids)
        if token_type_ids is not None:
            x = x + token_type_ids[..., None] * 0.25
        scores = x @ self.key(x).transpose(1, 2)
        if attention_mask is not None:
            scores = scores + (1.0 - attention_mask[:, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        return self.out(torch.softmax(scores / 4, -1) @ x).mean(1)


def log(module, signature):
    mlflow.pytorch.log_model(
        module, name="m", registered_model_name="m", signature=signature, serialization_format="pickle",
        pip_requirements=["torch"],
    )  # fmt: skip


def sentences(rows, length, seed=0):
    random = np.random.default_rng(seed)
    mask = (np.arange(length) < random.integers(1, length + 1, (rows, 1))).astype(np.int64)
    return {
        "input_ids": random.integers(0, 50, (rows, length)),
        "attention_mask": mask,
        "token_type_ids": random.integers(0, 2, (rows, length)),
    }


def test_all_inputs_have_the_same_rows(store):
    module = Encoder()
    # Neither the order of the arguments nor an example: MLflow stores none for modules with several inputs.
    log(module, tokens("attention_mask", "token_type_ids", "input_ids"))
    mlflow_trt.convert_model_version(
        "models:/m/1", "m-trt", batch=(1, 4, 8), shapes={"input_ids": ((-1, 1), (-1, 8), (-1, 32))}
    )
    record = read_record("models:/m-trt/1")
    assert {spec.shape[0] for spec in (*record.inputs, *record.outputs)} == {ROWS}
    assert record.batch_axis.splits
    feeds = sentences(11, 9)
    with torch.no_grad():
        expected = module(**{name: torch.from_numpy(array) for name, array in feeds.items()}).numpy()
    with mlflow_trt.load_model("models:/m-trt/1", runtime="onnxruntime") as session:
        assert relative_error({"y": next(iter(session.run(feeds).values()))}, {"y": expected}) < 1e-5


def test_an_axis_that_the_model_fixes_is_an_error(store):
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 2)

        def forward(self, x):
            return self.linear(x)

    signature = ModelSignature(inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, -1), "x")]))
    log(Counted(), signature)
    with pytest.raises(OnnxModelError, match="axis 1 of input 'x' varies by the signature.* fixed to 16"):
        mlflow_trt.convert_model_version("models:/m/1", "m-trt")
    assert not store.client.search_registered_models("name = 'm-trt'")


def test_rows_that_the_model_fixes_are_those_of_its_example(store, messages, tmp_path):
    class FourRows(nn.Module):
        def forward(self, x):
            return x.reshape(4, 6).cumsum(0)

    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    signature = ModelSignature(inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 6), "x")]))
    mlflow.pytorch.log_model(
        FourRows(), name="m", registered_model_name="m", signature=signature, input_example=x,
        serialization_format="pickle", pip_requirements=["torch"],
    )  # fmt: skip
    with open_source("models:/m/1") as source:
        assert source.signature is not None
        mlflow_trt.save_model(source.path, tmp_path / "m-trt")
    assert "takes 4 rows and no other number" in messages.text


def test_a_module_in_training_is_exported_for_inference(store):
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    module.train()
    log(module, ModelSignature(inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 6), "x")])))
    mlflow_trt.convert_model_version("models:/m/1", "m-trt", batch=(1, 4, 8))
    with torch.no_grad():
        expected = module.eval()(torch.from_numpy(x)).numpy()
    model = mlflow.pyfunc.load_model("models:/m-trt/1", model_config=CPU)
    assert relative_error({"y": next(iter(model.predict({"x": x}).values()))}, {"y": expected}) < 1e-5
