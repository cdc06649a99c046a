"""A program as a user may write it: test_distribution.py checks its types and runs it, where nothing but the wheel is.

It takes an ONNX file with `x` float32 [N, 16] and `y`, and a folder to write to.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import mlflow
import numpy as np
import numpy.typing as npt

import mlflow_trt
from mlflow_trt import BuildError, LoadSettings, OptionError, Precision, Recipe, Session, Tolerance
from mlflow_trt.client import Client

Rows = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.generic]


def convert(onnx_file: Path, folder: Path) -> tuple[str, ...]:
    recipe = Recipe(precision=Precision.FP16, batch=(1, 4, 8))
    try:
        mlflow_trt.save_model(onnx_file, folder, recipe=recipe, verify=Tolerance(relative_error=0.01))
    except BuildError as error:
        return error.log
    return ()


def answer(session: Session, rows: Rows) -> Numbers:
    outputs = session.run({"x": rows})
    return outputs["y"]


def ask(address: str, rows: Rows) -> Numbers:
    with Client(address, timeout=5) as client:
        return client.predict({"x": rows})["y"]


def main() -> None:
    onnx_file, folder = Path(sys.argv[1]), Path(sys.argv[2])
    print(*convert(onnx_file, folder))
    try:
        LoadSettings.of({"runtim": "auto"})
    except OptionError as error:
        print(error.message)
    rows = np.linspace(-1, 1, 48, dtype=np.float32).reshape(3, 16)
    with mlflow_trt.load_model(str(folder), runtime="onnxruntime") as session:
        native = answer(session, rows)
    model = mlflow.pyfunc.load_model(str(folder), model_config={"runtime": "onnxruntime"})
    through_mlflow = cast(Numbers, model.predict({"x": rows})["y"])  # pyright: ignore[reportUnknownMemberType]
    print(np.array_equal(native, through_mlflow))
    np.save(folder.with_suffix(".npy"), native)


if __name__ == "__main__":
    main()
