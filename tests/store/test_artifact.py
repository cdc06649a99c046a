"""The model folder: what stands in it, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import shutil

import numpy as np
import pytest

from mlflow_trt import ArtifactError, FormatError, IntegrityError
from mlflow_trt.convert.onnx.model import sha256_of
from mlflow_trt.store.folder import read_folder
from mlflow_trt.store.record import RECORD_FILE


@pytest.fixture
def folder(cls_folder, tmp_path):
    shutil.copytree(cls_folder, tmp_path / "model")
    return tmp_path / "model"


def edit(folder, change):
    record = json.loads((folder / RECORD_FILE).read_text())
    change(record)
    (folder / RECORD_FILE).write_text(json.dumps(record))


def test_what_a_folder_holds(cls_folder):
    files = {str(path.relative_to(cls_folder)) for path in cls_folder.rglob("*") if path.is_file()}
    record = read_folder(cls_folder).record
    assert files == {
        "MLmodel",
        "conda.yaml",
        "python_env.yaml",
        "requirements.txt",
        "mlflow_trt.json",
        "precision_report.md",
        "golden.npz",
        "model.onnx",
        "typed/fp32.onnx",
        f"engines/tensorrt_rtx-{record.engines[0].version}-sm80plus.plan",
    }


def test_the_record_has_the_digest_of_everything(cls_folder):
    record = read_folder(cls_folder).record
    digests = dict(record.source.files) | dict(record.typed.files)
    digests |= {engine.file: engine.sha256 for engine in record.engines}
    assert digests == {name: sha256_of(cls_folder / name) for name in digests}
    assert record.source.digest == sha256_of(cls_folder / "model.onnx")


def test_an_unchanged_typed_model_is_not_written_twice(magika_folder):
    record = read_folder(magika_folder).record
    assert record.typed == record.source
    assert not (magika_folder / "typed").exists()


def test_one_changed_byte_of_an_engine_is_found_before_it_is_used(folder):
    model = read_folder(folder)
    plan = folder / model.record.engines[0].file
    content = bytearray(plan.read_bytes())
    content[len(content) // 2] ^= 1
    plan.write_bytes(content)
    with pytest.raises(IntegrityError, match="is not the file that was logged: its sha256 is") as caught:
        model.read_plan(model.record.engines[0])
    assert caught.value.path == plan


def test_a_changed_or_missing_model_is_found(folder):
    model = read_folder(folder)
    assert model.checked_model(model.record.typed) == folder / "typed/fp32.onnx"
    (folder / "typed/fp32.onnx").write_bytes(b"something else")
    with pytest.raises(IntegrityError, match=r"typed/fp32.onnx is not the file that was logged"):
        model.checked_model(model.record.typed)
    (folder / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"model.onnx is missing; download the model again"):
        model.checked_model(model.record.source)


def test_a_newer_format_is_refused(folder):
    edit(folder, lambda record: record.update(format=4, mlflow_trt_version="9.0", something="new"))
    with pytest.raises(FormatError, match=r"is of format 4, written by mlflow-trt 9.0; .* Upgrade mlflow-trt"):
        read_folder(folder)


def range_of(low, usual, high):
    return {"min": [low, 16], "opt": [usual, 16], "max": [high, 16]}


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"format": ' + b"9" * 5000 + b"}", b"\xff", b'{"format": NaN}'])
def test_what_is_no_json_is_refused(content, folder):
    (folder / RECORD_FILE).write_bytes(content)
    with pytest.raises(ArtifactError, match="is damaged|names no format"):
        read_folder(folder)


def test_a_record_that_is_too_large_is_not_read(folder):
    with (folder / RECORD_FILE).open("wb") as file:
        file.truncate(2**40)  # which takes no space
    with pytest.raises(ArtifactError, match="is larger than any record"):
        read_folder(folder)


def packed(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", packed(x=np.zeros(2**25, np.int8)), packed(x=np.array([object()])), packed(x=np.zeros(9))[:-30]],
    ids=["empty", "cut", "a bomb", "a pickle", "no directory"],
)
def test_a_golden_sample_that_is_none_is_refused(content, folder):
    (folder / "golden.npz").write_bytes(content)
    golden = {"file": "golden.npz", "sha256": hashlib.sha256(content).hexdigest(), "tolerance": {}}
    edit(folder, lambda record: record.update(golden=golden))
    model = read_folder(folder)
    with pytest.raises(ArtifactError, match=r"golden.npz is no golden sample"):
        model.read_golden(model.record.golden)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("format"), "names no format"),
        (lambda record: record.update(format=0), "names no format"),
        (lambda record: record.update(format=True), "names no format"),
        (lambda record: record.pop("engines"), "is damaged: engines: Field required"),
        (lambda record: record["recipe"].update(batch="many"), "is damaged: recipe"),
        (lambda record: record["engines"][0].update(file="../../etc/passwd"), "outside of the model folder"),
        (lambda record: record["source"]["files"].update({"/etc/passwd": "0"}), "outside of the model folder"),
        (lambda record: record["source"].update(file="../model.onnx"), "gives no sha256 for ../model.onnx"),
        (lambda record: record["typed"].update(file="/etc/passwd"), "gives no sha256 for /etc/passwd"),
        (lambda record: record["source"]["files"].update({"a" * 300: "0" * 64}), "cannot be the name of a file"),
        (lambda record: record["source"]["files"].update({"a\0": "0" * 64}), "cannot be the name of a file"),
        (lambda record: record["engines"][0].update(file="\ud800"), "cannot be the name of a file"),
        (lambda record: record["engines"][0].update(sha256="0"), "the sha256 of engines/.* is '0'"),
        (lambda record: record["engines"][0].update(version="1.x"), "built by '1.x', which is no release"),
        (lambda record: record["engines"][0].update(compute_capabilities=["hopper"]), "no compute capability"),
        (lambda record: record["outputs"].clear(), "there is no output"),
        (lambda record: record["inputs"].append(record["inputs"][0]), "there are two inputs"),
        (lambda record: record["inputs"][0].update(dtype="float1"), "is of the unknown dtype 'float1'"),
        (lambda record: record["outputs"][0].update(dtype="object"), "is of the unknown dtype 'object'"),
        (lambda record: record["inputs"][0].update(shape=[2**31]), "has the shape"),
        (lambda record: record["inputs"][0].update(shape=[-1, 16]), "has the shape"),
        (lambda record: record["batch_axis"].update(inputs=[]), "the batch axis is that of no input"),
        (lambda record: record["batch_axis"].update(inputs=["z"]), "the batch axis is that of 'z'"),
        (lambda record: record["profiles"][0]["ranges"].clear(), "profile 0 has no range for 'x'"),
        (lambda record: record["profiles"][0]["ranges"].update(z=range_of(1, 2, 3)), "there is no input 'z'"),
        (lambda record: record["profiles"][0]["ranges"].update(x=range_of(3, 2, 1)), "the range of 'x' is"),
        (lambda record: record["profiles"][0]["ranges"].update(x={"min": [], "opt": [], "max": []}), "the range of"),
        (lambda record: record["profiles"][0]["ranges"].update(x=range_of(1, 2, 2**40)), "the range of 'x' is"),
    ],
)
def test_a_damaged_record_is_refused(change, message, folder):
    edit(folder, change)
    with pytest.raises(ArtifactError, match=message):
        read_folder(folder)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="is not a model that mlflow-trt logged"):
        read_folder(tmp_path)
    (tmp_path / RECORD_FILE).mkdir()
    with pytest.raises(ArtifactError, match="cannot be read: Is a directory"):
        read_folder(tmp_path)
    (tmp_path / RECORD_FILE).rmdir()
    (tmp_path / RECORD_FILE).write_text("{")
    with pytest.raises(ArtifactError, match="is damaged"):
        read_folder(tmp_path)
