"""What a request costs: `mlflow-trt serve` beside `mlflow models serve`, in one run.

    python -m benchmarks.serving                                    # a model that does nothing, on the CPU
    python -m benchmarks.serving --model resnet50 --runtime tensorrt   # on a GPU
    python -m benchmarks.serving --front-ends 4                     # also a server with front ends
    python -m benchmarks.serving --soak 600                         # mixed load for ten minutes: errors and memory

All servers run at the same time and are asked in turns: one image of 3x224x224 in float32, and rows of 2 kB. MLflow's
has what makes it fastest: parquet, answers="base64", uvloop, one worker. The goals, and what was reached, come last.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import mlflow_trt
from benchmarks.load import Answer, Load, drive, summarized
from benchmarks.models import MODELS
from benchmarks.served import (
    Case,
    CpuSeconds,
    Target,
    binary_target,
    mlflow_server,
    nothing,
    our_server,
    parquet_target,
    save,
    shared_target,
    triton_server,
)
from benchmarks.soak import soak
from examples.serving import TensorServer, running
from mlflow_trt.cli.options import parse_numbers

MLFLOW, HTTP, SHARED, TRITON = "mlflow models serve", "mlflow-trt serve", "the same, shared memory", "triton"
FRONT_ENDS, FRONT_ENDS_SHARED = "with front ends", "with front ends, shared memory"
IMAGE, ROW = "one image", "a row of 2 kB"
_OWN_CALLS = 200


@dataclass(frozen=True, kw_only=True)
class Plan:
    clients: tuple[int, ...]
    rounds: int
    seconds: float
    settings: dict[str, Any]
    with_triton: bool
    front_ends: int = 0  # of a second server of ours; 0: there is none


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of the table. `cpu_ms` is what the server used of the CPU for a request, `model_cpu_ms` what of it the
    process with the model did, where we know which one it is.
    """

    case: str
    target: str
    load: Load
    cpu_ms: float
    model_cpu_ms: float | None = None


def measure(case: Case, plan: Plan, console: Console) -> Iterator[Measured]:
    """Serve a model in all ways, and measure each after its answer was found to be right."""
    with ExitStack() as stack:
        workdir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlflow-trt-")))
        theirs, ours = mlflow_server(case.folder, plan.settings, workdir), our_server(case.folder, plan.settings)
        split = our_server(case.folder, plan.settings, plan.front_ends) if plan.front_ends else None
        triton = triton_server(case.folder, plan.settings, workdir) if plan.with_triton else None
        for server in filter(None, (theirs, ours, split, triton)):
            stack.enter_context(running(server))
        targets = [parquet_target(theirs, case.feeds)]
        for mine, http, shared in ((ours, HTTP, SHARED), (split, FRONT_ENDS, FRONT_ENDS_SHARED)):
            if mine is not None:
                targets.append(binary_target(http, mine, case.feeds))
                targets.append(stack.enter_context(shared_target(shared, mine, case, max(plan.clients))))
        if triton is not None:
            targets.append(binary_target(TRITON, triton, case.feeds))
        for target in targets:
            target.check(case.expected)
        for clients in plan.clients:
            console.print(f"{case.name}, {clients} clients ...")
            yield from _in_turns(case, targets, clients, plan)


def _in_turns(case: Case, targets: list[Target], clients: int, plan: Plan) -> Iterator[Measured]:
    """What the clients of each server see, in rounds: a machine that gets slower or faster does so for all."""
    seen: dict[str, list[list[Answer]]] = {target.name: [] for target in targets}
    used: dict[str, list[CpuSeconds]] = {name: [] for name in seen}
    for _ in range(plan.rounds):
        for target in targets:
            before = CpuSeconds.of(target.server)
            seen[target.name].append(drive(target.server.address, target.requests, clients, plan.seconds))
            used[target.name].append(CpuSeconds.of(target.server).since(before))
    for target in targets:
        load = summarized(clients, seen[target.name])
        cpu, model_cpu = (1e3 * sum(rounds) / max(1, load.requests) for rounds in zip(*used[target.name], strict=True))
        is_ours = isinstance(target.server, TensorServer)
        yield Measured(
            case=case.name, target=target.name, load=load, cpu_ms=cpu, model_cpu_ms=model_cpu if is_ours else None
        )


def make_cases(model: str, folder: Path, settings: dict[str, Any]) -> list[Case]:
    """The models, and what is asked of them."""
    random = np.random.default_rng(0)
    if model == "nothing":
        made = []
        for name, row, outputs in ((IMAGE, (3, 224, 224), 1000), (ROW, (512,), 10)):
            path = folder / name.replace(" ", "-")
            save(nothing(row, outputs), path, {"batch": (1, 8, 64)})
            made.append(_case(name, path, {"x": random.standard_normal((1, *row)).astype(np.float32)}, settings))
        return made
    chosen = MODELS[model]()
    save(chosen.source(), folder / model, chosen.recipe)
    return [_case(IMAGE, folder / model, chosen.feeds(1), settings)]


def _case(name: str, folder: Path, feeds: dict[str, Any], settings: dict[str, Any]) -> Case:
    with mlflow_trt.load_model(str(folder), **settings) as session:
        expected = session.run(feeds)
        times = []
        for _ in range(_OWN_CALLS):
            started = time.perf_counter()
            session.run(feeds)
            times.append(time.perf_counter() - started)
    return Case(name=name, folder=folder, feeds=feeds, expected=expected, own_ms=1e3 * float(np.median(times)))


