"""PP-OCR's models, from the wheel of rapidocr, and what surrounds them: pictures in, texts out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from PIL import Image, ImageDraw, ImageFont
from wheel_files import wheel_file

REQUIREMENT = "rapidocr==3.10.0"
DETECTOR = "PP-OCRv6_det_small.onnx"
"""Where is text? `x` float32 [N, 3, H, W], multiples of 32, to the probability of each pixel [N, 1, H, W]."""
READER = "PP-OCRv6_rec_small.onnx"
"""What does a line say? `x` float32 [N, 3, 48, W] to the scores of all characters at W / 8 places [N, W / 8, 18710]."""
DIRECTION = "ch_ppocr_mobile_v2.0_cls_mobile.onnx"
"""Is a line upside down? `x` float32 [N, 3, 48, 192] to the probabilities of 0 and 180 degrees [N, 2]."""

Pixels = npt.NDArray[np.float32]


def ocr_model(name: str) -> Path:
    return wheel_file(REQUIREMENT, f"rapidocr/models/{name}")


def line_picture(text: str, size: int = 30) -> Image.Image:
    """Black text on white, with a margin."""
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(text)
    picture = Image.new("RGB", (int(right - left) + size // 2, int(bottom - top) + size // 2), "white")
    ImageDraw.Draw(picture).text((size // 4 - left, size // 4 - top), text, fill="black", font=font)
    return picture


def pixels(picture: Image.Image) -> Pixels:
    """A picture as the models take it: float32 [3, H, W] between -1 and 1."""
    return np.asarray(picture.convert("RGB"), np.float32).transpose(2, 0, 1) / 127.5 - 1


def line_batch(pictures: Iterable[Image.Image], width: int) -> Pixels:
    """Lines as a batch [N, 3, 48, width]: scaled to 48 rows, narrowed where too long, padded with gray on the right."""
    rows = []
    for picture in pictures:
        scaled = picture.resize((min(width, round(48 * picture.width / picture.height)), 48), Image.Resampling.BILINEAR)
        rows.append(np.pad(pixels(scaled), ((0, 0), (0, 0), (0, width - scaled.width))))
    return np.stack(rows)


def texts(scores: npt.NDArray[np.floating]) -> list[str]:
    """What the reader's scores say: the best character at each place, repetitions and blanks left out."""
    (stored,) = (item.value for item in onnx.load(ocr_model(READER)).metadata_props if item.key == "character")
    characters = ["", *stored.split("\n"), " "]  # the first one is the blank
    found = []
    for row in scores.argmax(axis=2):
        changes = np.append(True, row[1:] != row[:-1])
        found.append("".join(characters[index] for index in row[changes]).strip())
    return found
