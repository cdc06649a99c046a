"""`mlflow models serve` and `mlflow-trt serve` of a whole model: the bodies are those of its source."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from servers import TensorServer, served
from whole_sources import TEXTS, bert, log_pipeline

import mlflow_trt
from examples.serving import running

pytest.importorskip("torch", reason="needs the extra test-torch")
pytest.importorskip("transformers", reason="needs the extra test-torch")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.server]  # transformers', torch's and MLflow's own

LABELS = {0: "negative", 1: "neutral", 2: "positive"}
CPU = {"runtime": "onnxruntime"}
BODIES = {
    "texts": {"inputs": TEXTS},
    "one text": {"inputs": "i love the film"},
    "instances": {"instances": TEXTS[:3]},
    "an empty text": {"inputs": [""]},
    "emoji": {"inputs": ["🎉 ❤️ 日本 ÿ"]},
    "a frame": {"dataframe_split": {"columns": ["text"], "index": [7, 9], "data": [[TEXTS[0]], [TEXTS[1]]]}},
    "records": {"dataframe_records": [{"text": TEXTS[0]}, {"text": TEXTS[4]}]},
    "pairs": {"dataframe_records": [{"text": TEXTS[0], "text_pair": TEXTS[2]}, {"text": TEXTS[4], "text_pair": "sun"}]},
    "None": {"inputs": [None]},
    "a number": {"inputs": [3]},
    "over-long": {"inputs": ["sun " * 80]},
    "nothing": {"inputs": []},
    "no key": {"data": TEXTS},
}


@pytest.fixture(scope="module")
def made(module_store):
    id2label = {"id2label": LABELS, "label2id": {label: number for number, label in LABELS.items()}}
    log_pipeline("text-classification", bert(**id2label))
    mlflow_trt.convert_model_version("models:/source/1", "made", batch=(1, 4, 8))
    return module_store


@pytest.fixture(scope="module")
def servers(made):
    with served("models:/source/1", made.uri, {}) as source, served("models:/made/1", made.uri, CPU) as result:
        yield source, result


def post(server, body):
    response = requests.post(f"{server}/invocations", json=body, timeout=120)
    return response.status_code, response.json()


def check_same(answer, expected):
    """The same JSON: numbers may differ in their last digits, and errors in their words."""
    assert answer[0] == expected[0]
    if expected[0] != 200:
        return
    (name, rows), (_, wanted) = answer[1].popitem(), expected[1].popitem()
    assert name == "predictions"
    assert len(rows) == len(wanted)
    for row, other in zip(rows, wanted, strict=True):
        assert row.keys() == other.keys()
        assert row["label"] == other["label"]
        assert row["score"] == pytest.approx(other["score"], abs=1e-4)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_bodies(body, servers):
    source, result = servers
    check_same(post(result, body), post(source, body))


def test_many_at_once(servers):
    source, result = servers
    bodies = [{"inputs": [text, text[::-1]]} for text in TEXTS]
    expected = [post(source, body) for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        for answer, other in zip(pool.map(lambda body: post(result, body), bodies), expected, strict=True):
            check_same(answer, other)


def test_our_own_server(made, servers):
    environment = {"MLFLOW_TRACKING_URI": made.uri}
    server = TensorServer("models:/made/1", model_config=CPU, environment=environment)
    with running(server):
        for body in (BODIES["texts"], BODIES["a frame"], BODIES["over-long"]):
            check_same(post(server.address, body), post(servers[0], body))
        described = requests.get(f"{server.address}/v2/models/made", timeout=60).json()
    assert {one["name"] for one in described["inputs"]} == {"input_ids", "token_type_ids", "attention_mask"}
