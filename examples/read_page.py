"""OCR of a page with two models, one that finds lines and one that reads them; what they found is drawn.

    python examples/read_page.py page.png

The page is rendered here, so that the truth is known; the detector runs in one size, the reader in batches of lines.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import mlflow
from ocr_models import DETECTOR, READER, Pixels, line_batch, ocr_model, pixels, texts
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from scipy import ndimage

import mlflow_trt

LINES = (
    (36, "Invoice 2047"), (20, "Delivered on 14 March, to be paid within 30 days"),
    (22, "12 graphics cards"), (22, "3 power supplies"), (22, "1 rack, 42 units"),
    (26, "Total: 18,412.50"), (18, "Thank you for your order. Questions? Call us."),
)  # fmt: skip
SIZE, WIDTH = 640, 640
Box = tuple[int, int, int, int]


def page() -> Image.Image:
    picture = Image.new("RGB", (SIZE, SIZE), "white")
    for number, (size, text) in enumerate(LINES):
        position = (40 + 12 * (number % 3), 40 + 80 * number)
        ImageDraw.Draw(picture).text(position, text, fill="black", font=ImageFont.load_default(size))
    return picture


def boxes(probability: Pixels) -> list[Box]:
    """Where text is, from top to bottom: connected pixels, and the edge that the detector leaves out."""
    regions, _ = ndimage.label(probability > 0.3)
    found = []
    for rows, columns in ndimage.find_objects(regions):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if min(height, width) < 5 or probability[rows, columns].max() < 0.6:
            continue
        edge = round(0.8 * height * width / (height + width))
        found.append((columns.start - edge, rows.start - edge, columns.stop + edge, rows.stop + edge))
    return sorted(found, key=lambda box: box[1])


def converted(name: str, folder: Path, inputs: dict[str, Pixels], **recipe: Any) -> mlflow.pyfunc.PyFuncModel:
    """One of the models for pictures of this size; where there is a GPU, its engine is compared on these inputs."""
    shapes = {"x": ((-1, *inputs["x"].shape[1:]),) * 3}
    mlflow_trt.save_model(ocr_model(name), folder, shapes=shapes, calibration_data=inputs, **recipe)
    return mlflow.pyfunc.load_model(str(folder), model_config={"runtime": "auto"})


def main(target: Path) -> None:
    picture = page()
    with tempfile.TemporaryDirectory() as temporary:
        whole = {"x": pixels(picture)[None]}
        finds = converted(DETECTOR, Path(temporary) / "detector", whole, batch=1)
        (probability,) = finds.predict(whole).values()
        found = boxes(probability[0, 0])
        lines = {"x": line_batch([picture.crop(box) for box in found], WIDTH)}
        reads = converted(READER, Path(temporary) / "reader", lines, batch=(1, 4, 16))
        (scores,) = reads.predict(lines).values()

    drawn = ImageDraw.Draw(picture)
    table = Table(title=f"Read by {reads.get_raw_model().description}", title_justify="left")
    for heading in ("left, top, right, bottom", "text"):
        table.add_column(heading)
    for box, text in zip(found, texts(scores), strict=True):
        drawn.rectangle(box, outline="red", width=2)
        drawn.text((box[0], box[3]), text, fill="blue", font=ImageFont.load_default(14))
        table.add_row(", ".join(map(str, box)), text)
    picture.save(target)
    console = Console(width=100)
    console.print(table)
    console.print(f"Drawn to {target}", soft_wrap=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "page.png"))
