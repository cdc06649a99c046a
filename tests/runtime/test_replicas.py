"""Several sessions as one: on the CPU, where each stands for a GPU."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import networks
import numpy as np
import pytest
from failing import FailingSession
from helpers import PATIENCE, no_threads, read, reference

import mlflow_trt
from mlflow_trt import InputDtypeError, OutOfMemoryError, RuntimeUnavailableError, SessionClosedError
from mlflow_trt.backends.cuda_driver import Hardware
from mlflow_trt.core.types import ComputeCapability, Gpu
from mlflow_trt.errors import ExecutionError, InputShapeError
from mlflow_trt.runtime.replicas import ReplicaSession
from mlflow_trt.store import load as loading

ROWS = 1000
LOST = "unspecified launch failure"


@pytest.fixture
def source(tmp_path):
    return read(networks.product(), tmp_path)


@pytest.fixture
def gpus(source):
    return [FailingSession(source) for _ in range(3)]


@pytest.fixture
def session(gpus):
    with ReplicaSession(dict(enumerate(gpus))) as session:
        yield session


@pytest.fixture
def expected(source):
    with reference(source) as session:
        yield lambda feeds: session.run(feeds)["y"]


def rows(count, seed=0):
    return {"x": networks.rows(count, seed=seed)}


def meet(gpus, count):
    """Let so many GPUs wait for each other at their first run: none of them can do all of the work."""
    barrier = threading.Barrier(count, timeout=PATIENCE)
    for gpu in gpus:

        def first(gpu=gpu):
            gpu.before_run = lambda: None
            barrier.wait()

        gpu.before_run = first


class TestBulk:
    def test_every_gpu_takes_its_part(self, session, gpus, expected):
        meet(gpus, 3)
        feeds = rows(ROWS)
        assert np.allclose(session.run(feeds)["y"], expected(feeds), rtol=1e-6)
        assert all(gpu.runs[8] > 1 for gpu in gpus)
        assert session.runs == {8: ROWS // 8}

    def test_what_one_gpu_did_not_finish_is_done_by_the_others(self, session, gpus, expected, messages):
        gpus[1].failure, gpus[1].lost = ExecutionError("it fell off"), LOST
        meet(gpus, 3)
        feeds = rows(ROWS + 3)
        assert np.allclose(session.run(feeds)["y"], expected(feeds), rtol=1e-6)
        assert session.out_of_service == {1: LOST}
        assert "CUDA device 1 is out of service" in messages.text
        assert "2 of 3 are left" in messages.text
        before = gpus[1].runs
        assert np.allclose(session.run(feeds)["y"], expected(feeds), rtol=1e-6)
        assert gpus[1].runs == before

    def test_one_that_fails_last_leaves_its_rows_to_those_that_had_finished(self, session, gpus, expected):
        gpus[0].failure = ExecutionError("too late")
        others_done = threading.Event()
        gpus[0].before_run = lambda: others_done.wait(PATIENCE)
        feeds = rows(ROWS)
        with ThreadPoolExecutor() as pool:
            result = pool.submit(session.run, feeds)
            while sum(gpu.runs.get(8, 0) for gpu in gpus[1:]) < ROWS // 8 - 2:
                pass
            others_done.set()
            assert np.allclose(result.result()["y"], expected(feeds), rtol=1e-6)
        assert session.out_of_service == {}

    def test_what_fails_everywhere_is_an_error(self, session, gpus):
        for gpu in gpus:
            gpu.failure = ExecutionError("these rows cannot be run")
        with pytest.raises(ExecutionError, match="these rows"):
            session.run(rows(ROWS))

    def test_what_is_wrong_with_the_rows_is_not_tried_again(self, session, gpus):
        for gpu in gpus:
            gpu.failure = InputShapeError("wrong from here on")
            gpu.runs_before_failure = 3
        with pytest.raises(InputShapeError, match="wrong from here on"):
            session.run(rows(ROWS))
        assert sum(gpu.runs.get(8, 0) for gpu in gpus) <= 9

    def test_without_threads_one_gpu_does_what_others_cannot(self, session, gpus, expected):
        gpus[0].failure, gpus[0].runs_before_failure = ExecutionError("not now"), 2
        feeds = rows(ROWS)
        with no_threads():
            assert np.allclose(session.run(feeds)["y"], expected(feeds), rtol=1e-6)
        assert [gpu.runs.get(8, 0) for gpu in gpus] == [2, ROWS // 8 - 2, 0]

    def test_a_gpu_without_room_runs_less_at_once(self, session, gpus, expected):
        gpus[2].failure, gpus[2].runs_before_failure = OutOfMemoryError("no room"), 1

        def recover():
            if gpus[2].runs_before_failure < 0:
                gpus[2].failure = None

        gpus[2].before_run = recover
        feeds = rows(ROWS)
        assert np.allclose(session.run(feeds)["y"], expected(feeds), rtol=1e-6)


class TestCalls:
    def test_a_call_goes_where_there_is_least_to_do(self, session, gpus, expected):
        meet(gpus, 3)
        calls = [rows(2, seed) for seed in range(3)]
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(session.run, calls))
        for feeds, answer in zip(calls, answers, strict=True):
            assert np.allclose(answer["y"], expected(feeds), rtol=1e-6)
        assert [gpu.runs for gpu in gpus] == [{2: 1}] * 3

    def test_a_call_that_fails_is_run_on_another(self, session, gpus, expected, messages):
        gpus[0].failure = ExecutionError("not now")
        feeds = rows(2)
        assert np.allclose(session.run(feeds)["y"], expected(feeds), rtol=1e-6)
        assert session.out_of_service == {}
        assert "CUDA device 0, and is tried on the others: not now" in messages.text

    def test_a_gpu_that_is_lost_gets_no_more_calls(self, session, gpus, expected, messages):
        gpus[0].failure, gpus[0].lost = ExecutionError("it fell off"), LOST
        for seed in range(5):
            feeds = rows(2, seed)
            assert np.allclose(session.run(feeds)["y"], expected(feeds), rtol=1e-6)
        assert session.out_of_service == {0: LOST}
        assert session.broken() is None
        assert messages.text.count("out of service") == 1

    def test_all_are_lost(self, session, gpus):
        for gpu in gpus:
            gpu.failure, gpu.lost = ExecutionError("it fell off"), LOST
        for _ in range(2):
            with pytest.raises(ExecutionError, match="it fell off"):
                session.run(rows(2))
        assert sorted(session.out_of_service) == [0, 1, 2]
        assert session.broken() == "; ".join([LOST] * 3)

    def test_bad_input_is_refused_before_any_gpu_sees_it(self, session, gpus):
        with pytest.raises(InputDtypeError):
            session.run({"x": np.array([["a"] * 16])})
        assert not any(gpu.runs for gpu in gpus)

    def test_many_threads_with_failures(self, session, gpus, expected):
        gpus[2].failure, gpus[2].lost, gpus[2].runs_before_failure = ExecutionError("it fell off"), LOST, 40
        calls = [rows(count, seed=count) for count in [1, 3, 8, 20, 100] * 30]
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(session.run, calls))
        for feeds, answer in zip(calls, answers, strict=True):
            assert np.allclose(answer["y"], expected(feeds), rtol=1e-6)


def test_closing(gpus):
    session = ReplicaSession(dict(enumerate(gpus)))
    session.run(rows(3))
    session.close()
    with pytest.raises(SessionClosedError):
        session.run(rows(3))
    for gpu in gpus:
        with pytest.raises(SessionClosedError):
            gpu.run(rows(3))


class TestLoading:
    """Which GPUs a model is loaded on."""

    @pytest.fixture
    def opened(self, source, monkeypatch):
        """The GPUs that were opened, on a host with three of which the last one cannot run the model."""
        opened = {}

        def open_on(ordinal, *_):
            if ordinal == 2:
                raise RuntimeUnavailableError("an older one")
            opened[ordinal] = FailingSession(source)
            return opened[ordinal]

        kind = {"compute_capability": ComputeCapability(8, 6), "name": "RTX A", "memory": 1, "uuid": "GPU-1"}
        present = Hardware(gpus=tuple(Gpu(ordinal=ordinal, **kind) for ordinal in range(3)))
        monkeypatch.setattr(loading, "probe", lambda: present)
        monkeypatch.setattr(loading, "_open_on", open_on)
        return opened

    def test_a_list(self, opened, magika_folder):
        with mlflow_trt.load_model(str(magika_folder), device=[0, 1]) as session:
            assert sorted(opened) == [0, 1]
            assert session.description.endswith("(CUDA devices 0, 1)")
            assert session.runtime == "tensorrt"

    def test_all_that_can(self, opened, magika_folder, messages):
        with mlflow_trt.load_model(str(magika_folder), device="all"):
            assert sorted(opened) == [0, 1]
        assert "The model runs on CUDA devices [0, 1], not on 2: an older one" in messages.text

    def test_a_list_is_all_or_none(self, opened, magika_folder):
        with pytest.raises(RuntimeUnavailableError, match="an older one"):
            mlflow_trt.load_model(str(magika_folder), device=[1, 2])
        with pytest.raises(SessionClosedError):
            opened[1].run(rows(2))

    def test_one_of_a_list_is_one(self, opened, magika_folder):
        with mlflow_trt.load_model(str(magika_folder), device=[1]) as session:
            assert session is opened[1]


class TestSubmit:
    def submit(self, session, feeds):
        told, outcome = threading.Event(), []

        def done(outputs, error):
            outcome.append(error if outputs is None else outputs["y"])
            told.set()

        session.submit(feeds, done)
        assert told.wait(PATIENCE)
        return outcome[0]

    @pytest.mark.parametrize("count", [1, ROWS])
    def test_a_gpu_that_fails_leaves_it_to_the_others(self, session, gpus, expected, count):
        gpus[0].failure, gpus[0].lost = ExecutionError("it fell off"), LOST
        feeds = rows(count)
        assert np.allclose(self.submit(session, feeds), expected(feeds), rtol=1e-6)
        assert np.allclose(self.submit(session, feeds), expected(feeds), rtol=1e-6)

    @pytest.mark.parametrize("count", [1, ROWS])
    def test_without_threads(self, session, expected, count):
        feeds = rows(count)
        with no_threads():
            assert np.allclose(self.submit(session, feeds), expected(feeds), rtol=1e-6)

    def test_what_fails_everywhere_is_told(self, session, gpus):
        for gpu in gpus:
            gpu.failure = ExecutionError("it fell off")
        assert isinstance(self.submit(session, rows(1)), ExecutionError)
