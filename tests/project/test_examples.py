"""The examples, run as users run them. What they print is compared with the truth, or with ONNX Runtime."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import command_line
import nbformat
import numpy as np
import onnxruntime as ort
import pytest
from calibrate import lines
from file_types import Magika, model_path
from nbclient import NotebookClient
from ocr_models import DIRECTION, line_batch, line_picture, ocr_model
from orientation import TEXTS
from PIL import Image, ImageChops
from read_page import LINES, page
from repository import ROOT

EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.slow


def run(name: str, *arguments: object, cwd: Path) -> str:
    """What the script prints. It shall not use a GPU, so that the numbers are those of ONNX Runtime."""
    environment = {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"}
    code, printed, errors = command_line.run(*arguments, program=str(EXAMPLES / name), cwd=cwd, **environment)
    assert code == 0, errors
    return printed


def rows(printed: str) -> list[list[str]]:
    """The cells of the table, without its headings."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]


def reference(model: Path, batch: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: batch})[0])


def test_orientation(tmp_path):
    printed = run("orientation.py", cwd=tmp_path)
    pictures = []
    for number, text in enumerate(TEXTS):
        upright = line_picture(text, size=18 + 4 * number)
        pictures += [upright, upright.rotate(180)]
    expected = reference(ocr_model(DIRECTION), line_batch(pictures, 192)).max(axis=1)
    found = rows(printed)
    assert [row[0] for row in found] == [text for text in TEXTS for _ in range(2)]
    assert [(row[2], row[3]) for row in found] == [("0", "0"), ("180", "180")] * len(TEXTS)
    assert np.array([float(row[4]) for row in found]) == pytest.approx(expected, abs=1e-4)
    assert "16 of 16 are right" in printed


@pytest.mark.exhaustive
def test_read_page(tmp_path):
    found = rows(run("read_page.py", "read.png", cwd=tmp_path))
    assert [text for _, text in found] == [text for _, text in LINES]
    boxes = [tuple(map(int, box.split(", "))) for box, _ in found]
    for number, (left, top, right, bottom) in enumerate(boxes):
        ink = ImageChops.invert(page().convert("L")).crop((0, 30 + 80 * number, 640, 110 + 80 * number)).getbbox()
        assert ink is not None
        drawn = (ink[0], ink[1] + 30 + 80 * number, ink[2], ink[3] + 30 + 80 * number)
        assert np.abs(np.subtract((left, top, right, bottom), drawn)).max() <= 8, LINES[number]
    with Image.open(tmp_path / "read.png") as picture:
        for left, top, right, bottom in boxes:
            assert picture.getpixel((left, top)) == picture.getpixel((right, bottom)) == (255, 0, 0)
        assert (0, 0, 255) in {color for _, color in picture.getcolors(1 << 20)}


def test_folder_types(tmp_path):
    folder = tmp_path / "mine"
    (folder / ".hidden").mkdir(parents=True)
    (folder / ".hidden" / "config").write_text("[core]\n\tbare = false\n")
    for number in range(3):
        source = sorted(EXAMPLES.glob("*.py"))[number].read_text()
        (folder / f"without_suffix_{number}").write_text(source)
    line_picture("a picture").save(folder / "named.txt", format="PNG")
    with zipfile.ZipFile(folder / "archive", "w") as archive:
        archive.writestr("member", "text " * 100)
    printed = run("folder_types.py", folder, cwd=tmp_path)
    found = {row[0]: row[1:] for row in rows(printed)}
    assert {label: int(cells[0]) for label, cells in found.items()} == {"python": 3, "png": 1, "zip": 1}
    assert found["png"][2].startswith("named.txt")
    assert "5 files in" in printed
    sources = [folder / f"without_suffix_{number}" for number in range(3)]
    scores = reference(model_path(), Magika().features(sources)).max(axis=1)
    printed_score = float(re.findall(r"\(([\d.]+)\)", found["python"][2])[0])
    assert printed_score == pytest.approx(scores.min(), abs=1e-4)


