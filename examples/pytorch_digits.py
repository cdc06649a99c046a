"""A registered PyTorch model: trained, logged with `mlflow.pytorch`, and converted by the command line.

    pip install 'mlflow-trt[rtx,pytorch]'
    python examples/pytorch_digits.py

It is registered where MLFLOW_TRACKING_URI points; `mlflow ui` shows both models and how one came of the other.
"""

from __future__ import annotations

import subprocess
import sys

import mlflow
import numpy as np
import torch
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

NAME = "digits"


def train(images: torch.Tensor, labels: torch.Tensor) -> torch.nn.Module:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(1024, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network.eval()


def main() -> None:
    digits = load_digits()
    images, labels = (digits.images[:, None] / 16).astype(np.float32), digits.target
    held_out, truth = images[1200:], labels[1200:]
    network = train(torch.from_numpy(images[:1200]), torch.from_numpy(labels[:1200]))
    image, scores = TensorSpec(np.dtype(np.float32), (-1, 1, 8, 8)), TensorSpec(np.dtype(np.float32), (-1, 10))
    mlflow.pytorch.log_model(
        network,
        name=NAME,
        signature=ModelSignature(Schema([image]), Schema([scores])),
        input_example=held_out[:8],  # real inputs: the accuracy of fp16 is measured on them
        registered_model_name=NAME,
        pip_requirements=["torch"],  # else MLflow runs the model once more to find out what it imports
    )
    source = f"models:/{NAME}/latest"
    options = ["--register-as", f"{NAME}-trt", "--precision", "fp16", "--batch", "1:64:256", "--alias", "champion"]
    subprocess.run([sys.executable, "-m", "mlflow_trt", "convert", source, *options], check=True)

    table = Table(title=f"{len(truth)} digits that were not trained on", title_justify="left")
    for heading in ("model", "right", "largest difference", "run by"):
        table.add_column(heading)
    expected = network(torch.from_numpy(held_out)).detach().numpy()
    table.add_row("PyTorch", f"{(expected.argmax(1) == truth).mean():.2%}", "", f"torch {torch.__version__}")
    model = mlflow.pyfunc.load_model(f"models:/{NAME}-trt@champion", model_config={"runtime": "auto"})
    (converted,) = model.predict(held_out).values()
    difference = float(np.abs(converted - expected).max())
    right = f"{(converted.argmax(1) == truth).mean():.2%}"
    table.add_row(f"{NAME}-trt", right, f"{difference:.1e}", model.get_raw_model().description)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
