from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from mlflow_trt import errors

ERRORS: dict[str, Any] = {
    name: value for name, value in vars(errors).items() if inspect.isclass(value) and name.endswith("Error")
}
STATUS = {
    "MlflowTrtError": 500,
    "OnnxModelError": 400,
    "OptionError": 400,
    "RecipeError": 400,
    "BuildError": 500,
    "UnsupportedModelError": 400,
    "ArtifactError": 500,
    "FormatError": 500,
    "IntegrityError": 500,
    "RuntimeUnavailableError": 500,
    "MissingDependencyError": 500,
    "EngineMismatchError": 500,
    "AccuracyError": 400,
    "SelfTestError": 500,
    "InputError": 400,
    "InputDtypeError": 400,
    "InputShapeError": 400,
    "InputTooLargeError": 413,
    "ExecutionError": 500,
    "OutOfMemoryError": 429,
    "ServerError": 500,
    "ServerTimeoutError": 504,
    "ServerUnavailableError": 503,
    "SessionClosedError": 500,
    "NotPicklableError": 500,
    "SignatureError": 500,
}


def test_every_error_has_its_status():
    assert {name: error("text").get_http_status_code() for name, error in ERRORS.items()} == STATUS


@pytest.mark.parametrize("name", [name for name in STATUS if name != "MlflowTrtError"])
def test_every_error_is_also_what_a_caller_would_catch(name):
    error = ERRORS[name]
    assert issubclass(error, errors.MlflowTrtError)
    assert issubclass(error, MlflowException)
    assert issubclass(error, (ValueError, RuntimeError))


def test_the_tree_is_drawn_as_it_is():
    for name, status in STATUS.items():
        if name != "MlflowTrtError":
            line = next(line for line in errors.__doc__.splitlines() if f" {name}" in line)
            assert str(status) in line


def test_errors_cross_processes():
    error = errors.UnsupportedModelError("cannot run", nodes=["If_0 (If)"], log=["line"])
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.message, copy.nodes, copy.log) == ("cannot run", ("If_0 (If)",), ("line",))
    assert copy.get_http_status_code() == 400
    for kind in ERRORS.values():
        assert pickle.loads(pickle.dumps(kind("text"))).message == "text"
