"""`mlflow models serve` where no GPU can run the model: it says what to set, and ends."""

from __future__ import annotations

import pytest
from mlflow.pyfunc.utils.environment import _simulate_serving_environment
from servers import Server
from tiers import exhaustive

from mlflow_trt.core import scoring_server
from mlflow_trt.errors import RuntimeUnavailableError
from mlflow_trt.flavor.pyfunc import load_pyfunc

pytestmark = pytest.mark.slow

ADVICE = """start the server with MLFLOW_PYFUNC_INFERENCE_CONFIG='{"runtime": "onnxruntime"}' in its environment"""


def test_a_server_is_told_the_variable_and_a_program_the_setting(product_folder, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", raising=False)  # servers of other tests set it
    with pytest.raises(RuntimeUnavailableError, match="Use runtime='onnxruntime'"):
        load_pyfunc(str(product_folder))
    monkeypatch.setattr(scoring_server, "_how_to_set", None)
    with (
        _simulate_serving_environment(),
        pytest.raises(RuntimeUnavailableError, match="set MLFLOW_PYFUNC_INFERENCE_CONFIG"),
    ):
        load_pyfunc(str(product_folder))  # as `mlflow models predict` does
    monkeypatch.setenv("__pyfunc_model_path__", str(product_folder))
    with pytest.raises(RuntimeUnavailableError) as caught:
        load_pyfunc(str(product_folder))
    assert ADVICE in caught.value.message


def test_a_program_ends_no_parent(monkeypatch):
    monkeypatch.setattr(scoring_server.os, "kill", lambda *_: pytest.fail("it ended something"))
    scoring_server.end_supervisor("outside of a server")
    monkeypatch.setenv("__pyfunc_model_path__", "m")
    scoring_server.end_supervisor("a server of one worker")


@pytest.mark.server
@pytest.mark.parametrize("workers", [1, *exhaustive(2)])
def test_the_server_ends(workers, product_folder, store):
    server = Server(str(product_folder), store.uri, {}, environment={"CUDA_VISIBLE_DEVICES": ""}, workers=workers)
    try:
        with pytest.raises(RuntimeError, match="did not start") as caught:
            server.wait_until_ready()
        assert server.has_ended
        assert ADVICE in str(caught.value)
    finally:
        server.stop()
