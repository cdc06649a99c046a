"""INT8 with calibration on real data, beside fp16 and fp32: how small, how far off, how often right.

    python examples/calibrate.py models

A classifier of text directions is quantized by the ranges of its tensors on some lines of a text, and measured on
others, of which the truth is known. The models are left in the folder, a new one; `precision_report.md` in each tells
more. Do not expect an engine to shrink with its weights: they are not all that it holds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from ocr_models import DIRECTION, Pixels, line_batch, line_picture, ocr_model
from rich.console import Console
from rich.table import Table

import mlflow_trt

WORDS = (Path(__file__).resolve().parent.parent / "LICENSE").read_text().split()
PRECISIONS = ("fp32", "fp16", "int8")


def lines(count: int, first_word: int) -> tuple[Pixels, Pixels]:
    """Lines of three words, each upright and upside down, and the truth about them."""
    pictures = []
    for number in range(count):
        start = first_word + 7 * number
        upright = line_picture(" ".join(WORDS[start : start + 3]), size=24 + number % 12)
        pictures += [upright, upright.rotate(180)]
    return line_batch(pictures, width=192), np.tile(np.float32([0, 1]), count)


def run(folder: Path, precision: str, batch: Pixels) -> Pixels:
    """The engine's outputs; without a GPU those of what it was built from."""
    try:
        with mlflow_trt.load_model(str(folder)) as session:
            (outputs,) = session.run({"x": batch}).values()
    except mlflow_trt.RuntimeUnavailableError:
        typed = ort.InferenceSession(folder / "typed" / f"{precision}.onnx", providers=["CPUExecutionProvider"])
        (outputs,) = typed.run(None, {"x": batch})
    return np.asarray(outputs, np.float32)


def main(target: Path) -> None:
    seen, _ = lines(32, first_word=0)
    held_out, truth = lines(64, first_word=600)
    table = Table(title=f"{DIRECTION}, {len(held_out)} pictures that calibration has not seen", title_justify="left")
    for heading in ("", "runs in it", "typed model kB", "engine kB", "relative error", "worst picture", "right"):
        table.add_column(heading, justify="right")
    for precision in PRECISIONS:
        folder = target / precision
        recipe = mlflow_trt.Recipe(precision=precision, batch=(1, 8, 32), shapes={"x": ((-1, 3, 48, 192),) * 3})
        mlflow_trt.save_model(ocr_model(DIRECTION), folder, recipe=recipe, calibration_data={"x": seen})
        report = json.loads((folder / "mlflow_trt.json").read_text())["precision_report"]
        (engine,) = (folder / "engines").iterdir()
        (measured,) = mlflow_trt.verify_model(str(folder), {"x": held_out}).outputs
        right = (run(folder, precision, held_out).argmax(axis=1) == truth).mean()
        table.add_row(
            precision,
            "all" if report["share"] is None else f"{report['share']:.0%}",
            f"{(folder / 'typed' / f'{precision}.onnx').stat().st_size / 1e3:.0f}",
            f"{engine.stat().st_size / 1e3:.0f}",
            f"{measured.relative_error:.1e}",
            f"{measured.worst_row_error:.1e}",
            f"{right:.1%}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "models"))
