"""One caller of this package and of ONNX Runtime's TensorRT-RTX provider: `python -m benchmarks.in_turns`.

Both run the same typed model, in one process and in turns, so that both see the same machine: arrays in, arrays out.
Needs a GPU and `onnxruntime-ep-nv-tensorrt-rtx-cu13`. `python -m benchmarks.runtime --peers` has more peers.
"""

from __future__ import annotations

import os
import sys
import tempfile
from argparse import ArgumentTypeError
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import mlflow
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import mlflow_trt
from benchmarks.models import MODELS, BenchmarkModel
from benchmarks.options import parse_names
from benchmarks.peers import BATCHES, MODELS_OF_PEERS, PEERS, PROVIDER, Predict, largest_batch, median_milliseconds
from mlflow_trt.backends.cuda_driver import probe

_OWN = ("session.run", "mlflow.pyfunc")


def main(
    models: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(MODELS_OF_PEERS),
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured, in turns.")] = 9,
    seconds: Annotated[float, typer.Option(help="How long each of them is called in a round.")] = 0.15,
) -> None:
    """Print milliseconds a call, and the median over all rounds of their ratio to the provider's."""
    try:
        names = parse_names(models, known=MODELS)
    except ArgumentTypeError as error:
        raise typer.BadParameter(str(error), param_hint="--models") from None
    problem = probe().problem
    if problem is not None:
        sys.exit(f"There is no GPU to compare on: {problem}")
    console = Console(width=120)
    table = Table(title=f"Milliseconds a call, {probe().gpus[0]}")
    for column in ("model", "rows", PROVIDER, *_OWN):
        table.add_column(column, justify="left" if column == "model" else "right")
    with tempfile.TemporaryDirectory(prefix="mlflow-trt-benchmark-") as workdir:
        for name in names:
            for cells in measure(MODELS[name](), Path(workdir) / name, rounds, seconds):
                table.add_row(name, *cells)
    console.print(table)
    sys.stdout.flush()
    os._exit(0)  # the provider crashes where it unloads its libraries


def measure(model: BenchmarkModel, folder: Path, rounds: int, seconds: float) -> list[tuple[str, ...]]:
    """A line of the table for each number of rows."""
    mlflow_trt.save_model(model.source(), folder, verify=False, **model.recipe)
    loaded = mlflow.pyfunc.load_model(str(folder), model_config={"warm_up": "on"})
    ways: dict[str, Predict] = {
        PROVIDER: PEERS[PROVIDER](model, folder),
        "session.run": loaded.get_raw_model().run,
        "mlflow.pyfunc": loaded.predict,
    }
    lines = []
    for rows in (size for size in BATCHES if size <= largest_batch(model)):
        feeds = model.feeds(rows)
        times = np.array(
            [[median_milliseconds(partial(way, feeds), seconds) for way in ways.values()] for _ in range(rounds)]
        )
        lines.append((str(rows), *cells_of(times, rows)))
    return lines


def cells_of(times: np.ndarray[tuple[int, int], np.dtype[np.float64]], rows: int) -> Sequence[str]:
    """The medians of all rounds, those of this package with their ratio and whether it is the wanted one."""
    provider, *own = np.median(times, axis=0)
    ratios = np.median(times[:, 1:] / times[:, :1], axis=0)
    cells = [f"{provider:.3f}"]
    goals = (1.0, 1.07 if rows == 1 else 1.0)  # one row: with what MLflow itself takes
    for goal, milliseconds, ratio in zip(goals, own, ratios, strict=True):
        cells.append(f"{milliseconds:.3f}, {ratio:.2f} x{'' if round(ratio, 2) <= goal else f' (goal {goal:g})'}")
    return cells


if __name__ == "__main__":
    typer.run(main)
