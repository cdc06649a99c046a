"""How fast `mlflow models serve` answers: mlflow-trt beside a model that does nothing and beside mlflow.onnx.

All of them are served at the same time, and asked in turns.

    python -m benchmarks.models_serve --runtime onnxruntime --clients 1,8 --images 1 --seconds 2

Needs no network and no httpx. Without pyarrow, only JSON is measured.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import platform
import tempfile
from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import mlflow
import numpy as np
import numpy.typing as npt
import onnx
import requests
import typer
from mlflow.models import ModelSignature
from rich.console import Console
from rich.table import Table

import mlflow_trt
from benchmarks.load import Answer, Load, drive, summarized
from benchmarks.options import parse_names
from benchmarks.resnet50 import resnet50
from examples.serving import Server, running
from mlflow_trt.cli.options import parse_batch, parse_numbers, parse_settings
from mlflow_trt.core import wire
from mlflow_trt.errors import OnnxModelError, OptionError
from mlflow_trt.measure.inputs import sample
from mlflow_trt.store.folder import read_folder
from mlflow_trt.store.record import Record

TARGETS = ("floor", "mlflow-trt", "mlflow.onnx")
ENCODERS = {"json": wire.json_request, "parquet": wire.parquet_request}
_TOLERANCE = 0.02  # of the largest value: fp16 passes, another model's numbers do not
_QUOTED = 5000  # characters of a log
Feeds = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of the table. A request has `images` rows and `megabytes`."""

    target: str
    wire: str
    images: int
    megabytes: float
    load: Load

    @property
    def images_per_second(self) -> float:
        return self.load.requests_per_second * self.images


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured: each wire with each number of images and clients, in so many rounds of so many seconds."""

    wires: tuple[str, ...]
    images: tuple[int, ...]
    clients: tuple[int, ...]
    rounds: int
    seconds: float
    megabytes_at_once: float


class Models:
    """The three models as folders of MLflow, with one signature."""

    def __init__(self, folder: Path, model: Path | onnx.ModelProto, plan: Plan, options: Mapping[str, Any]) -> None:
        self._folder = folder
        self._answers = options["answers"]
        mlflow_trt.save_model(
            model,
            folder / "mlflow-trt",
            precision=options["precision"],
            batch=options["batch"],
            verify=False,
            signature=True,  # of inputs, too, for models that need to be told
            model_config={**options["settings"], "runtime": options["runtime"], "answers": options["answers"]},
        )
        self.record: Record = read_folder(folder / "mlflow-trt").record
        signature = mlflow.models.Model.load(str(folder / "mlflow-trt")).signature
        if "mlflow.onnx" in options["targets"]:
            proto = onnx.load(model) if isinstance(model, Path) else model
            mlflow.onnx.save_model(proto, str(folder / "mlflow.onnx"), signature=signature, pip_requirements=["onnx"])
        self._write_floor(signature, max(plan.images))

    def _write_floor(self, signature: ModelSignature, rows: int) -> None:
        outputs = {output.name: [size or 1 for size in output.fixed[1:]] for output in self.record.outputs}
        mlflow.pyfunc.save_model(
            str(self._folder / "floor"),
            python_model=str(Path(__file__).with_name("floor_model.py")),
            signature=signature,
            model_config={"rows": rows, "outputs": outputs, "answers": self._answers},
            pip_requirements=["mlflow"],
        )

    def path(self, target: str) -> Path:
        """The folder of a model."""
        return self._folder / target

    def feeds(self, rows: int) -> Feeds:
        """Noise, the same for every target."""
        return sample(rows, self.record.inputs, self.record.profiles, self.record.batch_axis)

    def expected(self, rows: int) -> Feeds:
        """What ONNX Runtime makes of the feeds."""
        with mlflow_trt.load_model(str(self.path("mlflow-trt")), runtime="onnxruntime") as session:
            return session.run(self.feeds(rows))

    def server(self, target: str, workers: int) -> Server:
        """Start a server."""
        environment = {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
        store = f"sqlite:///{self._folder / 'mlflow.db'}"
        return Server(str(self._folder / target), store, {}, workers=workers, environment=environment)


def measure(models: Models, targets: Sequence[str], plan: Plan, workers: int, console: Console) -> Iterator[Measured]:
    """Serve the models and measure them, each after its answer was found to be right."""
    servers: dict[str, Server] = {}
    with ExitStack() as stack:
        for target in targets:
            servers[target] = models.server(target, workers)
            stack.enter_context(running(servers[target]))
        for kind, images in itertools.product(plan.wires, plan.images):
            request = ENCODERS[kind](models.feeds(images))
            expected = models.expected(images)
            for target, server in servers.items():
                check(target, server, request, expected)
            megabytes = len(request.content) / 1e6
            for clients in plan.clients:
                case = f"{clients} clients, {images} images as {kind}"
                if clients > 1 and clients * megabytes > plan.megabytes_at_once:
                    console.print(f"Left out: {case}, {megabytes:.0f} MB each")
                    continue
                console.print(f"{case} ...")
                for target, load in in_turns(servers, request, clients, plan).items():
                    if load.failures:
                        said = f"{target}: {load.failures} requests failed, the first with {load.problem}"
                        console.print(said, markup=False)
                    yield Measured(target=target, wire=kind, images=images, megabytes=megabytes, load=load)


def in_turns(servers: Mapping[str, Server], request: wire.Request, clients: int, plan: Plan) -> dict[str, Load]:
    """What the clients of each server see, in rounds: a machine that gets slower or faster does so for all."""
    seen: dict[str, list[list[Answer]]] = {target: [] for target in servers}
    for _ in range(plan.rounds):
        for target, server in servers.items():
            seen[target].append(drive(server.address, request, clients, plan.seconds))
    return {target: summarized(clients, rounds) for target, rounds in seen.items()}


def check(target: str, server: Server, request: wire.Request, expected: Feeds) -> None:
    """Compare an answer with ONNX Runtime's. The floor's need only have its form."""
    headers = {"Content-Type": request.content_type}
    try:
        response = requests.post(f"{server.address}/invocations", request.content, headers=headers, timeout=600)
    except requests.ConnectionError as error:
        said = server.log()[-_QUOTED:]
        raise RuntimeError(f"the server of {target} answers no more. It printed:\n{said}") from error
    if not response.ok:
        raise wire.error_of(response.status_code, response.content)
    answer = wire.decode_answer(response.content)
    for name, array in expected.items():
        off = float(np.abs(np.subtract(answer[name], array)).max() / np.abs(array).max())
        if answer[name].shape != array.shape or (target != "floor" and not off < _TOLERANCE):
            raise RuntimeError(f"{target} answers {name!r} with an error of {off:.2g} of the largest value")


def table(rows: list[Measured]) -> Table:
    shown = Table(title="mlflow models serve", title_justify="left")
    for heading in ("wire", "images", "MB", "clients", "model"):
        shown.add_column(heading)
    for heading in ("requests/s", "images/s", "p50 ms", "p99 ms", "p50 / floor", "throughput / floor", "failed"):
        shown.add_column(heading, justify="right")
    floor = {_key(row): row.load for row in rows if row.target == "floor"}
    for row in sorted(rows, key=lambda row: (*_key(row), TARGETS.index(row.target))):
        load, base = row.load, floor.get(_key(row))
        shown.add_row(
            row.wire, str(row.images), f"{row.megabytes:.1f}", str(load.clients), row.target,
            f"{load.requests_per_second:.1f}", f"{row.images_per_second:.1f}",
            f"{load.p50_ms:.1f}", f"{load.p99_ms:.1f}",
            f"{load.p50_ms / base.p50_ms:.2f}" if base else "",
            f"{load.requests_per_second / base.requests_per_second:.2f}" if base else "",
            str(load.failures or ""),
        )  # fmt: skip
    return shown


def faster_than_json(rows: list[Measured]) -> Iterator[str]:
    """What parquet brings, one client at a time."""
    json_rows = {(row.target, row.images, row.load.clients): row for row in rows if row.wire == "json"}
    for row in rows:
        other = json_rows.get((row.target, row.images, row.load.clients))
        if row.wire == "parquet" and other is not None and row.load.clients == 1:
            ratio = other.load.p50_ms / row.load.p50_ms
            yield f"{row.target}, {row.images} images: parquet is {ratio:.1f} times as fast as JSON"


def _key(row: Measured) -> tuple[str, int, int]:
    return row.wire, row.images, row.load.clients


def main(
    model: Annotated[Path | None, typer.Option(help="An ONNX file. Default: a ResNet-50 with random weights.")] = None,
    runtime: Annotated[str, typer.Option(help="Load setting of mlflow-trt.")] = "auto",
    precision: Annotated[str, typer.Option(help="Precision of the engine.")] = "fp32",
    batch: Annotated[str, typer.Option(help="Batch range of the engine.")] = "1:8:64",
    answers: Annotated[
        str, typer.Option(help="Load setting: lists or base64, for mlflow-trt and the floor.")
    ] = "lists",
    settings: Annotated[str, typer.Option(help="Further load settings, as JSON.")] = "{}",
    targets: Annotated[str, typer.Option(help="Which of floor, mlflow-trt and mlflow.onnx.")] = ",".join(TARGETS),
    wires: Annotated[str, typer.Option(help="Which of json and parquet.")] = "json,parquet",
    images: Annotated[str, typer.Option(help="Images in a request.")] = "1,32",
    clients: Annotated[str, typer.Option(help="Clients at the same time.")] = "1,8,32,64",
    rounds: Annotated[int, typer.Option(help="How often each is measured, in turns.", min=1)] = 3,
    seconds: Annotated[float, typer.Option(help="How long a round is.")] = 2.0,
    workers: Annotated[int, typer.Option(help="Workers of the server.")] = 1,
    megabytes_at_once: Annotated[
        float, typer.Option(help="Leave out what would have more than this on its way at once.")
    ] = 600.0,
    output: Annotated[Path | None, typer.Option(help="Write the numbers to this file, as JSON.")] = None,
) -> None:
    """Serve three models and measure what clients see."""
    console = Console(width=160)
    try:
        kinds, chosen = parse_names(wires, ENCODERS), parse_names(targets, TARGETS)
    except ArgumentTypeError as error:
        raise typer.BadParameter(str(error)) from None
    plan = Plan(
        wires=tuple(kind for kind in kinds if kind != "parquet" or importlib.util.find_spec("pyarrow")),
        images=tuple(parse_numbers(images, "--images")),
        clients=tuple(parse_numbers(clients, "--clients")),
        rounds=rounds,
        seconds=seconds,
        megabytes_at_once=megabytes_at_once,
    )
    options = {
        "runtime": runtime, "precision": precision, "batch": parse_batch(batch), "answers": answers, "targets": chosen,
        "settings": parse_settings(settings, "--settings") or {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="mlflow-trt-") as folder:
        try:
            models = Models(Path(folder), model or resnet50(), plan, options)
        except (OnnxModelError, OptionError) as error:
            raise typer.BadParameter(error.message) from None
        rows: list[Measured] = []
        try:
            for row in measure(models, chosen, plan, workers, console):
                rows.append(row)  # noqa: PERF402  # one by one: they are shown if the next one fails
        finally:
            console.print(table(rows), *faster_than_json(rows), sep="\n")
    if output is not None:
        found = [asdict(row) | {"images_per_second": row.images_per_second} for row in rows]
        about = {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "workers": workers,
            "rounds": rounds,
            "seconds": seconds,
            **options,
        }
        output.write_text(json.dumps({**about, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
