"""The main job on a real model: ONNX → TensorRT engine → MLflow registry → pyfunc → served over HTTP.

`make quickstart` runs this. It takes magika's ONNX model, classifies files of this repository with it, and shows that
the model answers the same in this process and behind `mlflow models serve`. Everything it writes is in ./quickstart.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mlflow
import numpy as np
import requests
from file_types import Magika, model_path
from rich.console import Console
from rich.table import Table
from serving import served

import mlflow_trt

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / "quickstart"
NAME = "magika-trt"
# A GPU where there is one. Without asking for "auto", a machine without a GPU would get an error, never the CPU.
SETTINGS = {"runtime": "auto"}
FILES = (
    "README.md",
    "Makefile",
    "pyproject.toml",
    "LICENSE",
    "mlflow_trt/errors.py",
    "examples/quickstart.py",
    ".ci/run",
    ".gitignore",
)


def main() -> int:
    console = Console(width=120)
    tracking_uri = f"sqlite:///{STORE / 'mlflow.db'}"
    STORE.mkdir(exist_ok=True)
    mlflow.set_tracking_uri(tracking_uri)
    if mlflow.get_experiment_by_name("quickstart") is None:
        mlflow.create_experiment("quickstart", artifact_location=(STORE / "artifacts").as_uri())
    mlflow.set_experiment("quickstart")

    console.rule("1. Convert, log and register")
    info = mlflow_trt.log_model(model_path(), name=NAME, precision="fp32", batch=(1, 8, 32), registered_model_name=NAME)
    uri = f"models:/{NAME}/{info.registered_model_version}"

    console.rule(f"2. Load {uri} and classify files")
    model = mlflow.pyfunc.load_model(uri, model_config=SETTINGS)
    magika = Magika()
    features = magika.features(ROOT / name for name in FILES)
    scores = model.predict({"bytes": features})["target_label"]

    console.rule(f"3. Serve {uri} and send the same files over HTTP")
    with served(uri, tracking_uri, SETTINGS) as address:
        response = requests.post(f"{address}/invocations", json={"inputs": {"bytes": features.tolist()}}, timeout=120)
        response.raise_for_status()
    served_scores = np.asarray(response.json()["predictions"]["target_label"], np.float32)

    session = model.get_raw_model()
    table = Table(title="Files of this repository, as magika sees them", title_justify="left")
    for heading in ("file", "label", "score", "served label", "served score", "executed by"):
        table.add_column(heading)
    for name, here, there in zip(FILES, magika.best(scores), magika.best(served_scores), strict=True):
        table.add_row(name, here[0], f"{here[1]:.4f}", there[0], f"{there[1]:.4f}", session.description)
    console.print(table)
    if session.fallback_reason:
        console.print(f"Not on TensorRT: {session.fallback_reason}", soft_wrap=True)
    difference = float(np.abs(scores - served_scores).max())
    agree = bool(difference < 1e-3)
    console.print(f"Largest difference between the two: {difference:.2g}. They {'agree' if agree else 'DISAGREE'}.")
    console.print(f"Look at the model: mlflow ui --backend-store-uri {tracking_uri}", soft_wrap=True)
    session.close()
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
