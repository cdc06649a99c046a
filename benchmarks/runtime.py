"""How close the runtime comes to what the GPU allows: `python -m benchmarks.runtime`.

Each row is measured beside its limit, in this process and in turns, so that both see the same machine. The limits:

- bulk: the engine alone at its best batch size, its inputs on the GPU;
- one caller, one row: copying it to the GPU, executing as a CUDA graph, copying the result back;
- batches: the slowest of host copy, transfer and execution, plus the host copy and transfer of the first piece;
- threads: the engine alone at the batch sizes that formed;
- load, in fresh processes: reading plan and kernels, deserializing, making a context, and the first execution;
- memory, likewise: engine, one execution context as TensorRT makes it by itself, and buffers for its largest batch.

With `--peers` it measures what one could use instead, beside this package. Needs a GPU. `--json FILE` and
`--pictures FOLDER` write what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np

import mlflow_trt
from benchmarks import peers
from benchmarks.alternatives import alternatives
from benchmarks.fresh import fresh
from benchmarks.models import MODELS, BenchmarkModel, Feeds
from benchmarks.options import parse_names
from mlflow_trt.backends.cuda_driver import probe
from mlflow_trt.runtime import native
from mlflow_trt.runtime.batching.host_copy import copies, copy_rows
from mlflow_trt.runtime.batching.sizes import BatchRows, pieces
from mlflow_trt.runtime.engine.timing import replay
from mlflow_trt.runtime.tensorrt_session import TensorRTSession

BATCHES = (8, 32, 128)
THREADS = (1, 8, 16, 64)
WAY_IN = ("host copy", "upload")
WAY_OUT = ("download", "results' copy")
LOADED = ("bulk", "one", "batches", "threads")
OWN_MODELS = ("resnet50", "rec", "magika")
CASES = (*LOADED, "load", "alternatives")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. `goal` bounds measured / limit: from above for times and sizes, from below for rates.

    `spread` is half of what lies between the smallest and the largest value, as a part of `measured`.
    """

    model: str
    case: str
    unit: str
    limit: float
    measured: float
    spread: float
    goal: float | None = None
    higher_is_better: bool = False
    note: str = ""

    @classmethod
    def of(cls, values: Any, **rest: Any) -> Row:
        """The median of `values`, and their spread."""
        median = float(np.median(values))
        return cls(measured=median, spread=float((np.max(values) - np.min(values)) / 2 / median), **rest)

    @property
    def ratio(self) -> float:
        return self.measured / self.limit

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.ratio >= self.goal if self.higher_is_better else self.ratio <= self.goal

    def cells(self) -> tuple[str, ...]:
        sign = "≥" if self.higher_is_better else "≤"
        goal = "" if self.goal is None else f"{sign} {self.goal:g} {'met' if self.met else 'NOT MET'}"
        return (self.model, self.case, f"{self.limit:.4g} {self.unit}", f"{self.measured:.4g} ± {self.spread:.0%}",
                f"{self.ratio:.2f}", goal, self.note)  # fmt: skip


HEADINGS = ("model", "case", "limit", "measured", "ratio", "goal", "note")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables and write the files that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runtime", description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=partial(parse_names, known=MODELS), help="which, separated by commas")
    parser.add_argument("--peers", action="store_true", help="what one could use instead, each in its own process")
    parser.add_argument("--cases", type=partial(parse_names, known=CASES), default=",".join(CASES),
                        help="which, likewise")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement; the median counts")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each repeat of a short measurement")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes a minute")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--pictures", type=Path, help="draw pictures into this folder (needs matplotlib)")
    options = parser.parse_args(arguments)
    hardware = probe()
    if hardware.problem is not None:
        print(f"The runtime's speed is that of a GPU, and there is none: {hardware.problem}", file=sys.stderr)
        return 2
    if options.peers:
        measure_peers(options)
    else:
        measure_models(options)
    return 0


