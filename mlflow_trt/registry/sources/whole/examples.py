"""What a whole model is run with to see how it calls its network: its input example, or data that the user names."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.data.dataset import Dataset
from mlflow.models import Model

from mlflow_trt.errors import InputError, OnnxModelError
from mlflow_trt.pipeline.user_samples import features_in

_IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
_MOST_ROWS = 64


def inputs_of(model: Model, folder: Path, data: Any) -> Any:
    """The inputs to run the source with: `data`, or else its input example.

    Raises InputError for data that cannot be read, OnnxModelError where there is neither.
    """
    if data is not None:
        return _as_taken(read_data(data), model)
    example = model.load_input_example(str(folder))
    if example is None:
        raise OnnxModelError(
            "the model has no input example to run it with, which shows how it calls its network; log it again with "
            "input_example=, or give --data FILE (calibration_data=)"
        )
    return example


def _as_taken(rows: Any, model: Model) -> Any:
    """Rows in the form that a model takes: a column of the name that its signature has, base64 for image pipelines."""
    if not isinstance(rows, list):
        return rows
    schema = model.get_input_schema()
    if schema is not None and not schema.is_tensor_spec() and len(schema.inputs) == 1 and schema.has_input_names():
        return pd.DataFrame({schema.input_names()[0]: rows})
    if "transformers" in model.flavors:
        return [base64.b64encode(row).decode() if isinstance(row, bytes) else row for row in rows]
    return rows


def read_data(data: Any) -> Any:
    """Rows for a pyfunc from a `.csv`, `.jsonl`, `.parquet`, `.txt` or a folder of images; what is no path stays.

    A file with one column gives a list of its values, which every flavor takes.
    """
    if isinstance(data, Dataset):
        frame = features_in(data)
        data = data if frame is None else frame
    if not isinstance(data, (str, os.PathLike)):
        return data
    path = Path(data)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _IMAGES)[:_MOST_ROWS]
        if not files:
            raise InputError(f"{path} has no images ({', '.join(sorted(_IMAGES))})")
        return [file.read_bytes() for file in files]
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".csv": pd.read_csv,
        ".parquet": pd.read_parquet,
        ".jsonl": lambda file: pd.DataFrame([json.loads(line) for line in file.read_text().splitlines() if line]),
        ".txt": lambda file: pd.DataFrame({"text": file.read_text().splitlines()}),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: expected one of {', '.join(readers)}, or a folder of images, for a whole model")
    try:
        frame = reader(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if len(frame.columns) == 1:
        return frame.iloc[:, 0].tolist()
    return frame


def variations(inputs: Any) -> Iterator[Any]:
    """The inputs, and others made of them that differ in rows and in lengths; some models refuse some of these."""
    yield inputs
    yield from _with_rows(inputs)
    # What is cut off at the longest that the tokenizer takes does not vary by growing.
    for change in (lambda text: f"{text} {text}", lambda text: text.partition(" ")[0]):
        changed = _with_texts(inputs, change)
        if changed is not None:
            yield changed


def _with_rows(inputs: Any) -> Iterator[Any]:
    """The first row alone, and all rows and the first again."""
    if isinstance(inputs, pd.DataFrame) and len(inputs):
        yield inputs.iloc[:1]
        yield pd.concat([inputs, inputs.iloc[:1]], ignore_index=True)
    elif isinstance(inputs, np.ndarray) and inputs.ndim:
        yield inputs[:1]
        yield np.concatenate([inputs, inputs[:1]])
    elif isinstance(inputs, list) and inputs:
        yield inputs[:1]
        yield [*inputs, inputs[0]]
    elif isinstance(inputs, str):
        yield [inputs, inputs]
    elif (
        isinstance(inputs, dict) and inputs and all(isinstance(value, (list, np.ndarray)) for value in inputs.values())
    ):
        yield {name: value[:1] for name, value in inputs.items()}
        yield {
            name: np.concatenate([value, value[:1]]) if isinstance(value, np.ndarray) else [*value, value[0]]
            for name, value in inputs.items()
        }


def _with_texts(inputs: Any, change: Callable[[str], str]) -> Any:
    """The same with every text changed; None where there is no text."""
    if isinstance(inputs, str):
        return change(inputs)
    if isinstance(inputs, pd.DataFrame):
        texts = [name for name in inputs if inputs[name].map(lambda value: isinstance(value, str)).all()]
        return inputs.assign(**{str(name): inputs[name].map(change) for name in texts}) if texts else None
    if isinstance(inputs, Mapping):
        changed = {name: _with_texts(value, change) for name, value in inputs.items()}
        if any(value is not None for value in changed.values()):
            return {name: value if changed[name] is None else changed[name] for name, value in inputs.items()}
    elif isinstance(inputs, list):
        rows = [_with_texts(one, change) for one in inputs]
        if any(row is not None for row in rows):
            return [one if row is None else row for one, row in zip(inputs, rows, strict=True)]
    return None