@pytest.mark.exhaustive
def test_calibrate(tmp_path):
    found = {row[0]: row[1:] for row in rows(run("calibrate.py", "models", cwd=tmp_path))}
    assert list(found) == ["fp32", "fp16", "int8"]
    batch, truth = lines(64, first_word=600)
    expected = reference(ocr_model(DIRECTION), batch)
    sizes = []
    for precision, (_, typed, engine, error, _, right) in found.items():
        path = tmp_path / "models" / precision / "typed" / f"{precision}.onnx"
        outputs = reference(path, batch)
        measured = float(np.linalg.norm(outputs - expected) / np.linalg.norm(expected))
        # What is emulated rounds every value, and ONNX Runtime not all: the errors are of one size and not the same.
        assert float(error) <= 1e-6 if precision == "fp32" else 0.2 < float(error) / measured < 5
        assert right == f"{(outputs.argmax(axis=1) == truth).mean():.1%}"
        assert typed == f"{path.stat().st_size / 1e3:.0f}"
        (plan,) = (path.parent.parent / "engines").iterdir()
        assert engine == f"{plan.stat().st_size / 1e3:.0f}"
        sizes.append(path.stat().st_size)
    assert sizes == sorted(sizes, reverse=True)
    assert float(found["int8"][3]) > 10 * float(found["fp16"][3])
    assert 50 < int(found["int8"][0].rstrip("%")) <= 100


def test_pytorch_digits(store, tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="needs the extra test-torch")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    (torch, right, _, _), (name, same, difference, runner) = rows(run("pytorch_digits.py", cwd=tmp_path))
    assert (torch, name) == ("PyTorch", "digits-trt")
    assert 0.9 < float(right.rstrip("%")) / 100 <= 1
    assert (same, runner.startswith("ONNX Runtime")) == (right, True)
    assert float(difference) < 1e-3
    version = store.client.get_model_version_by_alias("digits-trt", "champion")
    assert version.tags["mlflow_trt.source"] == "models:/digits/1"
    assert version.tags["mlflow_trt.precision"] == "fp16"


@pytest.mark.exhaustive
@pytest.mark.server
def test_serve_and_ask(tmp_path):
    found = rows(run("serve_and_ask.py", cwd=tmp_path))
    assert [(row[0], row[1]) for row in found] == [
        (str(rows), wire) for rows in (1, 4, 16) for wire in ("client", "JSON")
    ]
    for _, _, median, slowest, speed, difference in found:
        assert 0 < float(median) <= float(slowest)
        assert float(speed.replace(",", "")) > 0
        assert float(difference) < 1e-5


@pytest.mark.exhaustive
def test_tour(store, tmp_path, monkeypatch):
    """The notebook, with a last cell that hands over what it computed."""
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    arrays = ", ".join(f"{name}.tolist()" for name in ("probabilities", "doubt", "pictures", "blends", "speed['rows']"))
    last = f"import json; print(json.dumps([registry.to_dict(), metrics, errors, {arrays}]))"
    notebook.cells.append(nbformat.v4.new_code_cell(last))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    printed = "".join(output["text"] for output in notebook.cells[-1].outputs if output.get("name") == "stdout")
    registry, metrics, errors, probabilities, doubt, batch, blends, sizes = json.loads(printed)
    model = ocr_model(DIRECTION)
    np.testing.assert_allclose(probabilities, reference(model, np.float32(batch)), atol=1e-5)
    np.testing.assert_allclose(doubt, reference(model, np.float32(blends)), atol=1e-5)
    assert np.argmax(probabilities, axis=1).tolist() == [number % 2 for number in range(10)]
    assert np.ptp(doubt, axis=0).min() > 0.9
    assert 0 < errors["fp16"] < errors["int8"] < 0.5
    for precision, values in metrics.items():  # what the notebook says of clear pictures
        assert values["mlflow_trt/save_infer_model_scale_0.tmp_1/relative_error"] < 1e-3 * errors[precision]
    assert set(registry["source"].values()) == {"models:/direction/1"}
    assert registry["description"]["direction-trt/1"].startswith("fp16, batch 1:8:32")
    assert registry["description"]["direction-trt/2"].startswith("int8, batch 1:8:32")
    assert sizes == [1, 8, 32]
    assert {
        model.tags["mlflow_trt.precision"] for model in store.logged_models() if "mlflow_trt.precision" in model.tags
    } == {
        "fp16",
        "int8",
    }
