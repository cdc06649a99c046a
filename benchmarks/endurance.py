"""Mixed calls on one session from many threads, for as long as one likes: no wrong answer, and nothing that grows.

    python -m benchmarks.endurance --seconds 1800 --threads 32            # ResNet-50 in fp16 on a GPU
    python -m benchmarks.endurance --model magika --runtime onnxruntime --seconds 60

Calls have 1 to 65 rows, and one in fifty is misshapen and has to be refused. Each answer is compared with that of the
same rows alone, within a tolerance that the answers of other rows are far from. The exit code is 1 where one was wrong.
"""

from __future__ import annotations

import itertools
import random
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import mlflow_trt
from benchmarks.models import MODELS, Feeds
from benchmarks.served import resident_bytes
from mlflow_trt.backends.cuda_driver import probe
from mlflow_trt.backends.nvml import gpu_memory
from mlflow_trt.core.arrays import Outputs
from mlflow_trt.errors import InputError

_SIZES = (1, 1, 1, 1, 2, 3, 5, 8, 20, 65)
_CASES_OF_A_SIZE = 4
_MISSHAPEN = 0.02
_CANDIDATES, _LEAST_ROWS = 96, 4
_PARTS = 6


@dataclass(frozen=True)
class Case:
    """What is asked, and what is answered where nobody else asks."""

    feeds: Feeds
    expected: Outputs


@dataclass
class Tally:
    """What one thread saw: when calls ended, in seconds from the start, and how many milliseconds they took.

    In few bytes: there are millions of calls, and memory is watched.
    """

    ended: array[float] = field(default_factory=partial(array, "d"))
    milliseconds: array[float] = field(default_factory=partial(array, "f"))
    refused: int = 0
    problems: list[str] = field(default_factory=list)


class Endurance:
    """Threads that ask one session until the end."""

    def __init__(self, session: mlflow_trt.Session, cases: Sequence[Case], tolerance: float) -> None:
        self._session = session
        self._cases = cases
        self._tolerance = tolerance
        self._ends = threading.Event()
        self._started = time.perf_counter()
        self.memory: list[tuple[float, int, int]] = []

    def run(self, threads: int, seconds: float) -> list[Tally]:
        """What each of so many threads saw. Memory is read meanwhile."""
        tallies = [Tally() for _ in range(threads)]
        workers = [
            threading.Thread(target=self._work, args=(tally, random.Random(number)))  # noqa: S311  # no secret
            for number, tally in enumerate(tallies)
        ]
        for worker in workers:
            worker.start()
        try:
            for _ in range(10 * _PARTS):
                time.sleep(seconds / (10 * _PARTS))
                self.memory.append((time.perf_counter() - self._started, resident_bytes(), gpu_bytes()))
        finally:
            self._ends.set()
            for worker in workers:
                worker.join()
        return tallies

    def _work(self, tally: Tally, chance: random.Random) -> None:
        while not self._ends.is_set():
            case = chance.choice(self._cases)
            try:
                if chance.random() < _MISSHAPEN:
                    self._ask_misshapen(case)
                    tally.refused += 1
                    continue
                started = time.perf_counter()
                answer = self._session.run(case.feeds)
                ended = time.perf_counter()
            except Exception as error:  # noqa: BLE001  # whatever it is, it is counted
                tally.problems.append(f"{type(error).__name__}: {error}")
                continue
            tally.ended.append(ended - self._started)
            tally.milliseconds.append((ended - started) * 1e3)
            found = distance(answer, case.expected)
            if not found <= self._tolerance:
                tally.problems.append(f"an answer is {found:.3g} away from the right one")

    def _ask_misshapen(self, case: Case) -> None:
        name, values = next(iter(case.feeds.items()))
        with suppress(InputError):
            self._session.run({**case.feeds, name: values[..., :-1]})
            raise RuntimeError("a call with rows of another shape was answered")


def distance(answer: Outputs, expected: Outputs) -> float:
    """The largest difference in any row, beside the largest number of that output."""
    worst = 0.0
    for name, right in expected.items():
        if answer[name].shape != right.shape:
            return float("inf")
        worst = max(worst, float(np.abs(answer[name] - right).max() / np.abs(right).max()))
    return worst


