"""What of a whole model goes into the folder, and what is there instead of weights."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.whole_model import NetworkCall, NetworkKind
from mlflow_trt.errors import ArtifactError
from mlflow_trt.flavor.environment import with_requirements_of
from mlflow_trt.flavor.whole.hollow import fill, hollow_weights
from mlflow_trt.flavor.whole.loading import split_config
from mlflow_trt.flavor.whole.package import WholeSource, write_whole

CALL = NetworkCall(kind=NetworkKind.TORCH, inputs=("x",), outputs=("y",))


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    for name in ("MLmodel", "model/config.json", "model/model.safetensors", "model/pytorch_model-00001-of-2.bin",
                 "dense/model.safetensors", "code/__pycache__/a.pyc", "code/a.py", "registered_model_meta",
                 "exported/model.onnx"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    weights = {Path("model"): hollow_weights({"w": np.zeros((3, 4), np.float32)})}
    return WholeSource(folder=folder, flavor="transformers", network="pipeline.model", call=CALL, weights=weights)


def test_all_but_the_weights_is_kept(source, tmp_path):
    (tmp_path / "made").mkdir()
    whole = write_whole(source, tmp_path / "made", None)
    assert set(whole.files) == {
        "whole/MLmodel", "whole/model/config.json", "whole/model/model.safetensors", "whole/dense/model.safetensors",
        "whole/code/a.py",
    }  # fmt: skip
    assert whole.hollow == ("whole/model/model.safetensors",)
    assert (tmp_path / "made" / "whole" / "dense" / "model.safetensors").read_text() == "dense/model.safetensors"


def test_the_digest_is_that_of_what_is_kept(source):
    before = source.digest
    (source.folder / "model" / "model.safetensors").write_text("other weights")
    assert source.digest == before
    (source.folder / "model" / "config.json").write_text("another")
    assert source.digest != before


def test_links_that_lead_out_are_refused(source, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (source.folder / "model" / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match=r"model/vocab.txt is a link that leads out of the model"):
        source.digest  # noqa: B018  # which reads every file


def test_hollow_weights_are_as_large_as_they_say(tmp_path):
    tensors = {
        "a": np.zeros((1000, 100), np.float32), "b": np.zeros(7, np.int64), "c": np.zeros((), ml_dtypes.bfloat16),
        "d": np.zeros(3, np.complex64),
    }  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(hollow_weights(tensors))
    (tmp_path / "model" / "config.json").write_text("{}")
    with fill(tmp_path, ["model/model.safetensors", "model/config.json"], ["model/model.safetensors"]) as filled:
        content = (filled / "model" / "model.safetensors").read_bytes()
        assert (filled / "model" / "config.json").read_text() == "{}"
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert set(header) == {"__metadata__", "a", "b", "c"}
    assert header["b"] == {"dtype": "I64", "shape": [7], "data_offsets": [400_000, 400_056]}
    assert len(content) == 8 + size + 400_058
    assert not any(content[8 + size :])
    assert not filled.exists()


def test_settings_are_split_by_name():
    ours, theirs = split_config({"runtime": "auto", "batch_size": 8, "device": 1})
    assert ours == {"runtime": "auto", "device": 1}
    assert theirs == {"batch_size": 8}
    assert split_config(None) == ({}, {})
    assert LoadSettings.of(ours).runtime == "auto"


def test_settings_that_are_called_like_ours_stay_the_sources(source):
    both = WholeSource(
        folder=source.folder, flavor="python_model", network="python_model.net", call=CALL,
        config={"device": "cuda:1", "top": 3},
    )  # fmt: skip
    assert both.own_settings == {"device": "cuda:1"}
    assert both.other_settings == {"top": 3}


def test_requirements_are_both_and_the_sources_versions_count(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text("mlflow==3.9\nTorch>=2\n\n# a comment\n--find-links x\n./local.whl\n")
    found = with_requirements_of(file, ["mlflow==3.17", "numpy==2.1", "mlflow-trt[rtx]==0.1"])
    assert found == ["mlflow==3.9", "Torch>=2", "./local.whl", "numpy==2.1", "mlflow-trt[rtx]==0.1"]
    assert with_requirements_of(tmp_path / "missing", ["numpy"]) == ["numpy"]
