"""Architectures of transformers, built tiny: each is converted, or refused with a reason, as the documentation says."""

from __future__ import annotations

import inspect
import re

import mlflow
import numpy as np
import pandas as pd
import pytest
import whole_sources
from repository import ROOT
from whole_sources import TEXTS

from mlflow_trt.errors import MlflowTrtError
from mlflow_trt.pipeline.options import ConversionOptions
from mlflow_trt.registry.convert_version import convert_to_folder

torch = pytest.importorskip("torch", reason="needs the extra test-torch")
transformers = pytest.importorskip("transformers", reason="needs the extra test-torch")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # transformers', torch's and MLflow's own

CPU = {"runtime": "onnxruntime"}
PAGE = ROOT / "docs" / "whole-models.md"
ROWS = dict(re.findall(r"^\| (\w[\w-]*) \| (converted|refused: .*?) \|$", PAGE.read_text(), re.MULTILINE))

_SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 66, "pad_token_id": 0,
}  # fmt: skip
ARCHITECTURES = {
    "Albert": {**_SMALL, "embedding_size": 16},
    "Bert": _SMALL,
    "BigBird": {**_SMALL, "attention_type": "original_full"},
    "Camembert": _SMALL,
    "ConvBert": {**_SMALL, "embedding_size": 32},
    "Data2VecText": _SMALL,
    "Deberta": {**_SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DebertaV2": {**_SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 66},
    "Electra": {**_SMALL, "embedding_size": 16},
    "Ernie": _SMALL,
    "Esm": {**_SMALL, "mask_token_id": 4, "position_embedding_type": "absolute"},
    "FNet": {name: size for name, size in _SMALL.items() if name != "num_attention_heads"},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 66, "pad_token_id": 0},
    "IBert": _SMALL,
    "LayoutLM": _SMALL,
    "Longformer": {**_SMALL, "attention_window": 8},
    "MPNet": _SMALL,
    "MegatronBert": _SMALL,
    "MobileBert": {**_SMALL, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "ModernBert": {**_SMALL, "reference_compile": False},
    "RemBert": {**_SMALL, "input_embedding_size": 16, "output_embedding_size": 16},
    "RoFormer": {**_SMALL, "embedding_size": 16},
    "Roberta": _SMALL,
    "RobertaPreLayerNorm": _SMALL,
    "SqueezeBert": {**_SMALL, "embedding_size": 32},
    "XLMRoberta": _SMALL,
    "XLNet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
}


def saved(name, settings, folder):
    torch.manual_seed(0)
    tokenizer = whole_sources.tokenizer()
    labels = {"id2label": {0: "negative", 1: "neutral", 2: "positive"}, "num_labels": 3}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer), initializer_range=0.5, **{**settings, **labels}
    )
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()

    known = inspect.signature(model.forward).parameters
    tokenizer.model_input_names = [one for one in tokenizer.model_input_names if one in known]
    pipeline = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    signature = mlflow.models.infer_signature("a", pd.DataFrame({"label": ["a"], "score": [0.5]}))
    mlflow.transformers.save_model(pipeline, folder, signature=signature, pip_requirements=["torch", "transformers"])
    return pipeline


def scores(model):
    pipeline = model.get_raw_model()
    rows = pipeline(TEXTS, top_k=None)
    return np.array([[one["score"] for one in sorted(row, key=lambda one: one["label"])] for row in rows])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name, tmp_path):
    said = ROWS[name]
    saved(name, ARCHITECTURES[name], tmp_path / "source")
    options = ConversionOptions(calibration_data=TEXTS[:5])
    if said != "converted":
        with pytest.raises(MlflowTrtError, match=re.escape(said.removeprefix("refused: "))):
            convert_to_folder(tmp_path / "source", tmp_path / "made", options)
        return
    convert_to_folder(tmp_path / "source", tmp_path / "made", options)
    made = mlflow.pyfunc.load_model(str(tmp_path / "made"), model_config=CPU)
    source = mlflow.pyfunc.load_model(str(tmp_path / "source"))
    expected = scores(source)
    assert expected.std() > 1e-3
    assert np.allclose(scores(made), expected, atol=2e-3)


def test_the_page_lists_what_is_tested():
    assert set(ROWS) == set(ARCHITECTURES)
    assert len(ROWS) >= 25
