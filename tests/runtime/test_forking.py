"""What happens to a loaded model that is pickled, copied, or inherited by a process that was forked."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import threading
from pathlib import Path

import mlflow
import networks
import numpy as np
import onnxruntime
import pytest
from helpers import PATIENCE, wait_for

import mlflow_trt
from mlflow_trt import NotPicklableError, RuntimeUnavailableError
from mlflow_trt.backends import cuda_driver
from mlflow_trt.core import forking

CPU = {"runtime": "onnxruntime"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model"
    mlflow_trt.save_model(networks.product(), path, batch=(1, 2, 4), verify=False)
    return path


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy], ids=lambda function: function.__name__)
def test_a_loaded_model_is_no_data(copied, folder):
    model = mlflow.pyfunc.load_model(str(folder), model_config=CPU)
    for loaded in (model, model.get_raw_model()):
        if loaded is model and copied is copy.copy:
            continue  # MLflow's wrapper with the same model in it
        with pytest.raises(NotPicklableError, match="Pass its URI"):
            copied(loaded)
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(model)


def end(processes):
    """Wait for processes that have done what they had to; one that hangs must not keep the tests from ending."""
    for process in processes:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()


def threads_here():
    return Path("/proc/self/task").iterdir()


def is_asleep(thread):
    """Whether it waits, which is when the process that has no such thread would wait for it for ever."""
    return (thread / "stat").read_text().rpartition(")")[2].split()[0] == "S"


def collect_garbage(collected):
    gc.collect()
    collected.set()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # is what this is about
def test_a_forked_process_does_not_destroy_sessions_that_were_garbage_before(folder):
    model = mlflow.pyfunc.load_model(str(folder), model_config=CPU)
    model.predict(networks.rows(3))
    context = multiprocessing.get_context("fork")
    collected = context.Event()
    process = context.Process(target=collect_garbage, args=(collected,))
    gc.disable()
    try:
        before = set(threads_here())
        session = onnxruntime.InferenceSession(networks.product().SerializeToString())
        wait_for(lambda: all(is_asleep(thread) for thread in set(threads_here()) - before))
        garbage = [session]  # made by whoever else uses ONNX Runtime in this process
        garbage.append(garbage)
        del session, garbage
        process.start()
    finally:
        gc.enable()
    end([process])
    assert collected.is_set()
    assert process.exitcode == 0


def predict_in_a_fork(model, folder, rows, answers):
    try:
        model.predict(rows)
    except RuntimeUnavailableError as error:
        answers.put(error.message)
    model.get_raw_model().close()
    del model  # which would wait for threads of ONNX Runtime that this process does not have
    own = mlflow.pyfunc.load_model(str(folder), model_config=CPU)
    answers.put(own.predict(rows)["y"])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # is what this is about
def test_a_process_that_is_forked_while_others_predict_gets_an_error_and_can_load_its_own(folder):
    model = mlflow.pyfunc.load_model(str(folder), model_config=CPU)
    rows, ended, running = networks.rows(3), threading.Event(), threading.Barrier(5)

    def predict():
        model.predict(rows)
        running.wait()
        while not ended.is_set():
            model.predict(rows)

    threads = [threading.Thread(target=predict) for _ in range(4)]
    for thread in threads:
        thread.start()
    running.wait()
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=predict_in_a_fork, args=(model, folder, rows, answers)) for _ in range(3)]
    try:
        for process in processes:
            process.start()
        given = [answers.get(timeout=PATIENCE) for _ in range(2 * len(processes))]
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        end(processes)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sum(isinstance(answer, str) and "loaded before this process was forked" in answer for answer in given) == 3
    expected = model.predict(rows)["y"]
    assert sum(isinstance(answer, np.ndarray) and np.array_equal(answer, expected) for answer in given) == 3


def test_after_a_fork_cuda_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(cuda_driver, "_initialized_in", forking.generation() - 1)
    assert "'spawn'" in str(cuda_driver.probe().problem)


def test_a_forked_process_frees_nothing(monkeypatch):
    class Owner:
        pass

    freed = []
    here, inherited = Owner(), Owner()
    forking.finalize(here, freed.append, "own")
    finalizer = forking.finalize(inherited, freed.append, "inherited")
    del here
    monkeypatch.setattr(forking, "_generation", forking.generation() + 1)
    finalizer()
    assert freed == ["own"]
