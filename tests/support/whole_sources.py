"""Whole models, tiny and with real tokenizers, as MLflow's own flavors keep them. They need the extra test-torch."""

from __future__ import annotations

import io

import mlflow
import numpy as np

WORDS = (
    "a the an is was are were good bad great awful film movie plot song book friend day night sun rain warm cold happy "
    "sad i you we they love hate like very not never always and but so read saw heard city river mountain"
)
TEXTS = [
    "i love the film", "a bad plot and a very awful song", "sun", "we saw the river and the mountain , was not cold !",
    "they hate rain but like the warm night , and the book was never bad", "happy day", "the city is great 🎉",
    "not good , not bad ; so so",
]  # fmt: skip


def tokenizer():
    """WordPiece, lower case, with the special tokens of BERT."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"] + list("abcdefghijklmnopqrstuvwxyz.,!?;")
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*special, *WORDS.split(), *pieces]))}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=64, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def bert(head="ForSequenceClassification", **settings):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer()), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.6, **settings,
    )  # fmt: skip
    return getattr(transformers, f"Bert{head}")(config).eval()


def log_pipeline(task, model, example=TEXTS, *, name="source", **more):
    import transformers

    components = {"tokenizer": tokenizer()} if "tokenizer" not in more else {}
    pipeline = transformers.pipeline(task, model=model, **components, **more.pop("components", {}))
    mlflow.transformers.log_model(
        pipeline, name=name, registered_model_name=name, input_example=example,
        pip_requirements=["torch", "transformers"], **more,
    )  # fmt: skip
    return pipeline


def jpeg(seed, size=40):
    """A picture of large coloured fields, as the bytes of a JPEG."""
    from PIL import Image

    fields = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    picture = Image.fromarray(fields).resize((size, size + 7), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95)
    return file.getvalue()
