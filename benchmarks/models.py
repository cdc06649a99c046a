"""What is measured: ResNet-50, a BERT-base, a detector, and two of the real models that the tests convert."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from benchmarks.networks import bert, detector, pictures, sentences
from benchmarks.resnet50 import images, resnet50

Feeds = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class BenchmarkModel:
    """A model, how it is converted, inputs for any number of rows, and how many rows make a bulk."""

    name: str
    source: Callable[[], Path | onnx.ModelProto]
    feeds: Callable[[int], Feeds]
    bulk: int
    recipe: dict[str, Any] = field(default_factory=dict)


def _repeated(make: Callable[[int], Feeds], most: int) -> Callable[[int], Feeds]:
    """Inputs that take long to make, repeated where many are wanted."""

    def feeds(rows: int) -> Feeds:
        return {name: np.resize(array, (rows, *array.shape[1:])) for name, array in make(min(rows, most)).items()}

    return feeds


def _resnet50() -> BenchmarkModel:
    return BenchmarkModel(
        name="resnet50",
        source=resnet50,
        feeds=lambda rows: {"image": images(rows)},
        bulk=4096,
        recipe={"precision": "fp16", "batch": (1, 8, 128), "calibration_data": {"image": images(4)}},
    )


def _bert() -> BenchmarkModel:
    return BenchmarkModel(
        name="bert",
        source=bert,
        feeds=sentences,
        bulk=1024,
        recipe={"precision": "fp16", "batch": (1, 8, 128), "calibration_data": sentences(4)},
    )


def _detector() -> BenchmarkModel:
    return BenchmarkModel(
        name="detector",
        source=detector,
        feeds=lambda rows: {"images": pictures(rows)},
        bulk=1024,
        recipe={"precision": "fp16", "batch": (1, 8, 128), "calibration_data": {"images": pictures(4)}},
    )


def _rec() -> BenchmarkModel:
    real_models = _real_models()
    return BenchmarkModel(
        name="rec",
        source=real_models.REC.path,
        feeds=_repeated(real_models.lines, 64),
        bulk=512,
        recipe={"batch": (1, 8, 32), "shapes": {"x": ((-1, 3, 48, 320),) * 3}},
    )


def _magika() -> BenchmarkModel:
    real_models = _real_models()
    return BenchmarkModel(
        name="magika",
        source=real_models.MAGIKA.path,
        feeds=_repeated(real_models.files, 64),
        bulk=8192,
        recipe={"precision": "fp16", "batch": (1, 8, 128), "calibration_data": real_models.files(16)},
    )


@functools.cache
def _real_models() -> Any:
    """The tests' own module: wheels are fetched when their models are asked for."""
    root = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(root / "tests" / "support"), str(root / "examples")]
    import real_models

    return real_models


MODELS: dict[str, Callable[[], BenchmarkModel]] = {
    "resnet50": _resnet50,
    "rec": _rec,
    "magika": _magika,
    "bert": _bert,
    "detector": _detector,
}
