"""What several GPUs of one host bring, beside one of them: `python -m benchmarks.replicas`.

ResNet-50 through mlflow.pyfunc, numpy in and numpy out, on one GPU and on all of them in one process, in turns:

- bulk: 4,096 images in one call;
- callers: 8 threads for each GPU, 32 images a call.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np

import mlflow_trt
from benchmarks.models import MODELS
from benchmarks.runtime import call_from_threads, print_table, seconds
from mlflow_trt.backends.cuda_driver import probe

CALLERS_EACH = 8
ROWS = 32
HEADINGS = ("case", "1 GPU, rows/s", "all, rows/s", "ratio", "GPUs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replicas", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50", choices=MODELS, help="what is measured")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement; the median counts")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each repeat with callers")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    options = parser.parse_args(arguments)
    hardware = probe()
    count = len(hardware.gpus)
    if count < 2:
        print(f"This compares one GPU with several, and there are {count}.", file=sys.stderr)
        return 2
    model = MODELS[options.model]()
    with tempfile.TemporaryDirectory(prefix="mlflow-trt-benchmark-") as workdir:
        folder = Path(workdir) / model.name
        mlflow_trt.save_model(model.source(), folder, verify=False, **model.recipe)
        one, many = (load(folder, device) for device in (0, "all"))
        with one.get_raw_model(), many.get_raw_model() as session:
            print(f"{session.description}; driver {hardware.driver}")
            bulk, batch = model.feeds(model.bulk), model.feeds(ROWS)

            def in_one_call(loaded: Any) -> float:
                return model.bulk / seconds(lambda: loaded.predict(bulk))

            def from_threads(loaded: Any, threads: int) -> float:
                calls, took = call_from_threads(partial(loaded.predict, batch), threads, options.seconds)
                return len(calls) * ROWS / took

            found = [
                compared(f"bulk, {model.bulk} rows in one call", options.repeats,
                         partial(in_one_call, one), partial(in_one_call, many)),
                compared(f"{CALLERS_EACH} callers for each GPU, {ROWS} rows a call", options.repeats,
                         partial(from_threads, one, CALLERS_EACH), partial(from_threads, many, CALLERS_EACH * count)),
            ]  # fmt: skip
    print_table(HEADINGS, [(*(str(cell) for cell in row.values()), str(count)) for row in found])
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
    return 0


def load(folder: Path, device: int | str) -> Any:
    return mlflow.pyfunc.load_model(str(folder), model_config={"device": device, "warm_up": "on"})


def compared(case: str, repeats: int, one: Callable[[], float], many: Callable[[], float]) -> dict[str, Any]:
    """Medians of both, measured in turns after a first round that does not count."""
    rounds = [(one(), many()) for _ in range(repeats + 1)][1:]
    alone, together = (float(np.median(rates)) for rates in zip(*rounds, strict=True))
    return {"case": case, "one": round(alone), "all": round(together), "ratio": round(together / alone, 2)}


if __name__ == "__main__":
    sys.exit(main())
