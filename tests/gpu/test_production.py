"""What happens on a GPU that others use, that fails under a server, and that is loaded and closed all day."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import networks
import numpy as np
import pytest
import requests
from compare import relative_error
from helpers import PATIENCE, wait_for
from lost_gpu import environment, free_bytes

import mlflow_trt
from benchmarks.served import resident_bytes
from examples.serving import ServerProcess, free_port, running
from mlflow_trt.client import Client
from mlflow_trt.errors import MlflowTrtError, OutOfMemoryError

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

CYCLES = int(os.environ.get("LOAD_CYCLES", "40"))
WIDTH = 8192
"""Of a square matrix of float32: 256 MiB of weights."""
TF32 = 2e-3  # what TensorRT-RTX makes of float32 products

SERVE = """
import signal, sys, threading
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # for the threads of what is imported, too

from lost_gpu import lose
from mlflow_trt.cli import main

threading.Thread(target=lambda: (signal.sigwait({signal.SIGUSR1}), lose()), daemon=True).start()
sys.exit(main())
"""


@contextlib.contextmanager
def taken_by_another(left: int):
    """Another process holds the GPU's memory, but for so many bytes."""
    other = subprocess.Popen(
        [sys.executable, "-m", "lost_gpu", str(left)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    try:
        assert other.stdout.readline() == "taken\n"
        yield
    finally:
        other.communicate()
        assert other.returncode == 0


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model with large weights."""
    path = tmp_path_factory.mktemp("large") / "model"
    mlflow_trt.save_model(networks.product(width=WIDTH, outputs=WIDTH), path, batch=(1, 2, 4), verify=False)
    return path


@pytest.fixture(scope="module")
def x():
    return networks.rows(3, WIDTH)


@pytest.fixture(scope="module")
def expected(large, x):
    with mlflow_trt.load_model(str(large), runtime="onnxruntime") as session:
        return session.run({"x": x})


@pytest.mark.alone_on_gpu
class TestMemoryThatAnotherProcessHolds:
    def test_while_loading(self, large, x, expected):
        before = free_bytes()
        with taken_by_another(64 << 20), pytest.raises(OutOfMemoryError, match="too little memory|out of memory"):
            mlflow_trt.load_model(str(large))
        assert before - free_bytes() < 64 << 20  # nothing of it stays
        with mlflow_trt.load_model(str(large)) as session:
            assert relative_error(session.run({"x": x}), expected) < TF32

    def test_while_converting(self, tmp_path, x, expected):
        network, path = networks.product(width=WIDTH, outputs=WIDTH), tmp_path / "model"
        with taken_by_another(64 << 20), pytest.raises(OutOfMemoryError, match="too little memory|out of memory"):
            mlflow_trt.save_model(network, path, batch=(1, 2, 4))
        assert list(tmp_path.iterdir()) == []
        mlflow_trt.save_model(network, path, batch=(1, 2, 4))
        with mlflow_trt.load_model(str(path)) as session:
            assert relative_error(session.run({"x": x}), expected) < TF32

    def test_while_running(self, tmp_path):
        """A session that had what it needs goes on, one that needs more says so, and both do once there is memory."""
        width = 1 << 20
        doubled = networks.doubled(networks.FLOAT, width)
        mlflow_trt.save_model(doubled, tmp_path / "model", batch=(16, 16, 256), verify=False)
        feeds = {"x": np.arange(200 * width, dtype=np.float32).reshape(200, width)}
        small = {"x": feeds["x"][:16]}
        with (
            mlflow_trt.load_model(str(tmp_path / "model"), warm_up="off") as warm,
            mlflow_trt.load_model(str(tmp_path / "model"), warm_up="off") as cold,
        ):
            for _ in range(3):
                assert np.array_equal(warm.run(small)["y"], 2 * small["x"])
            with taken_by_another(32 << 20):
                assert np.array_equal(warm.run(small)["y"], 2 * small["x"])
                with pytest.raises(OutOfMemoryError, match="send smaller batches, or free memory") as caught:
                    cold.run(feeds)
                assert caught.value.get_http_status_code() == 429
            for session in (warm, cold):
                assert np.array_equal(session.run(feeds)["y"], 2 * feeds["x"])


class TestAServerThatLosesItsGpu:
    @pytest.fixture
    def folder(self, tmp_path):
        mlflow_trt.save_model(networks.product(), tmp_path / "model", batch=(1, 8, 64), verify=False)
        return tmp_path / "model"

    def server(self, folder):
        port = free_port()
        command = [sys.executable, "-c", SERVE, "serve", f"product={folder}", "--port", str(port)]
        return ServerProcess(command, environment(), ready=f"http://127.0.0.1:{port}/v2/health/ready")

    def test_it_says_so_and_ends_and_the_next_one_serves(self, folder):
        x = networks.rows(5)
        answers, problems = [], []
        server = self.server(folder)
        with running(server), Client(server.address, model="product", retries=0) as client:
            expected = client.predict({"x": x})["y"]
            os.kill(server.pid, signal.SIGUSR1)

            def ended():
                try:
                    answers.append(client.predict({"x": x})["y"])
                except MlflowTrtError as error:
                    problems.append(error)
                    with contextlib.suppress(requests.ConnectionError):  # it may have ended
                        assert requests.get(f"{server.address}/v2/health/ready", timeout=PATIENCE).status_code == 503
                return server.has_ended

            wait_for(ended)
            log = server.log()
        assert problems
        assert all(np.array_equal(answer, expected) for answer in answers)
        assert "CUDA failed" in log, log
        again = self.server(folder)
        with running(again), Client(again.address, model="product", retries=0) as client:
            assert np.array_equal(client.predict({"x": x})["y"], expected)


@pytest.mark.alone_on_gpu
def test_loading_and_closing_leaves_nothing(tmp_path, report):
    """`LOAD_CYCLES=1000` for as many as the documentation tells of."""
    mlflow_trt.save_model(networks.product(), tmp_path / "model", batch=(1, 8, 64), verify=False)
    x = networks.rows(20)
    used, resident = [], []
    expected = None
    for _ in range(CYCLES):
        with mlflow_trt.load_model(str(tmp_path / "model")) as session:
            answer = session.run({"x": x})["y"]
        expected = answer if expected is None else expected
        assert np.array_equal(answer, expected)
        used.append(-free_bytes())
        resident.append(resident_bytes())
    first = CYCLES // 4
    growth = f"GPU {(used[-1] - used[first]) / 1e6:+.1f} MB, process {(resident[-1] - resident[first]) / 1e6:+.1f} MB"
    report(("product", f"{CYCLES} times loaded and closed", growth, "", "", "", ""))
    # TensorRT-RTX 1.6.1 keeps 0.04 MB of the GPU and a megabyte of the process whenever it reads stored kernels and
    # serializes them, in a bare loop, too.
    counted = CYCLES - 1 - first
    assert used[-1] - used[first] < (4 << 20) + counted * 60_000
    assert resident[-1] - resident[first] < (24 << 20) + counted * 1_500_000
