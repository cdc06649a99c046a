"""Image classification with preprocessing: which lines of text are upside down?

    python examples/orientation.py

The classifier takes float32 [N, 3, 48, 192], while pictures have any size and color. What lies between is up to the
program, and stands in `ocr_models.line_batch`: scale, pad, transpose, normalize. The model gets all in one batch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import mlflow
from ocr_models import DIRECTION, line_batch, line_picture, ocr_model
from rich.console import Console
from rich.table import Table

import mlflow_trt

TEXTS = (
    "Registered model", "engine for sm86", "The quick brown fox", "batch 1:8:64",
    "Hello, world!", "fp16 and int8", "Kernel specialization", "jumps over the lazy dog",
)  # fmt: skip
LABELS = (0, 180)


def main() -> None:
    pictures = []
    for number, text in enumerate(TEXTS):
        upright = line_picture(text, size=18 + 4 * number)
        pictures += [(text, angle, upright.rotate(angle)) for angle in LABELS]
    batch = line_batch([picture for _, _, picture in pictures], width=192)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "direction"
        mlflow_trt.save_model(
            ocr_model(DIRECTION),
            folder,
            precision="fp16",
            batch=(1, 8, 32),
            shapes={"x": ((-1, 3, 48, 192),) * 3},
            calibration_data=batch[::2],  # ranges are seen on these, and accuracy is measured
        )
        model = mlflow.pyfunc.load_model(str(folder), model_config={"runtime": "auto"})
        (probabilities,) = model.predict({"x": batch}).values()
        session = model.get_raw_model()

    table = Table(title=f"{len(batch)} pictures, run by {session.description}", title_justify="left")
    for heading in ("text", "picture", "is turned by", "label", "probability"):
        table.add_column(heading)
    right = 0
    for (text, angle, picture), row in zip(pictures, probabilities, strict=True):
        label = LABELS[row.argmax()]
        right += label == angle
        size = f"{picture.width} x {picture.height}"
        table.add_row(text, size, str(angle), str(label) + ("" if label == angle else "  WRONG"), f"{row.max():.4f}")
    console = Console(width=100)
    console.print(table)
    console.print(f"{right} of {len(batch)} are right.")
    session.close()


if __name__ == "__main__":
    main()
