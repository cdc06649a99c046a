"""The models that the tests convert: real ones from PyPI wheels, and a generated transformer.

Each comes with inputs on which its outputs vary, since a comparison of constant outputs proves nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
from file_types import Magika
from PIL import Image, ImageDraw, ImageFont
from repository import ROOT
from wheel_files import wheel_file

Feeds = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class RealModel:
    """A model, how to convert it, its inputs for a number of rows, and how far TensorRT's TF32 may be off.

    `rows_at_once` are batches: one below, some within and one above the profile, where it has a batch axis.
    """

    name: str
    path: Callable[[], Path | onnx.ModelProto]
    recipe: Mapping[str, Any]
    feeds: Callable[[int], Feeds]
    rows_at_once: tuple[int, ...]
    relative_error: float = 3e-3
    varies: bool = True


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def text_image(text: str, width: int, height: int, size: int, at: tuple[int, int]) -> np.ndarray:
    """Black text on white as the OCR models want it: float32 [3, height, width] between -1 and 1."""
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text(at, text, fill="black", font=_font(size))
    return np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1


def _lines(rows: int) -> list[str]:
    words = ["engine", "profile", "context", "kernel", "stream", "tensor", "graph", "batch", "latency", "precision"]
    return [f"{words[i % 10]} {words[(3 * i + 1) % 10]} {i}" for i in range(rows)]


def pages(rows: int, height: int = 320, width: int = 320) -> Feeds:
    lines = _lines(rows)
    return {"x": np.stack([text_image(line, width, height, 28, (20 + 5 * i, 60)) for i, line in enumerate(lines)])}


def lines(rows: int, width: int = 320) -> Feeds:
    return {"x": np.stack([text_image(line, width, 48, 30, (8, 6)) for line in _lines(rows)])}


def turned_lines(rows: int) -> Feeds:
    """Lines upright, upside down, and blends of both, of which the classifier is not sure: errors would show."""
    upright = lines(rows, 192)["x"]
    share = np.resize(np.array([1, 0.35, 0, 0.45, 0.5, 0.4], np.float32), rows)[:, None, None, None]
    return {"x": share * upright + (1 - share) * upright[:, :, ::-1, ::-1]}


def files(rows: int) -> Feeds:
    """Files of this repository, whose types magika is sure of, and excerpts of them, of which it is not."""
    magika = Magika()
    paths = [*sorted((ROOT / "mlflow_trt").rglob("*.py")), ROOT / "Makefile", ROOT / "pyproject.toml"]
    contents = [path.read_bytes() for path in paths if path.stat().st_size > 700]
    features = []
    for number in range(rows):
        content = contents[-1 - number % len(contents)]
        middle = len(content) // 2
        features.append(magika.row(content[middle : middle + 60] if number % 2 else content))
    return {"bytes": np.stack(features)}


def speech(frames: int) -> Feeds:
    """A tone that swells and fades over a little noise, in frames of 576 samples at 16 kHz.

    Without the noise the spectrum has zeros, whose logarithm no two runtimes agree on.
    """
    time = np.arange(frames * 576) / 16_000
    swell = np.sin(2 * np.pi * 0.7 * time) ** 2
    tone = sum(np.sin(2 * np.pi * hertz * time) / (1 + i) for i, hertz in enumerate((140, 280, 420, 900)))
    noise = np.random.default_rng(3).standard_normal(time.shape) * 0.01
    signal = (0.3 * swell * tone + noise).astype(np.float32).reshape(frames, 576)
    return {"input": signal, "h": np.zeros((1, 1, 128), np.float32), "c": np.zeros((1, 1, 128), np.float32)}


def light_model(name: str) -> Path:
    """One of the architectures with constant weights in the onnx package: good for building, not for accuracy."""
    return Path(onnx.__file__).parent / "backend/test/data/light" / f"light_{name}.onnx"


_RAPIDOCR = "rapidocr==3.10.0"

MAGIKA = RealModel(
    name="magika",
    path=lambda: wheel_file("magika==1.0.3", "magika/models/standard_v3_3/model.onnx"),
    recipe={"batch": (2, 8, 16)},
    feeds=files,
    rows_at_once=(1, 2, 7, 16, 35),
)
DET = RealModel(
    name="det",
    path=lambda: wheel_file(_RAPIDOCR, "rapidocr/models/PP-OCRv6_det_small.onnx"),
    recipe={"batch": 2, "shapes": {"x": ((-1, 3, 320, 320),) * 3}},
    feeds=pages,
    rows_at_once=(1, 2, 3),
)
# Built, but not compared on a GPU: on Hopper, which is no official target, TensorRT-RTX 1.6 computes this model wrongly
# for most dynamic shapes (relative errors above 1), in a bare loop too, and rightly for static ones.
DET_DYNAMIC = replace(
    DET,
    name="det with dynamic height and width",
    recipe={"batch": (1, 1, 2), "shapes": {"x": ((-1, 3, 32, 32), (-1, 3, 320, 320), (-1, 3, 640, 640))}},
)
REC = RealModel(
    name="rec",
    path=lambda: wheel_file(_RAPIDOCR, "rapidocr/models/PP-OCRv6_rec_small.onnx"),
    recipe={"batch": (1, 4, 4), "shapes": {"x": ((-1, 3, 48, 32), (-1, 3, 48, 320), (-1, 3, 48, 640))}},
    feeds=lines,
    rows_at_once=(1, 4, 6),
)
CLS = RealModel(
    name="cls",
    path=lambda: wheel_file(_RAPIDOCR, "rapidocr/models/ch_ppocr_mobile_v2.0_cls_mobile.onnx"),
    recipe={"batch": (1, 4, 8), "shapes": {"x": ((-1, 3, 48, 192),) * 3}},
    feeds=turned_lines,
    rows_at_once=(1, 4, 8, 11),
    relative_error=1e-2,
)
SILERO = RealModel(
    name="silero",
    path=lambda: wheel_file("silero-vad==6.2.3", "silero_vad/data/silero_vad_16k_sequence.onnx"),
    recipe={"shapes": {"input": ((1, 576), (32, 576), (256, 576))}},
    feeds=speech,
    rows_at_once=(1, 32, 200),
)
TRANSFORMER = RealModel(
    name="transformer",
    path=networks.transformer,
    recipe={"batch": (2, 4, 8), "shapes": {"input_ids": ((-1, 4), (-1, 24), (-1, 48))}},
    feeds=lambda rows: networks.sentences(rows, 24),
    rows_at_once=(1, 2, 5, 8, 19),
)
SQUEEZENET = RealModel(
    name="squeezenet",
    path=lambda: light_model("squeezenet"),
    recipe={},
    feeds=lambda rows: {"data_0": np.random.default_rng(rows).random((1, 3, 224, 224), np.float32)},
    rows_at_once=(1,),
    varies=False,
)

ON_THE_GPU = (MAGIKA, DET, REC, CLS, SILERO, TRANSFORMER)
ALL = (*ON_THE_GPU, DET_DYNAMIC, SQUEEZENET)


def calibration_data(model: RealModel) -> Feeds | list[Feeds]:
    """Real inputs, enough to calibrate with."""
    if model.name == "silero":
        return [model.feeds(frames) for frames in range(20, 100, 10)]
    return model.feeds(35 if model.name == "magika" else 8)


def nested_if() -> Path:
    """silero's first export: control flow inside control flow, which TensorRT cannot run."""
    return wheel_file("silero-vad==6.2.3", "silero_vad/data/silero_vad.onnx")