def measure_models(options: argparse.Namespace) -> None:
    """Convert the models, measure them beside their limits, and print a table."""
    rows: list[Row] = []
    others: list[dict[str, Any]] = []
    about = {}
    with tempfile.TemporaryDirectory(prefix="mlflow-trt-benchmark-") as workdir:
        for name in options.models or OWN_MODELS:
            model = MODELS[name]()
            folder = Path(workdir) / name
            mlflow_trt.save_model(model.source(), folder, verify=False, **model.recipe)
            loaded = mlflow.pyfunc.load_model(str(folder), model_config={"warm_up": "on"})
            with loaded.get_raw_model() as session:
                about = {
                    "runtime": session.description,
                    "driver": probe().driver,
                    "numpy": np.__version__,
                    "extension": native.description(),
                }
                bench = Bench(model, loaded, session, options.repeats, options.seconds)
                for case in options.cases:
                    if case in LOADED:
                        rows += getattr(bench, case)()
            if "load" in options.cases:
                rows += load_rows(model, folder, options.repeats)
            if "alternatives" in options.cases and name == "resnet50":
                others += alternatives(folder, model, options.seconds, compiled=not options.no_compile)
    print("; ".join(f"{key} {value}" for key, value in about.items()))
    print_table(HEADINGS, [row.cells() for row in rows])
    if others:
        headings = ("what", *(f"batch {size}" for size in others[0]["milliseconds"]))
        print_table(headings, [cells_of(other) for other in others])
    result = {"about": about, "rows": [asdict(row) | {"ratio": row.ratio} for row in rows], "alternatives": others}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    if options.pictures:
        from benchmarks.pictures import draw

        draw(result, options.pictures)


