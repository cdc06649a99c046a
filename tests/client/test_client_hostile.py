"""Answers of servers that are none, or that want to harm: typed errors, in time that grows with their size alone."""

from __future__ import annotations

import json

import pytest

from mlflow_trt.core import wire
from mlflow_trt.errors import InputError, ServerError

LARGE = 4 << 20
"""Bytes; what looked at such an answer again for each of its characters would not come back today."""


@pytest.mark.parametrize(
    "text",
    [
        "Failed to enforce schema of data '" + "' with schema '" * (LARGE // 15),
        "Failed to predict data '" + "'. \n" * (LARGE // 4),
        "Failed to enforce schema of data '" + "x' with schema 'y'. Error" * (LARGE // 25),
        "Failed to predict data '" + "'" * LARGE,
    ],
    ids=["schema", "predict", "error", "quotes"],
)
def test_large_errors_are_read_once(text):
    error = wire.error_of(400, json.dumps({"message": text}).encode())
    assert isinstance(error, InputError)
    assert len(error.message) < 3000
    wire.signature_in(json.dumps({"message": text}).encode())


@pytest.mark.parametrize("body", [b"[" * 200_000, b'{"a":' * 200_000, b'{"message":' * 100_000 + b"1"], ids=repr)
def test_nesting_without_an_end(body):
    assert isinstance(wire.error_of(500, body), ServerError)
    assert wire.signature_in(body) == {}
    with pytest.raises(ServerError, match="none of MLflow's scoring server"):
        wire.decode_answer(body)


@pytest.mark.parametrize(
    "answer",
    [
        {"dtype": "O", "shape": [1], "base64": "AAAAAAAAAAA="},
        {"dtype": "float32", "shape": [2**62], "base64": "AAAA"},
        {"dtype": "float32", "shape": "x", "base64": "AAAAAA=="},
        {"dtype": "float32", "shape": [1], "base64": 5},
        {"dtype": "float32", "shape": {"a": 1}, "base64": "AAAAAA=="},
        {"dtype": {"names": ["a"], "formats": ["f4"]}, "shape": [1], "base64": "AAAAAA=="},
        {"dtype": "f4,(1000000,1000000)f8", "shape": [1], "base64": "AAAAAA=="},
        {"dtype": [], "shape": [1], "base64": "AAAAAA=="},
        {"dtype": "m8[", "shape": [1], "base64": "AAAAAA=="},
    ],
    ids=str,
)
def test_packed_answers_that_are_none(answer):
    with pytest.raises(ServerError, match="none of MLflow's scoring server"):
        wire.decode_answer(json.dumps({"predictions": {"y": answer}}).encode())


@pytest.mark.parametrize("shape", ["(-, 1)", "(--1)", "(" + "9" * 5000 + ",)", "()", "(1 2)"])
def test_signatures_that_are_none(shape):
    text = f"'x': Tensor('float32', {shape})"
    found = wire.signature_in(json.dumps({"message": text}).encode())
    assert all(isinstance(size, int) for tensor in found.values() for size in tensor.shape)
