"""`precision="best"` on the GPU: every candidate is really run and timed."""

from __future__ import annotations

import mlflow
import networks
import numpy as np
import pytest
from command_line import run
from compare import relative_error
from real_models import MAGIKA, TRANSFORMER, calibration_data

import mlflow_trt
from mlflow_trt import Precision, RecipeError, Tolerance
from mlflow_trt.core.selection import Fate, choose, is_as_fast
from mlflow_trt.pipeline.best import ROUNDS
from mlflow_trt.store.folder import read_folder

pytestmark = pytest.mark.gpu

MEASURED = {Fate.WON, Fate.SLOWER, Fate.LESS_ACCURATE}


@pytest.mark.parametrize("model", [MAGIKA, TRANSFORMER], ids=lambda model: model.name)
def test_the_fastest_that_is_accurate_enough_is_kept(model, tmp_path, report):
    folder, data = tmp_path / "best", calibration_data(model)
    mlflow_trt.save_model(model.path(), folder, **model.recipe, precision="best", calibration_data=data)
    record = read_folder(folder).record
    selection = record.selection
    for one in selection.candidates:
        time = "" if one.latency is None else f"{one.latency:.4f} ms, {min(one.milliseconds):.4f} at best"
        errors = ", ".join(
            f"{what} {error:.2e}" for what, error in (("engine", one.engine_error), ("emulated", one.typed_error))
            if error is not None
        )  # fmt: skip
        report((model.name, f"best: {one.precision}", str(one.fate), time, errors, one.reason[:120], ""))

    assert "TensorRT" in selection.measured_on
    raced = [candidate for candidate in selection.candidates if candidate.fate in MEASURED]
    assert {str(candidate.precision) for candidate in raced} >= {"fp32", "fp16", "bf16"}
    for candidate in raced:
        assert len(candidate.milliseconds) == ROUNDS
        assert min(candidate.milliseconds) > 0
        assert 0 < candidate.engine_error < Tolerance.default(candidate.precision).relative_error
    winner = next(candidate for candidate in raced if candidate.fate is Fate.WON)
    assert winner.precision is record.recipe.precision
    assert is_as_fast(winner, min(raced, key=lambda candidate: candidate.latency))
    assert all(candidate.reason for candidate in selection.candidates)

    # It is what its own precision makes, and it answers rightly.
    asked = tmp_path / "asked"
    mlflow_trt.save_model(model.path(), asked, **model.recipe, precision=winner.precision, calibration_data=data)
    assert read_folder(asked).record.typed.digest == record.typed.digest
    feeds = model.feeds(8)
    with mlflow_trt.load_model(str(folder), runtime="onnxruntime") as session:
        expected = session.run(feeds)
    actual = mlflow.pyfunc.load_model(str(folder)).predict(feeds)
    assert 0 < relative_error(actual, expected) < Tolerance.default(winner.precision).relative_error


def test_a_second_measurement_chooses_alike(tmp_path):
    """By the rule, two runs may differ only where the candidates are as fast within the noise."""
    chosen = []
    for name in ("first", "second"):
        mlflow_trt.save_model(
            TRANSFORMER.path(), tmp_path / name, **TRANSFORMER.recipe, precision="best",
            calibration_data=calibration_data(TRANSFORMER),
        )  # fmt: skip
        chosen.append(read_folder(tmp_path / name).record.selection)
    first, second = ({c.precision: c for c in selection.candidates} for selection in chosen)
    a, b = chosen[0].winner, chosen[1].winner
    if a is not b:
        slack = 1.3
        assert first[b].latency < slack * first[a].latency
        assert second[a].latency < slack * second[b].latency


def test_engines_beyond_the_tolerance_lose_however_fast_they_are(tmp_path, report):
    data = {"x": networks.rows(64, width=512)}
    mlflow_trt.save_model(
        networks.product(width=512), tmp_path / "m", precision="best", batch=(1, 32, 64), calibration_data=data,
        verify=Tolerance(relative_error=1.5e-3),
    )  # fmt: skip
    candidates = {str(c.precision): c for c in read_folder(tmp_path / "m").record.selection.candidates}
    for name, one in candidates.items():
        report(
            ("product", f"best: {name}", str(one.fate), str(one.latency), str(one.engine_error), one.reason[:90], "")
        )
    assert candidates["int8"].fate is candidates["bf16"].fate is Fate.FAILED_GATE
    assert "at most 0.0015 is tolerated" in candidates["int8"].reason
    assert len(candidates["int8"].milliseconds) == ROUNDS
    assert choose([c for c in candidates.values() if c.fate is Fate.FAILED_GATE]) is None


def test_the_command_and_the_picture(tmp_path):
    data, output = tmp_path / "data.npz", tmp_path / "m"
    np.savez(data, **calibration_data(MAGIKA))
    code, shown, errors = run(
        "convert", MAGIKA.path(), "--best", "--batch", "2:8:16", "--output", output, "--calibration-data", data
    )
    assert code == 0, errors
    assert "candidates, measured on" in shown
    assert "won" in shown
    assert "## Candidates for best" in (output / "precision_report.md").read_text()
    assert (output / "candidates.png").exists() or "pictures need matplotlib" in errors


def test_engines_for_other_gpus_are_refused_before_any_work(tmp_path):
    with pytest.raises(RecipeError, match="precision 'best' is measured on the GPU of this machine"):
        mlflow_trt.save_model(tmp_path / "missing.onnx", tmp_path / "m", precision=Precision.BEST, targets=["sm75"])
