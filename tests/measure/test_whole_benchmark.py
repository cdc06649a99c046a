"""The benchmark of whole models, in short."""

from __future__ import annotations

import subprocess
import sys

import pytest
from repository import ROOT

pytest.importorskip("torch", reason="needs the extra test-torch")
pytest.importorskip("transformers", reason="needs the extra test-torch")
pytestmark = pytest.mark.slow


def test_it_prints_its_table():
    command = [
        sys.executable, "-m", "benchmarks.whole_models", "--runtime", "onnxruntime", "--precision", "fp32",
        "--models", "bert", "--layers", "1", "--seconds", "0", "--sizes", "1,4", "--no-compile",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    for text in ("BERT, 1 layers, labels", "tokenizer alone", "whole model, fp32, onnxruntime", "all but the network"):
        assert text in result.stdout