def table(rows: list[Measured]) -> Table:
    shown = Table(title="Requests of one image or row", title_justify="left")
    for heading in ("request", "clients", "server"):
        shown.add_column(heading)
    for heading in (
        "requests/s",
        "p50 ms",
        "p99 ms",
        "server CPU ms",
        "of it the model's process",
        "times MLflow's",
        "failed",
    ):
        shown.add_column(heading, justify="right")
    for row in rows:
        base = _find(rows, row.case, MLFLOW, row.load.clients)
        ratio = f"{row.load.requests_per_second / base.load.requests_per_second:.1f}" if base else ""
        shown.add_row(
            row.case, str(row.load.clients), row.target, f"{row.load.requests_per_second:.0f}",
            f"{row.load.p50_ms:.2f}", f"{row.load.p99_ms:.1f}", f"{row.cpu_ms:.2f}",
            "" if row.model_cpu_ms is None else f"{row.model_cpu_ms:.2f}", ratio, str(row.load.failures or ""),
        )  # fmt: skip
    return shown


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Something to reach, as a number that is large enough."""

    name: str
    wanted: float
    found: float
    unit: str = "x"


def goals(rows: list[Measured], cases: list[Case], model: str) -> list[Goal]:
    """What is wanted of the server, as far as it was measured."""
    found: list[Goal] = []

    def add(name: str, wanted: float, reached: float | None, unit: str = "x") -> None:
        if reached is not None:
            found.append(Goal(name=name, wanted=wanted, found=reached, unit=unit))

    def rate(case: str, target: str, clients: int) -> float | None:
        row = _find(rows, case, target, clients)
        return row.load.requests_per_second if row else None

    mine, theirs = _find(rows, IMAGE, HTTP, 1), _find(rows, IMAGE, MLFLOW, 1)
    if mine and theirs:
        allowed = 1.15 * (cases[0].own_ms + 1)
        add(f"1 client: {allowed:.2f} ms (1.15 x (own call + 1 ms)), by p50", 1, allowed / mine.load.p50_ms)
        add("1 client, images: p50 of MLflow's, by p50", 4, theirs.load.p50_ms / mine.load.p50_ms)
    for clients in (8, 32, 64):
        beside = rate(IMAGE, MLFLOW, clients)
        add(f"{clients} clients, images", 6, _ratio(rate(IMAGE, HTTP, clients), beside))
        add(f"{clients} clients, images, Triton", 3, _ratio(rate(IMAGE, TRITON, clients), beside))
    add("64 clients, rows of 2 kB", 25, _ratio(rate(ROW, HTTP, 64), rate(ROW, MLFLOW, 64)))
    if model == "resnet50":
        for http, shared in ((HTTP, SHARED), (FRONT_ENDS, FRONT_ENDS_SHARED)):
            add(f"64 clients, {http}, by HTTP", 2500, rate(IMAGE, http, 64), "/s")
            add(f"64 clients, {http}, shared memory", 6000, rate(IMAGE, shared, 64), "/s")
    return found


def goals_table(reached: list[Goal]) -> Table:
    shown = Table(title="Goals", title_justify="left")
    for heading in ("what", "wanted", "found", ""):
        shown.add_column(heading, justify="left" if heading == "what" else "right")
    for goal in reached:
        mark = "reached" if goal.found >= goal.wanted else "missed"
        shown.add_row(goal.name, f"{goal.wanted:g}{goal.unit}", f"{goal.found:.4g}{goal.unit}", mark)
    return shown


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def _find(rows: list[Measured], case: str, target: str, clients: int) -> Measured | None:
    wanted = (case, target, clients)
    return next((row for row in rows if (row.case, row.target, row.load.clients) == wanted), None)


def main(
    model: Annotated[str, typer.Option(help="nothing, or resnet50.")] = "nothing",
    runtime: Annotated[str, typer.Option(help="Load setting.")] = "onnxruntime",
    clients: Annotated[str, typer.Option(help="Clients at the same time.")] = "1,8,32,64",
    rounds: Annotated[int, typer.Option(help="How often each is measured, in turns.", min=1)] = 3,
    seconds: Annotated[float, typer.Option(help="How long a round is.")] = 2.0,
    triton: Annotated[
        bool, typer.Option("--triton", help="Beside a tritonserver from PyPI, with our backend.")
    ] = False,
    front_ends: Annotated[
        int, typer.Option(help="Beside a second server of ours, with so many front ends.", min=0)
    ] = 0,
    soak_seconds: Annotated[float, typer.Option("--soak", help="Mixed load for so long instead.")] = 0.0,
    output: Annotated[Path | None, typer.Option(help="Write the numbers to this file, as JSON.")] = None,
) -> None:
    """Serve a model in several ways and measure what clients see."""
    console = Console(width=160)
    if model not in {"nothing", "resnet50"}:
        raise typer.BadParameter(f"--model: {model!r}: expected nothing or resnet50")
    if soak_seconds:
        raise typer.Exit(0 if soak(soak_seconds, console) else 1)
    plan = Plan(
        clients=tuple(parse_numbers(clients, "--clients")),
        rounds=rounds,
        seconds=seconds,
        settings={"runtime": runtime},
        with_triton=triton,
        front_ends=front_ends,
    )
    rows: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="mlflow-trt-") as folder:
        cases = make_cases(model, Path(folder), plan.settings)
        try:
            for case in cases:
                for row in measure(case, plan, console):
                    rows.append(row)  # noqa: PERF402  # one by one: they are shown if the next one fails
        finally:
            console.print(table(rows))
    reached = goals(rows, cases, model)
    console.print(goals_table(reached))
    if output is not None:
        about = {
            "machine": platform.machine(), "cpus": os.cpu_count(), "model": model, "runtime": runtime, "rounds": rounds,
            "seconds": seconds, "own_ms": {case.name: case.own_ms for case in cases},
        }  # fmt: skip
        found = {**about, "rows": [asdict(row) for row in rows], "goals": [asdict(goal) for goal in reached]}
        output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
