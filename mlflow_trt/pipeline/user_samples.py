"""The forms in which users give sample inputs: files, arrays, DataFrames, MLflow datasets."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.data.dataset import Dataset

from mlflow_trt.convert.samples import SampleData, SampleOrigin, warn_of_noise
from mlflow_trt.core.frames import feeds_from_frame
from mlflow_trt.core.types import Shape, TensorSpec
from mlflow_trt.errors import InputError

_UNNAMED = "arr_0"
"""What numpy.savez calls an array that it is given without a name."""


def sample_data_of(calibration_data: Any, input_example: Any, inputs: Sequence[TensorSpec]) -> SampleData | None:
    """The calibration data, in any form that `arrays_of` knows, else the input example, else None.

    Raises InputError for calibration data that cannot be read.
    """
    if calibration_data is not None:
        return SampleData(arrays=arrays_of(calibration_data, inputs), origin=SampleOrigin.CALIBRATION_DATA)
    example = input_example[0] if isinstance(input_example, tuple) else input_example  # MLflow's form with params
    if isinstance(example, list) and len(inputs) == 1:
        example = {inputs[0].name: example}
    if isinstance(example, (np.ndarray, Mapping, pd.DataFrame)):
        try:
            return SampleData(arrays=arrays_of(example, inputs), origin=SampleOrigin.INPUT_EXAMPLE)
        except InputError as error:  # only a DataFrame: what is wrong with arrays is found, and said, when they are cut
            warn_of_noise(error)
            return None
    return None


def arrays_of(data: Any, inputs: Sequence[TensorSpec]) -> Any:
    """The arrays in what a user gave, in a form that `cut_samples` takes.

    `data` may be the path of an `.npz` file with an array for each input, or of an `.npy` file for a model with one;
    an array, a mapping of arrays, an iterable of such mappings; a DataFrame, such as an evaluation table, with a column
    for each input; or an MLflow dataset of one of these.

    Raises InputError for a file that cannot be read or a dataset without arrays.
    """
    if isinstance(data, (str, os.PathLike)):
        return read_arrays(Path(data))
    if isinstance(data, Dataset):
        data = _content(data)
    if isinstance(data, pd.DataFrame):
        return feeds_from_frame(data, tuple(inputs))
    return data


def features_in(dataset: Dataset) -> pd.DataFrame | None:
    """The table of an MLflow dataset without its columns of targets and predictions. None where it has no table."""
    frame = getattr(dataset, "df", None)
    if not isinstance(frame, pd.DataFrame):
        return None
    others = [name for role in ("targets", "predictions") if (name := getattr(dataset, role, None)) is not None]
    return frame[[column for column in frame.columns if column not in others]]


def _content(dataset: Dataset) -> Any:
    content = getattr(dataset, "features", None)
    if isinstance(content, (np.ndarray, Mapping)):
        return content
    if (frame := features_in(dataset)) is not None:
        return frame
    raise InputError(
        f"the dataset {dataset.name!r} is a {type(dataset).__name__}; expected one of arrays (mlflow.data.from_numpy) "
        "or of a DataFrame (mlflow.data.from_pandas)"
    )


def read_arrays(path: Path) -> Any:
    """The arrays of an `.npz` file by name, or the array of an `.npy` file, or of an `.npz` file that names none.

    Raises InputError for any other file.
    """
    try:
        content = np.load(path, allow_pickle=False)
        if path.suffix != ".npz":
            return content
        if content.files == [_UNNAMED]:
            return content[_UNNAMED]
        return {name: content[name] for name in content.files}
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; expected an .npz or .npy file") from None
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        # What numpy takes any other file for, with advice to trust it.
        is_other = "pickled" in str(error)
        what = "it is neither; numpy.savez and numpy.save write them" if is_other else error
        raise InputError(f"{path} cannot be read as .npz or .npy: {what}") from error


def example_shapes(example: Any, inputs: Sequence[TensorSpec]) -> dict[str, Shape]:
    """The shapes of those inputs that an example gives as arrays or lists: by name, or the one of a single input."""
    if isinstance(example, tuple):
        example = example[0]  # MLflow's form for an example with params
    if isinstance(example, (np.ndarray, list)) and len(inputs) == 1:
        example = {inputs[0].name: example}
    if not isinstance(example, Mapping):
        return {}
    names = {tensor.name for tensor in inputs}
    shapes = {}
    for name, value in example.items():
        if name in names and isinstance(value, (np.ndarray, list)):
            with contextlib.suppress(ValueError):  # rows of different lengths, which is said when samples are cut
                shapes[name] = np.shape(value)
    return shapes
