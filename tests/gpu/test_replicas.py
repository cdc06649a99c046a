"""One model on several GPUs, and what is left when a GPU is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import mlflow
import networks
import numpy as np
import pytest
import requests
from compare import relative_error
from helpers import PATIENCE, wait_for
from lost_gpu import environment
from real_models import CLS

import mlflow_trt
from examples.serving import Server
from mlflow_trt.backends.cuda_driver import probe
from mlflow_trt.runtime.replicas import ReplicaSession

pytestmark = pytest.mark.gpu
several = pytest.mark.skipif(len(probe().gpus) < 2, reason="there are no two GPUs")


@pytest.fixture
def folder(tmp_path):
    mlflow_trt.save_model(networks.product(), tmp_path / "model", batch=(1, 8, 64), verify=False)
    return tmp_path / "model"


def run_script(folder, body):
    """In a process of its own, which the loss of a GPU would end the use of. It has `lost_gpu` at hand."""
    script = "from lost_gpu import lose\n" + textwrap.dedent(body)
    script = f"SCRIPT = {script!r}\n{script}"
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
        env=environment(),
    )  # fmt: skip
    assert "as expected" in done.stdout, done.stdout + done.stderr


@several
class TestSeveral:
    def test_the_same_answers_as_one_gpu_gives(self, folder):
        feeds = {"x": networks.rows(5000)}
        with (
            mlflow_trt.load_model(str(folder), device=1) as one,
            mlflow_trt.load_model(str(folder), device="all") as all_of_them,
        ):
            assert isinstance(all_of_them, ReplicaSession)
            expected = one.run(feeds)["y"]
            for _ in range(20):
                assert np.array_equal(all_of_them.run(feeds)["y"], expected)
            assert sum(all_of_them.runs.values()) == 20 * sum(one.runs.values())
            assert all(session.runs for session in all_of_them._sessions.values())

    def test_a_real_model_through_pyfunc_from_many_threads(self, tmp_path, report):
        mlflow_trt.save_model(CLS.path(), tmp_path / "cls", verify=False, **CLS.recipe)
        feeds = [CLS.feeds(1 + number % 7) for number in range(24)]
        with mlflow_trt.load_model(str(tmp_path / "cls"), runtime="onnxruntime") as session:
            expected = [session.run(one) for one in feeds]
        loaded = mlflow.pyfunc.load_model(str(tmp_path / "cls"), model_config={"device": [0, 1]})
        with loaded.get_raw_model() as session, ThreadPoolExecutor(16) as pool:
            for _ in range(4):
                for answer, right in zip(pool.map(loaded.predict, feeds), expected, strict=True):
                    assert relative_error(answer, right) < 1e-2
            runs = {ordinal: one.runs for ordinal, one in session._sessions.items()}
        report(("cls", "several GPUs", str(runs), "", "", "", ""))

    def test_arrays_on_the_gpu_run_where_they_are(self, folder):
        torch = pytest.importorskip("torch")
        x = networks.rows(5)
        with mlflow_trt.load_model(str(folder), device=[0, 1]) as session:
            expected = session.run({"x": x})["y"]
            for ordinal in (0, 1):
                result = torch.from_dlpack(session.run_on_device({"x": torch.from_numpy(x).cuda(ordinal)})["y"])
                assert result.device.index == ordinal
                assert np.array_equal(result.cpu().numpy(), expected)

    def test_a_kernel_that_crashes_takes_every_gpu_of_its_process_and_none_of_another(self, folder):
        run_script(
            folder,
            """
            import os, subprocess, sys
            import numpy as np, mlflow_trt
            x = np.random.default_rng(0).standard_normal((3000, 16)).astype(np.float32)
            if len(sys.argv) == 2:  # a second process, with a GPU of its own
                other = subprocess.Popen([sys.executable, "-c", SCRIPT, sys.argv[1], "other"],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                own = other.stdout.readline().strip()
                with mlflow_trt.load_model(sys.argv[1], device="all") as session:
                    session.run({"x": x})
                    lose(1 - int(own))
                    for _ in range(2):
                        try:
                            session.run({"x": x})
                        except mlflow_trt.ExecutionError as error:
                            assert "unspecified launch failure" in error.message
                        else:
                            raise AssertionError("it answered")
                    assert sorted(session.out_of_service) == [0, 1], session.out_of_service
                    assert session.broken() is not None
                print(other.communicate("go on\\n")[0], flush=True)
                os._exit(0)
            with mlflow_trt.load_model(sys.argv[1], device="own") as session:
                expected = session.run({"x": x})["y"]
                print(session._device.gpu.ordinal, flush=True)
                sys.stdin.readline()
                for _ in range(5):
                    assert np.array_equal(session.run({"x": x})["y"], expected)
            print("as expected", flush=True)
            """,
        )

    def test_a_worker_for_each_gpu(self, folder, tmp_path):
        x = networks.rows(3)
        server = Server(str(folder), f"sqlite:///{tmp_path}/mlflow.db", {"device": "own"}, workers=2)
        try:
            server.wait_until_ready()
            wait_for(lambda: len(gpus_of_workers(server)) == 2)
            assert sorted(gpus_of_workers(server)) == [0, 1]
            expected = ask(server, x)
            first = int(re.search(r"Started server process \[(\d+)\]", server.log())[1])
            os.kill(first, signal.SIGKILL)
            wait_for(lambda: len(gpus_of_workers(server)) == 3)
            gpus = gpus_of_workers(server)
            assert gpus[2] in gpus[:2]
            assert "sharers: 1" not in server.log()
            for _ in range(20):
                assert np.allclose(ask(server, x), expected, rtol=1e-5, atol=1e-6)
        finally:
            server.stop()


def ask(server, x):
    response = requests.post(f"{server.address}/invocations", json={"inputs": x.tolist()}, timeout=PATIENCE)
    assert response.ok, response.text
    return response.json()["predictions"]["y"]


def gpus_of_workers(server):
    return [int(ordinal) for ordinal in re.findall(r"This process uses CUDA device (\d+)", server.log())]


def test_a_gpu_that_is_lost_says_so(folder):
    run_script(
        folder,
        """
        import sys, os
        import numpy as np, mlflow_trt
        x = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
        session = mlflow_trt.load_model(sys.argv[1])
        session.run({"x": x})
        assert session.broken() is None
        lose(0)
        for _ in range(3):
            try:
                session.run({"x": x})
            except mlflow_trt.ExecutionError as error:
                print(error.message)
            else:
                raise AssertionError("it answered")
            assert "CUDA failed" in session.broken(), session.broken()
        print("as expected", flush=True)
        os._exit(0)
        """,
    )