def distinct_rows(session: mlflow_trt.Session, feeds: Feeds, least: float) -> list[int]:
    """The numbers of rows whose answers are further from each other than that."""
    outputs = session.run(feeds)
    chosen: list[int] = []
    for row in range(len(next(iter(feeds.values())))):
        own = _rows(outputs, [row])
        if all(distance(own, _rows(outputs, [other])) > least for other in chosen):
            chosen.append(row)
    return chosen


def _rows(arrays: Feeds, numbers: Sequence[int]) -> Feeds:
    return {name: np.ascontiguousarray(values[list(numbers)]) for name, values in arrays.items()}


def gpu_bytes() -> int:
    """Memory of the GPUs that is in use, by whomever; 0 without one."""
    return sum(total - free for free, total in gpu_memory(probe().gpus).values())


def make_cases(session: mlflow_trt.Session, feeds: Feeds, rows: Sequence[int]) -> list[Case]:
    """Some of each size, put together from those rows."""
    chance = random.Random(0)  # noqa: S311  # no secret
    cases = []
    for size in _SIZES:
        for _ in range(_CASES_OF_A_SIZE):
            chosen = _rows(feeds, chance.choices(rows, k=size))
            cases.append(Case(chosen, session.run(chosen)))
    return cases


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "resnet50",
    runtime: Annotated[str, typer.Option(help="tensorrt or onnxruntime.")] = "tensorrt",
    threads: Annotated[int, typer.Option(help="That ask at the same time.")] = 32,
    seconds: Annotated[float, typer.Option(help="For how long.")] = 1800.0,
    tolerance: Annotated[float, typer.Option(help="Of an answer, beside the largest number in it.")] = 0.01,
) -> None:
    """Print what was found."""
    if model not in MODELS:
        raise typer.BadParameter(f"expected one of {', '.join(MODELS)}", param_hint="--model")
    console, chosen = Console(width=120), MODELS[model]()
    with tempfile.TemporaryDirectory(prefix="mlflow-trt-") as workdir:
        folder = Path(workdir) / model
        mlflow_trt.save_model(chosen.source(), folder, verify=False, **chosen.recipe)
        with mlflow_trt.load_model(str(folder), runtime=runtime, warm_up="on") as session:
            feeds = chosen.feeds(_CANDIDATES)
            rows = distinct_rows(session, feeds, 3 * tolerance)
            if len(rows) < _LEAST_ROWS:
                sys.exit(
                    f"the answers of {_CANDIDATES} rows are too near each other to see a wrong one at {tolerance:g}"
                )
            endurance = Endurance(session, make_cases(session, feeds, rows), tolerance)
            tallies = endurance.run(threads, seconds)
            runs = session.runs
    console.print(f"{model}, {runtime}, {threads} threads, {seconds:.0f} s, {len(rows)} different rows")
    _print(console, tallies, endurance.memory, seconds)
    console.print(f"Batch sizes that ran: {', '.join(f'{count} x {size}' for size, count in runs.items())}")
    problems = [problem for tally in tallies for problem in tally.problems]
    calls, refused = sum(len(tally.ended) for tally in tallies), sum(tally.refused for tally in tallies)
    console.print(f"{calls} calls, {refused} misshapen ones refused, {len(problems)} failed or were answered wrongly")
    for problem in problems[:5]:
        console.print(problem, markup=False)
    sys.exit(1 if problems else 0)


def _print(
    console: Console, tallies: Sequence[Tally], memory: Sequence[tuple[float, int, int]], seconds: float
) -> None:
    ended = np.concatenate([tally.ended for tally in tallies])
    milliseconds = np.concatenate([tally.milliseconds for tally in tallies])
    table = Table()
    for column in ("seconds", "calls a second", "p50 ms", "p99 ms", "process MB", "GPU MB"):
        table.add_column(column, justify="right")
    edges = np.linspace(0, max(seconds, float(ended.max())), _PARTS + 1)
    for start, stop in itertools.pairwise(edges):
        own = milliseconds[(ended >= start) & (ended <= stop)]
        there = [sample[1:] for sample in memory if start <= sample[0] <= stop]
        resident, gpu = np.median(there, axis=0) / 1e6 if there else (float("nan"), float("nan"))
        p50, p99 = np.percentile(own, [50, 99]) if len(own) else (float("nan"), float("nan"))
        rate = len(own) / (stop - start)
        table.add_row(
            f"{start:.0f} to {stop:.0f}", f"{rate:.0f}", f"{p50:.2f}", f"{p99:.2f}", f"{resident:.0f}", f"{gpu:.0f}"
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
