"""Conversions that are disturbed in every way that one can think of, against a real `mlflow server` behind a proxy.

    make faults                                           # each signal and fault, at requests and random moments
    make faults FAULTS_OPTIONS="--runs 200"               # that many runs of each scenario, spread over the requests
    make faults FAULTS_OPTIONS="--seconds 900 --only SIGKILL"   # begin no run after that, and only of these scenarios

They are killed and interrupted, their requests fail, their disk is full, their clock jumps, and two run at once.
Each run converts one registered model to a registered name of its own by the command, in a process of its own, with
`--alias champion`; then comes what the scenario does to it; then the same command again, undisturbed. A run is counted
under `left` where the first command did not end well and yet a version is there, or anything else that it made (logged
models, runs, the registered model, tags of the source) although it was no SIGKILL. `broken` counts versions that cannot
be loaded, `next` the second commands that made or found a version that can, with the alias at it, and `clean` the runs
after which `mlflow-trt registry check --mend` leaves nothing to find. The exit code is 1 where a promise was broken.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime as dt
import json
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import networks
import time_machine
from mlflow import MlflowClient
from proxy import Proxy, proxied
from tracking_server import tracking_server

from mlflow_trt.errors import ArtifactError
from mlflow_trt.flavor.register import check_version
from mlflow_trt.flavor.undo import exists, versions_of
from mlflow_trt.registry.check import check_registered_model

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FAULTS = ("refuse", "lose", "drop")
FULL_DISK = "a full disk"
JUMPS = tuple(dt.timedelta(hours=hours) for hours in (-24 * 400, -1, 1, 24 * 400))
_CLONE_NEWNS, _CLONE_NEWUSER, _MS_PRIVATE_REC = 0x20000, 0x10000000, 0x44000  # of linux/sched.h and linux/mount.h
PATIENCE = 180
"""Seconds after which a process hangs."""


@dataclass
class Score:
    """What is counted of one scenario."""

    runs: int = 0
    ended_well: int = 0
    left: int = 0
    broken: int = 0
    next_ok: int = 0
    clean: int = 0
    notes: list[str] = field(default_factory=list)


class Bench:
    """A server, a proxy before it, and version 1 of `s` to convert."""

    def __init__(self, proxy: Proxy, server: str, workdir: Path) -> None:
        self.proxy, self.workdir = proxy, workdir
        # A process is forked for each command from one that has everything imported, and no threads.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["mlflow_trt.cli", "mlflow_trt.registry.convert_version", "onnxruntime"])
        mlflow.set_tracking_uri(server)
        mlflow.set_experiment("faults")
        mlflow.onnx.log_model(networks.product(), name="s", registered_model_name="s", pip_requirements=["onnx"])
        self.client = MlflowClient()
        self.client.update_model_version("s", "1", "What people need to know.")
        self.experiment = mlflow.get_experiment_by_name("faults").experiment_id
        self._names = 0

    def name(self) -> str:
        self._names += 1
        return f"t{self._names}"

    def convert(self, name: str, *, cache: str = "cache", retries: int = 1, disk: int | None = None) -> Any:
        """Begin the command in a process, which may have a disk of so many KiB for all that it writes."""
        environment = {
            "MLFLOW_TRACKING_URI": self.proxy.address,
            "MLFLOW_EXPERIMENT_NAME": "faults",
            "MLFLOW_TRT_CACHE_DIR": str(self.workdir / cache),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
            "CUDA_VISIBLE_DEVICES": "",
        }
        small = self.workdir / "small"
        if disk is not None:
            small.mkdir(exist_ok=True)
            environment |= {"MLFLOW_TRT_CACHE_DIR": str(small / "cache"), "TMPDIR": str(small)}
        arguments = ["convert", "models:/s/1", "--register-as", name, "--fp16", "--batch", "4", "--alias", "champion"]
        log = self.workdir / f"{name}.log"
        process = self._context.Process(target=_run_command, args=(arguments, environment, str(log), str(small), disk))
        process.start()
        return process

    def versions(self, name: str) -> list[Any]:
        return list(versions_of(self.client, name)) if exists(self.client, name) else []

    def leftovers(self, name: str) -> list[str]:
        """Whatever a conversion to this name made, other than versions."""
        left = [f"registered model {name}"] if exists(self.client, name) else []
        models = self.client.search_logged_models([self.experiment], f"name = '{name}'")
        left += [f"logged model {model.model_id} {model.status}" for model in models]
        runs = self.client.search_runs([self.experiment], f"tags.`mlflow_trt.verification_of` = '{name}'")
        left += [f"run {run.info.run_id} {run.info.status}" for run in runs]
        tags = self.client.get_model_version("s", "1").tags
        return left + [f"tag {key}" for key in tags if key.startswith(f"mlflow_trt.converted_to.{name}.")]

    def broken(self, name: str) -> list[str]:
        problems = []
        for version in self.versions(name):
            try:
                check_version(self.client, version)
            except ArtifactError as error:
                problems.append(error.message)
        return problems


def _run_command(arguments: list[str], environment: dict[str, str], log: str, small: str, disk: int | None) -> None:
    from mlflow_trt.cli import main

    os.environ.update(environment)
    if disk is not None:
        _mount_disk(small, disk)
        tempfile.tempdir = None  # as TMPDIR says now
    signal.signal(signal.SIGUSR1, _let_clock_jump)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _build_once(Path(log).parent)
    sys.argv = ["mlflow-trt", *arguments]
    main()


def _mount_disk(folder: str, kib: int) -> None:
    """Let this process, and no other, see a disk of this size there."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    check(libc.unshare(_CLONE_NEWNS if os.geteuid() == 0 else _CLONE_NEWNS | _CLONE_NEWUSER))
    check(libc.mount(b"none", b"/", None, _MS_PRIVATE_REC, None))
    check(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={kib}k".encode()))


def _let_clock_jump(*_: object) -> None:
    to = dt.datetime.now(dt.timezone.utc) + random.choice(JUMPS)
    time_machine.travel(to, tick=True).start()


def _build_once(folder: Path) -> None:
    """Hand the engine of the first command out to the others: every one converts the same model by the same recipe."""
    from mlflow_trt.convert import conversion

    build, plan_kept, built_kept = conversion.build_engine, folder / "engine.plan", folder / "engine.pickle"

    def build_or_copy(model: Path, plan: Path, *arguments: Any, **keywords: Any) -> Any:
        if not built_kept.exists():
            built = build(model, plan, *arguments, **keywords)
            shutil.copyfile(plan, plan_kept)
            built_kept.write_bytes(pickle.dumps(built))
            return built
        shutil.copyfile(plan_kept, plan)
        return pickle.loads(built_kept.read_bytes())

    conversion.build_engine = build_or_copy


def joined(process: Any) -> int:
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        process.join()
        return -1000
    return int(process.exitcode)


def judge(bench: Bench, score: Score, name: str, code: int, what: str, *, killed: bool) -> None:
    """Count what one run left, and convert again."""
    score.runs += 1
    problems = [f"{what}: {problem}" for problem in bench.broken(name)]
    score.broken += len(problems)
    if code == 0:
        score.ended_well += 1
    elif code == -1000:
        problems.append(f"{what}: did not end within {PATIENCE} s")
    else:
        left = [f"version {version.version}" for version in bench.versions(name)]
        if not killed:
            left += bench.leftovers(name)
            problems += [f"{what}: left {', '.join(left)}"] if left else []
        score.left += bool(left)
    bench.proxy.fault = lambda method, path: None
    again = joined(bench.convert(name))
    good = again == 0 and not bench.broken(name) and _is_champion(bench, name)
    score.next_ok += good
    problems += [] if good else [f"{what}: the next conversion ended with {again}"]
    check_registered_model(name, mend=True, minutes=0)
    left_over = check_registered_model(name, minutes=0)
    score.clean += not left_over
    problems += [f"{what}: after mending: {finding.subject}: {finding.problem}" for finding in left_over]
    score.notes += problems
    for problem in problems:
        print(problem, flush=True)


def _is_champion(bench: Bench, name: str) -> bool:
    return str(bench.client.get_model_version_by_alias(name, "champion").version) in {
        str(version.version) for version in bench.versions(name)
    }


def at_request(bench: Bench, number: int, act: Callable[[], str | None]) -> None:
    """Do it when the command's request of that number comes. What it returns is what becomes of the request."""
    count = iter(range(10**9))
    lock = threading.Lock()

    def fault(_method: str, _path: str) -> str | None:
        with lock:
            is_it = next(count) == number
        return act() if is_it else None

    bench.proxy.fault = fault


def signalled(bench: Bench, number: int, signal_number: signal.Signals, after: bool, score: Score) -> None:
    """A signal before a request is passed on, or after it was done and before its answer is there."""
    name, ready = bench.name(), threading.Event()
    begun: list[Any] = []

    def act() -> str | None:
        ready.wait(PATIENCE)
        if not after:
            os.kill(begun[0].pid, signal_number)
            return None
        return "signal"

    def answered() -> None:
        os.kill(begun[0].pid, signal_number)
        time.sleep(random.uniform(0, 0.05))  # how long the answer is on its way, as measured before

    bench.proxy.before_answer = answered
    at_request(bench, number, act)
    begun.append(bench.convert(name))
    ready.set()
    code = joined(begun[0])
    what = f"{signal_number.name} {'after' if after else 'before'} request {number}"
    judge(bench, score, name, code, what, killed=signal_number is signal.SIGKILL)


def at_random(bench: Bench, seconds: float, signal_number: signal.Signals, score: Score) -> None:
    name, moment = bench.name(), random.uniform(0, seconds)
    process = bench.convert(name)
    process.join(moment)
    if process.exitcode is None:
        os.kill(process.pid, signal_number)
    what = f"{signal_number.name} after {moment:.2f} s"
    judge(bench, score, name, joined(process), what, killed=signal_number is signal.SIGKILL)


def failed(bench: Bench, number: int, fault: str, retries: int, score: Score) -> None:
    name = bench.name()
    at_request(bench, number, lambda: fault)
    code = joined(bench.convert(name, retries=retries))
    judge(bench, score, name, code, f"{fault} request {number}, {retries} retries", killed=False)


def on_full_disk(bench: Bench, kib: int, score: Score) -> None:
    name = bench.name()
    judge(bench, score, name, joined(bench.convert(name, disk=kib)), f"a disk of {kib} KiB", killed=False)


def with_clock(bench: Bench, number: int, score: Score) -> None:
    """Its clock jumps before a request, which must not matter to it."""
    name, ready = bench.name(), threading.Event()
    begun: list[Any] = []

    def act() -> None:
        ready.wait(PATIENCE)
        os.kill(begun[0].pid, signal.SIGUSR1)

    at_request(bench, number, act)
    begun.append(bench.convert(name))
    ready.set()
    code = joined(begun[0])
    if code:
        score.notes.append(f"clock at request {number}: ended with {code}")
        print(score.notes[-1], flush=True)
    judge(bench, score, name, code, f"clock at request {number}", killed=False)


def at_once(bench: Bench, machines: int, score: Score) -> None:
    """Two commands at the same time, on one machine, or on two that know nothing of each other's locks."""
    name = bench.name()
    processes = [bench.convert(name, cache=f"cache{number % machines}") for number in range(2)]
    codes = [joined(process) for process in processes]
    versions = bench.versions(name)
    if len(versions) != 1 or any(codes):
        score.notes.append(f"two at once on {machines}: {len(versions)} versions, exit codes {codes}")
        print(score.notes[-1], flush=True)
    score.left += len(versions) - 1
    judge(bench, score, name, max(codes, key=abs), f"two at once on {machines}", killed=False)


def spread(numbers: int, runs: int) -> Sequence[int]:
    """So many of the first numbers, evenly."""
    last, steps = numbers - 1, max(1, runs - 1)
    return range(numbers) if runs >= numbers else sorted({round(step * last / steps) for step in range(runs)})


def scenarios(
    bench: Bench, requests: int, seconds: float, runs: int, only: str
) -> Iterator[tuple[str, Callable[[Score], None]]]:
    """Each run with the scenario that it counts for, in turn, so that time that runs out takes from all."""
    plans: dict[str, list[Callable[[Score], None]]] = {}
    for number in SIGNALS:
        plans[f"{number.name} before and after each request"] = [
            partial(signalled, bench, request, number, after)
            for request in spread(requests, max(1, runs // 2))
            for after in (False, True)
        ]
        plans[f"{number.name} at a random moment"] = [
            partial(at_random, bench, seconds, number) for _ in range(max(1, runs // 2))
        ]
    for fault in FAULTS:
        plans[f"a request: {fault}"] = [
            partial(failed, bench, request, fault, retries)
            for request in spread(requests, max(1, runs // 2))
            for retries in (0, 1)
        ]
    if only in FULL_DISK and (enough := needed_disk(bench)):
        plans[FULL_DISK] = [partial(on_full_disk, bench, 4 * pages) for pages in spread(enough // 4, runs) if pages]
    plans["a clock that jumps"] = [partial(with_clock, bench, request) for request in spread(requests, runs)]
    for machines in (1, 2):
        plans[f"two at once, {machines} machine{'s' if machines > 1 else ''}"] = [
            partial(at_once, bench, machines) for _ in range(max(1, runs // 4))
        ]
    plans = {name: planned for name, planned in plans.items() if only in name}
    while any(plans.values()):
        for name, left in plans.items():
            if left:
                yield name, left.pop(random.randrange(len(left)))


def needed_disk(bench: Bench) -> int:
    """The first power of two, in KiB, with which a conversion ends well; 0 where this system lets nobody mount."""
    if joined(bench.convert(bench.name(), disk=1 << 20)):
        print("no disk can be mounted here: the scenario of the full disk is left out", flush=True)
        return 0
    return next(1 << power for power in range(6, 21) if joined(bench.convert(bench.name(), disk=1 << power)) == 0)


def measure(bench: Bench) -> tuple[int, float]:
    """How many requests a conversion makes, and how many seconds it takes."""
    joined(bench.convert(bench.name()))  # imports
    before, started = len(bench.proxy.requests), time.monotonic()
    assert joined(bench.convert(bench.name())) == 0
    return len(bench.proxy.requests) - before, time.monotonic() - started


def run(runs: int, seconds: float, only: str, seed: int) -> dict[str, Score]:
    random.seed(seed)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    scores: dict[str, Score] = {}
    with contextlib.ExitStack() as stack:
        workdir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        database = workdir / "empty.db"
        MlflowClient(f"sqlite:///{database}").search_experiments()
        server = stack.enter_context(tracking_server(workdir, database))
        bench = Bench(stack.enter_context(proxied(server)), server, workdir)
        requests, usual = measure(bench)
        print(f"a conversion makes {requests} requests in {usual:.1f} s; seed {seed}", flush=True)
        end = time.monotonic() + seconds
        for name, one in scenarios(bench, requests, usual, runs, only):
            if scores and time.monotonic() > end:
                break
            one(scores.setdefault(name, Score()))
    return scores


def table(scores: dict[str, Score]) -> str:
    lines = ["| scenario | runs | ended well | left | broken | next | clean |", "| --- |" + " --- |" * 6]
    total = Score()
    for name, score in sorted(scores.items()):
        numbers = (score.runs, score.ended_well, score.left, score.broken, score.next_ok, score.clean)
        lines.append(f"| {name} | " + " | ".join(map(str, numbers)) + " |")
        for key in ("runs", "ended_well", "left", "broken", "next_ok", "clean"):
            setattr(total, key, getattr(total, key) + getattr(score, key))
    numbers = (total.runs, total.ended_well, total.left, total.broken, total.next_ok, total.clean)
    return "\n".join([*lines, "| **all** | " + " | ".join(map(str, numbers)) + " |"])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=60, help="of each scenario")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    scores = run(given.runs, given.seconds, given.only, given.seed)
    print(table(scores))
    if given.json is not None:
        given.json.write_text(json.dumps({name: vars(score) for name, score in scores.items()}, indent=2))
    return int(any(score.notes for score in scores.values()))


if __name__ == "__main__":
    sys.exit(main())
