"""Whole models behind both servers, asked by the project's own client: texts in, labels out, as from the source."""

from __future__ import annotations

import asyncio
import datetime as dt
import json

import mlflow
import networks
import numpy as np
import pandas as pd
import pytest
from repository import SUPPORT
from servers import TensorServer, served

import mlflow_trt
from examples.serving import free_port, running
from mlflow_trt import InputError, ServerUnavailableError
from mlflow_trt.client import AsyncClient, Client
from mlflow_trt.core import wire

pytestmark = [
    pytest.mark.server,
    pytest.mark.filterwarnings("ignore:.*type hints"),  # MLflow's, about models without them
    pytest.mark.filterwarnings("ignore:Operation with range"),  # pandas' of what MLflow does with an input example
]

CPU = {"runtime": "onnxruntime"}
TEXTS = ["warm sun", "cold rain over the river and the hills", "a", "nobody slept at all in town", "🎉 日本 ÿ"]
FRAME = pd.DataFrame({"text": TEXTS}, index=[7, 5, 3, 2, 11])


@pytest.fixture(scope="module")
def made(module_store, tmp_path_factory):
    network = tmp_path_factory.mktemp("network") / "network.onnx"
    network.write_bytes(networks.transformer().SerializeToString())
    mlflow.pyfunc.log_model(
        name="source", registered_model_name="source", python_model=str(SUPPORT / "text_classifier.py"),
        artifacts={"network": str(network)}, input_example=FRAME, pip_requirements=["onnxruntime", "pandas"],
    )  # fmt: skip
    shapes = {"input_ids": ((-1, 1), (-1, 8), (-1, 64))}
    mlflow_trt.convert_model_version("models:/source/1", "made", batch=(1, 4, 8), shapes=shapes)
    return module_store


@pytest.fixture(scope="module")
def expected(made):
    answer = mlflow.pyfunc.load_model("models:/source/1").predict(FRAME)
    assert answer["label"].nunique() > 1
    assert answer["score"].std() > 1e-3
    return answer


@pytest.fixture(scope="module", params=["mlflow models serve", "mlflow-trt serve"])
def address(request, made):
    if request.param == "mlflow models serve":
        with served("models:/made/1", made.uri, CPU) as address:
            yield address
        return
    environment = {"MLFLOW_TRACKING_URI": made.uri}
    server = TensorServer("models:/made/1", model_config=CPU, environment=environment)
    with running(server):
        yield server.address


def check(answer, expected):
    assert [row["label"] for row in answer] == list(expected["label"])
    np.testing.assert_allclose([row["score"] for row in answer], expected["score"], atol=1e-5)


@pytest.mark.parametrize("data", [FRAME, {"text": TEXTS}, {"text": np.array(TEXTS)}], ids=["frame", "dict", "array"])
def test_texts_in_labels_out(data, address, expected):
    with Client(address) as client:
        check(client.invoke(data), expected)


def test_asynchronously(address, expected):
    async def invoke():
        async with AsyncClient(address) as client:
            return await asyncio.gather(*(client.invoke(FRAME.iloc[row : row + 1]) for row in range(len(FRAME))))

    check([answer[0] for answer in asyncio.run(invoke())], expected)


def test_what_it_refuses_is_told(address):
    with Client(address) as client, pytest.raises(InputError, match="text"):
        client.invoke(pd.DataFrame({"txet": TEXTS}))


class TestWhatIsSent:
    def sent(self, data, params=None):
        return json.loads(wire.invocation_request(data, params).content)

    def test_cells_that_json_does_not_know(self):
        frame = pd.DataFrame(
            {"a": [1.5, np.nan], "b": ["x", None], "c": [b"\x00\xff", b""], "d": pd.to_datetime(["2026-01-02", None])}
        )
        day = "2026-01-02T00:00:00"
        assert self.sent(frame)["dataframe_split"] == {
            "columns": ["a", "b", "c", "d"], "index": [0, 1], "data": [[1.5, "x", "AP8=", day], [None, None, "", None]],
        }  # fmt: skip
        assert self.sent([np.float32(0.5), np.arange(2), dt.date(2026, 1, 2)])["inputs"] == [0.5, [0, 1], "2026-01-02"]

    def test_params_go_along(self):
        assert self.sent("a", {"top_k": np.int64(2)}) == {"inputs": "a", "params": {"top_k": 2}}

    @pytest.mark.parametrize("data", [[float("nan")], [object()], np.array([np.inf])], ids=["NaN", "object", "inf"])
    def test_what_json_has_nothing_for_is_an_error(self, data):
        with pytest.raises(InputError, match="cannot be sent as JSON"):
            self.sent(data)


def test_no_server():
    with Client(f"http://127.0.0.1:{free_port()}", retries=0) as client, pytest.raises(ServerUnavailableError):
        client.invoke("a")