def measure_peers(options: argparse.Namespace) -> None:
    """Convert the models, measure them by each peer, and print a table for each model."""
    folders: dict[str, Path] = {}
    with tempfile.TemporaryDirectory(prefix="mlflow-trt-benchmark-") as workdir:
        os.environ.setdefault("MLFLOW_TRT_CACHE_DIR", str(Path(workdir) / "cache"))
        for name in options.models or peers.MODELS_OF_PEERS:
            folders[name] = Path(workdir) / name
            model = MODELS[name]()
            mlflow_trt.save_model(model.source(), folders[name], verify=False, **model.recipe)
        measured = {}
        for name, folder in folders.items():
            found = peers.compare({name: folder}, peers=peers.installed(name), rounds=options.repeats,
                                  seconds=options.seconds)  # fmt: skip
            measured |= found
            headings, cells = peers.table(found[name])
            print(f"\n{name}; {probe().gpus[0]}; extension {native.description()}\n")
            print_table(headings, cells)
    if options.json:
        options.json.write_text(json.dumps(measured, indent=2))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table in Markdown, aligned."""
    widths = [max(len(line[column]) for line in (headings, *rows)) for column in range(len(headings))]
    for line in (headings, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


def cells_of(other: dict[str, Any]) -> tuple[str, ...]:
    return (other["what"], *(f"{ms:.3g} ms" for ms in other["milliseconds"].values()))


class Bench:
    """The cases of one model that is loaded and warm."""

    def __init__(self, model: BenchmarkModel, loaded: Any, session: TensorRTSession, repeats: int, seconds: float):
        self.model = model
        self.loaded = loaded
        self.session = session
        self.repeats = repeats
        self.seconds = seconds
        self.sizes = session._scheduler.sizes_of(0).all
        self.engine = {size: self.engine_milliseconds(size) for size in self.sizes}

    def bulk(self) -> list[Row]:
        """All rows in one call, against the engine alone at its best batch size."""
        feeds = self.model.feeds(self.model.bulk)
        best = min(self.engine, key=lambda size: self.engine[size] / size)
        times, limits = self.in_turns(
            lambda: seconds(lambda: self.loaded.predict(feeds)),
            lambda: self.engine_milliseconds(best) / 1e3 / best * self.model.bulk,
        )
        rate, limit = self.model.bulk / np.array(times), self.model.bulk / np.median(limits)
        return [self.row(f"bulk, {self.model.bulk} rows", "rows/s", limit, rate, 0.95, f"engine at batch {best}",
                         higher_is_better=True)]  # fmt: skip

    def one(self) -> list[Row]:
        """One row, one caller."""
        feeds = self.model.feeds(self.sizes[0])
        times, limits, natives = self.in_turns(
            lambda: self.median_of(lambda: self.loaded.predict(feeds)),
            lambda: self.replay_seconds(feeds),
            lambda: self.median_of(lambda: self.session.run(feeds)),
        )
        limit = 1e3 * float(np.median(limits))
        case = f"{self.sizes[0]} row, one caller"
        return [
            self.row(case, "ms", limit, 1e3 * np.array(times), 1.15, "through mlflow.pyfunc"),
            self.row(case, "ms", limit, 1e3 * np.array(natives), None, "the session alone"),
        ]

    def batches(self) -> list[Row]:
        """Batches, one caller."""
        found = []
        for rows in (size for size in BATCHES if size <= self.sizes[-1]):
            feeds = self.model.feeds(rows)
            times, limits = self.in_turns(
                lambda feeds=feeds: self.median_of(lambda: self.loaded.predict(feeds)),
                lambda feeds=feeds, rows=rows: self.pipeline_seconds(feeds, rows),
            )
            note = ", ".join(f"{name} {value:.2f}" for name, value in self.stages(feeds, rows).items()) + " ms"
            found.append(self.row(f"batch {rows}, one caller", "ms", 1e3 * np.median(limits), 1e3 * np.array(times),
                                  1.25, note))  # fmt: skip
        return found

    def threads(self) -> list[Row]:
        """One row a call from several threads, against the engine alone at the batch sizes that formed."""
        found = []
        for count in THREADS:
            feeds = self.model.feeds(self.sizes[0])
            rates, limits, latencies = [], [], []
            for _ in range(self.repeats):
                before = self.session.runs
                calls, took = call_from_threads(partial(self.loaded.predict, feeds), count, 2 * self.seconds)
                after = self.session.runs
                formed = {size: runs - before.get(size, 0) for size, runs in after.items()}
                rates.append(len(calls) * self.sizes[0] / took)
                busy = sum(runs * self.engine[size] for size, runs in formed.items()) / 1e3
                limits.append(len(calls) * self.sizes[0] / busy)
                latencies += calls
            p50, p99 = 1e3 * np.percentile(latencies, [50, 99])
            mean = np.sum([size * runs for size, runs in formed.items()]) / sum(formed.values())
            note = f"p50 {p50:.2f}, p99 {p99:.2f} ms, batches of {mean:.1f} on average"
            threads = f"{count} thread{'s' if count > 1 else ''}, {self.sizes[0]} row each"
            found.append(self.row(threads, "rows/s", float(np.median(limits)),
                                  np.array(rates), None, note, higher_is_better=True))  # fmt: skip
        return found

    # ---- parts

    def engine_milliseconds(self, rows: int) -> float:
        feeds = self.model.feeds(rows)
        return float(np.median([phase.engine for phase in self.session.time_phases(feeds, 30)]))

    def replay_seconds(self, feeds: Feeds) -> float:
        with self.session._load_slot(feeds) as slot:
            replay(slot)
            return self.median_of(lambda: replay(slot))

    def stages(self, feeds: Feeds, rows: int) -> dict[str, float]:
        """Milliseconds of each stage for the whole batch, in the pieces that it is run in."""
        found = dict.fromkeys((*WAY_IN, "engine", *WAY_OUT), 0.0)
        for piece in pieces(rows, self.session._scheduler.sizes_of(0)):
            part = {name: array[piece.start : piece.stop] for name, array in feeds.items()}
            found["host copy"] += 1e3 * self.median_of(lambda part=part, piece=piece: host_copy(part, piece.size))
            phases = self.session.time_phases(self.model.feeds(piece.size), 30)
            for name, times in zip(("upload", "engine", "download"), zip(*phases, strict=True), strict=True):
                found[name] += float(np.median(times))
            results = list(self.session.run(part).values())
            found["results' copy"] += 1e3 * self.median_of(lambda results=results: copies(results))
        return found

    def pipeline_seconds(self, feeds: Feeds, rows: int) -> float:
        """What the slowest stage takes, and the way of the first piece there and of the last one back."""
        stages = self.stages(feeds, rows)
        cut = list(pieces(rows, self.session._scheduler.sizes_of(0)))
        filling = sum(stages[name] for name in WAY_IN) * cut[0].size / rows
        emptying = sum(stages[name] for name in WAY_OUT) * cut[-1].size / rows
        return (max(stages.values()) + filling + emptying) / 1e3

    def median_of(self, call: Callable[[], object]) -> float:
        times = []
        end = time.perf_counter() + self.seconds
        while len(times) < 5 or time.perf_counter() < end:
            times.append(seconds(call))
        return float(np.median(times[len(times) // 10 :]))

    def in_turns(self, *measures: Callable[[], float]) -> list[list[float]]:
        """The values of each, measured one after the other again and again."""
        rounds = [[measure() for measure in measures] for _ in range(self.repeats)]
        return [list(values) for values in zip(*rounds, strict=True)]

    def row(self, case: str, unit: str, limit: float, values: Any, goal: float | None, note: str, *,
            higher_is_better: bool = False) -> Row:  # fmt: skip
        return Row.of(values, model=self.model.name, case=case, unit=unit, limit=float(limit), goal=goal,
                      higher_is_better=higher_is_better, note=note)  # fmt: skip


_pinned: dict[str, Any] = {}


def host_copy(feeds: Feeds, size: int) -> None:
    """Copy into pinned memory, by as many threads as the runtime uses."""
    import pycuda.driver as cuda

    from mlflow_trt.core.types import BatchAxis
    from mlflow_trt.runtime.cuda.device import open_device

    rows = BatchRows([feeds], BatchAxis(inputs=tuple(feeds), splits=True, declared=True), size)
    for name, shape in rows.shapes.items():
        nbytes = int(np.prod(shape)) * feeds[name].itemsize
        if len(_pinned.get(name, ())) < nbytes:
            with open_device(0).current():
                _pinned[name] = cuda.pagelocked_empty(nbytes, np.uint8)
        target = _pinned[name][:nbytes].view(feeds[name].dtype).reshape(shape)
        for _ in copy_rows(rows.copies(name), target):
            pass


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def call_from_threads(call: Callable[[], object], count: int, lasting: float) -> tuple[list[float], float]:
    """Call again and again from so many threads; the seconds of each call, and of all together."""
    times: list[list[float]] = [[] for _ in range(count)]
    barrier = threading.Barrier(count + 1)
    end = [0.0]

    def work(own: list[float]) -> None:
        barrier.wait()
        while time.perf_counter() < end[0]:
            own.append(seconds(call))

    threads = [threading.Thread(target=work, args=(own,)) for own in times]
    for thread in threads:
        thread.start()
    started = time.perf_counter()
    end[0] = started + lasting
    barrier.wait()
    for thread in threads:
        thread.join()
    return [time for own in times for time in own], time.perf_counter() - started


def load_rows(model: BenchmarkModel, folder: Path, repeats: int) -> list[Row]:
    """Loading and memory, in fresh processes."""
    runs = [fresh(folder, model.name) for _ in range(max(1, repeats // 2))]

    def row(case: str, unit: str, measured: str, limit: str, goal: float | None, note: str = "") -> Row:
        limits = [run[limit] for run in runs]
        return Row.of([run[measured] for run in runs], model=model.name, case=case, unit=unit,
                      limit=float(np.median(limits)), goal=goal, note=note)  # fmt: skip

    parts = ", ".join(f"{name} {np.median([run[name] for run in runs]):.2f}" for name in
                      ("bare_read", "bare_deserialize", "bare_context", "bare_first"))  # fmt: skip
    return [
        row("load to first answer, kernels stored", "s", "warm_load", "bare", 1.5, parts),
        row("the same against no stored kernels", "s", "warm_load", "cold_load", 0.1),
        row("the same through mlflow.pyfunc.load_model", "s", "pyfunc_load", "warm_load", None),
        row("GPU memory after one call", "MB", "memory", "bare_memory", 1.2),
        row("GPU memory after 200 more calls", "MB", "memory_later", "memory", 1.0),
    ]


if __name__ == "__main__":
    sys.exit(main())
