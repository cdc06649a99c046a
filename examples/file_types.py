"""magika: Google's model that tells the type of a file from its first and last kilobyte."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from wheel_files import wheel_file

REQUIREMENT = "magika==1.0.3"
FOLDER = "magika/models/standard_v3_3"


def model_path() -> Path:
    """The ONNX model: `bytes` int32 [N, 2048] to `target_label` float32 [N, 214]."""
    return wheel_file(REQUIREMENT, f"{FOLDER}/model.onnx")


class Magika:
    """What surrounds the model: from files to its input, from its output to labels."""

    def __init__(self) -> None:
        config = json.loads(wheel_file(REQUIREMENT, f"{FOLDER}/config.min.json").read_text())
        self.labels: list[str] = config["target_labels_space"]
        self._head: int = config["beg_size"]
        self._tail: int = config["end_size"]
        self._block: int = config["block_size"]
        self._padding: int = config["padding_token"]

    def features(self, files: Iterable[Path]) -> npt.NDArray[np.int32]:
        """One row a file: its first and last bytes, without white space around them, padded in the middle."""
        return np.stack([self.row(path.read_bytes()) for path in files])

    def row(self, content: bytes) -> npt.NDArray[np.int32]:
        """The model's input for one file."""
        row = np.full(self._head + self._tail, self._padding, np.int32)
        head = content[: self._block].lstrip()[: self._head]
        tail = content[-self._block :].rstrip()[-self._tail :]
        row[: len(head)] = list(head)
        row[len(row) - len(tail) :] = list(tail)
        return row

    def best(self, scores: npt.NDArray[np.floating]) -> list[tuple[str, float]]:
        """For each row the likeliest label and its score."""
        return [(self.labels[int(row.argmax())], float(row.max())) for row in scores]
