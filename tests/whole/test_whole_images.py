"""Whole models that take images and sound, and PythonModels with torch modules."""

from __future__ import annotations

import base64
import io

import mlflow
import numpy as np
import pandas as pd
import pytest
from whole_sources import jpeg

import mlflow_trt
from mlflow_trt import OnnxModelError
from mlflow_trt.flavor.fetch import read_record
from mlflow_trt.flavor.whole.answers import differences

torch = pytest.importorskip("torch", reason="needs the extra test-torch")
transformers = pytest.importorskip("transformers", reason="needs the extra test-torch")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # transformers', torch's and MLflow's own

CPU = {"runtime": "onnxruntime"}
nn = torch.nn
CLASSES = {number: f"class {number}" for number in range(5)}


def both():
    made = mlflow.pyfunc.load_model("models:/made/1", model_config=CPU)
    return mlflow.pyfunc.load_model("models:/source/1"), made


def test_a_vit_classifies_images(store):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        initializer_range=0.6, id2label=CLASSES, label2id={label: number for number, label in CLASSES.items()},
    )  # fmt: skip
    pipeline = transformers.pipeline(
        "image-classification",
        model=transformers.ViTForImageClassification(config).eval(),
        image_processor=transformers.ViTImageProcessor(size={"height": 32, "width": 32}),
    )
    images = [base64.b64encode(jpeg(seed)).decode() for seed in range(12)]
    mlflow.transformers.log_model(
        pipeline, name="source", registered_model_name="source", input_example=images[:4],
        pip_requirements=["torch", "transformers"],
    )  # fmt: skip
    mlflow_trt.convert_model_version("models:/source/1", "made", batch=(1, 4, 8))
    source, made = both()
    expected = [[one["label"] for one in row] for row in source.get_raw_model()(_opened(12), top_k=5)]
    assert [[one["label"] for one in row] for row in made.get_raw_model()(_opened(12), top_k=5)] == expected
    assert len({tuple(row) for row in expected}) > 1
    assert not list(differences(made.predict(images[0]), source.predict(images[0]), 1e-4))


def _opened(count):
    from PIL import Image

    return [Image.open(io.BytesIO(jpeg(seed))) for seed in range(count)]


def test_sounds_are_classified(store):
    torch.manual_seed(0)
    config = transformers.ASTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_mel_bins=32,
        max_length=64, patch_size=16, initializer_range=0.6, id2label=CLASSES,
        label2id={label: number for number, label in CLASSES.items()},
    )  # fmt: skip
    pipeline = transformers.pipeline(
        "audio-classification",
        model=transformers.ASTForAudioClassification(config).eval(),
        feature_extractor=transformers.ASTFeatureExtractor(num_mel_bins=32, max_length=64),
    )
    sounds = [np.random.default_rng(seed).standard_normal(16000).astype(np.float32) for seed in range(4)]
    signature = mlflow.models.infer_signature(sounds[0])
    mlflow.transformers.log_model(
        pipeline, name="source", registered_model_name="source", signature=signature,
        pip_requirements=["torch", "transformers"],
    )  # fmt: skip
    mlflow_trt.convert_model_version("models:/source/1", "made", calibration_data=sounds[0])
    source, made = both()
    for sound in sounds:
        pd.testing.assert_frame_equal(made.predict(sound), source.predict(sound), atol=1e-4)


class Photos(mlflow.pyfunc.PythonModel):
    """JPEG bytes to labels, as with torchvision: decode, resize with antialiasing, normalize, a network of torch."""

    def __init__(self, network):
        self.network = network

    def predict(self, context, model_input, params=None):
        import torch
        from PIL import Image

        pictures = []
        for content in model_input["image"]:
            picture = Image.open(io.BytesIO(content)).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
            pictures.append((np.asarray(picture, np.float32) / 255 - 0.45) / 0.25)
        with torch.no_grad():
            scores = self.network(torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy())).softmax(1)
        best = scores.max(1)
        labels = [f"class {number}" for number in best.indices.tolist()]
        return pd.DataFrame({"label": labels, "score": best.values.numpy()}, index=model_input.index)


def convolutional():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    ).eval()  # fmt: skip


def log(model, example):
    mlflow.pyfunc.log_model(
        name="source", registered_model_name="source", python_model=model, input_example=example,
        pip_requirements=["torch"],
    )  # fmt: skip


def test_a_python_model_takes_jpegs(store, tmp_path):
    network = convolutional()
    with torch.no_grad():
        network[-1].weight *= 20  # so that labels vary
    log(Photos(network), pd.DataFrame({"image": [jpeg(0), jpeg(1)]}))
    for seed in range(20):
        (tmp_path / f"{seed}.jpg").write_bytes(jpeg(seed))
    mlflow_trt.convert_model_version(
        "models:/source/1", "made", precision="fp16", batch=(1, 8, 16), calibration_data=tmp_path
    )
    source, made = both()
    frame = pd.DataFrame({"image": [jpeg(seed) for seed in range(40)]}, index=range(50, 90))
    expected, answer = source.predict(frame), made.predict(frame)
    pd.testing.assert_frame_equal(answer, expected, atol=5e-3)
    assert len(set(answer["label"])) > 1
    assert [spec.name for spec in read_record("models:/made/1").inputs] == ["input"]
    weights = made.unwrap_python_model().network[0].weight
    assert weights.shape == (8, 3, 3, 3)
    assert weights.untyped_storage().nbytes() == 4  # given back


class Asks(mlflow.pyfunc.PythonModel):
    """A module that answers with a dict, and is called with a constant."""

    def __init__(self, network):
        self.network = network

    def predict(self, context, model_input, params=None):
        import torch

        given = torch.as_tensor(np.asarray(model_input, np.float32))
        answer = self.network(given, scale=float((params or {}).get("scale", 2.0)))
        return np.concatenate([answer["first"].detach().numpy(), answer["second"].detach().numpy()], 1)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x, scale=1.0):
        return {"first": self.first(x) * scale, "second": self.second(x)}


def test_a_module_with_constants_and_several_outputs(store):
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    log(Asks(Two()), x)
    mlflow_trt.convert_model_version("models:/source/1", "made", batch=(1, 4, 8))
    source, made = both()
    assert np.allclose(made.predict(x), source.predict(x), atol=1e-5)
    model = made.unwrap_python_model()
    with pytest.raises(mlflow_trt.InputError, match=r"called with scale=3.0, and was converted with 2.0"):
        model.network(torch.from_numpy(x), scale=3.0)
    with pytest.raises(mlflow_trt.InputError, match="called without 'x'"):
        model.network(None, scale=2.0)


def test_what_is_no_tensor_is_named(store):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 3)

        def forward(self, x, scale=1.0):
            return {"first": self.first(x), "second": self.first(x)}, len(x)

    class Unusual(Asks):
        def predict(self, context, model_input, params=None):
            import torch

            answer, _ = self.network(torch.as_tensor(np.asarray(model_input, np.float32)))
            return answer["first"].detach().numpy()

    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    log(Unusual(Counts()), x)
    with pytest.raises(OnnxModelError, match="the network answers with a tuple; expected a tensor, or a tuple"):
        mlflow_trt.convert_model_version("models:/source/1", "made")
