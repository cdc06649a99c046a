"""Numbers: latency and throughput of a model for each batch size, on TensorRT and on ONNX Runtime.

The GPU's clocks are left alone, and so is whatever else runs on it: the numbers are those of the machine as it is.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from mlflow_trt.core.arrays import Feeds
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.progress_event import BuildProgress
from mlflow_trt.errors import InputShapeError, MissingDependencyError, MlflowTrtError, OptionError
from mlflow_trt.measure.machine import describe_machine
from mlflow_trt.measure.runnable import Runnable, open_runnable, open_source_of
from mlflow_trt.runtime.latency import ROUNDS, Latency, measure_in_turns, turns
from mlflow_trt.runtime.tensorrt_session import Phases, TensorRTSession

_log = get_logger(__name__)

UNITS = {"latency": "ms", "runs": "calls", "batch": "rows", "throughput": "rows per second, at the median latency"}
"""What the numbers of a report are in."""

ENGINE, COPIES, PREDICT = "engine alone", "copies", "predict"
_MOST_TIMED = 2_000


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row of the table.

    Attributes:
        model: the URI of the model.
        runtime: what ran it.
        part: `engine alone`, `copies` (between host and GPU) or `predict` (all of it).
        batch: rows at once.
        latency: milliseconds.
    """

    model: str
    runtime: str
    part: str
    batch: int
    latency: Latency

    @property
    def throughput(self) -> float:
        """Rows a second, at the median latency."""
        return self.batch / self.latency.p50 * 1e3

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "latency": vars(self.latency), "throughput": self.throughput}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """All measurements, what ran them and where, and what could not be measured and why.

    Attributes:
        measurements: the rows of the table.
        runtimes: what ran each model, as `Session.description` says.
        problems: what could not be measured, and why.
        machine: the GPU, the driver and the releases of what took part.
        settings: what was asked for.
    """

    measurements: tuple[Measurement, ...]
    runtimes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    machine: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "units": UNITS,
            "machine": dict(self.machine),
            "settings": dict(self.settings),
            "runtimes": list(self.runtimes),
            "measurements": [row.to_dict() for row in self.measurements],
            "problems": list(self.problems),
        }

    def label(self, row: Measurement) -> str:
        """What a row is of: the runtime and the part and, where there are several, the model."""
        several = len({other.model for other in self.measurements}) > 1
        return f"{row.runtime}, {row.part}" + (f", {row.model}" if several else "")

    def metrics(self) -> list[tuple[str, str, float, int]]:
        """Models, names, values and steps for MLflow; the step is the batch size."""
        found = []
        several = len({row.model for row in self.measurements}) > 1
        for row in self.measurements:
            prefix = f"{row.runtime}/{row.part}".replace(" ", "_").lower()
            if several:
                prefix = f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', row.model).strip('_')}/{prefix}"
            times = {name: getattr(row.latency, name) for name in ("p50", "p10", "p90", "p99", "mean")}
            values = {f"{name}_ms": time for name, time in times.items()} | {"rows_per_second": row.throughput}
            found += [(row.model, f"{prefix}/{name}", value, row.batch) for name, value in values.items()]
        return found


def benchmark(
    model_uri: str | os.PathLike[str],
    batches: Sequence[int],
    *,
    data: Any = None,
    seconds: float = 2.0,
    against_source: bool = True,
    device: int = 0,
    progress: Callable[[BuildProgress], None] | None = None,
) -> Benchmark:
    """Measure a model of this flavor, and its source on ONNX Runtime, for each batch size.

    Args:
        model_uri: any model URI of MLflow, or a folder.
        batches: how many rows at once, 1 or more each.
        data: inputs, whose rows are repeated or cut: arrays by name, or the one array of a single input, also as an
            `.npz` or `.npy` file, a DataFrame or an MLflow dataset; else the model's input example, else made up ones.
        seconds: how long each row of the table is measured, after a warm-up.
        against_source: measure the source model on ONNX Runtime too.
        device: CUDA device ordinal.
        progress: called before each measurement.

    Returns:
        A row for each model, part of a call and batch size, with latencies in milliseconds. Without a GPU the engine
        cannot be measured, which its `problems` say; ONNX Runtime is measured all the same.

    Raises:
        InputError: the data does not fit the model.
        OptionError: a batch size is below 1, or `seconds` is not above 0.
        ArtifactError: it is no model that can be measured.
    """
    _check(batches, seconds)
    model_uri = os.fspath(model_uri)
    problems: list[str] = []
    steps = Steps(progress, len(batches))
    with contextlib.ExitStack() as stack:
        runnable = stack.enter_context(open_runnable(model_uri, device=device))
        given = runnable.given(data)
        if runnable.problem is not None:
            problems.append(runnable.problem)
            _log.warning("%s", runnable.problem)
        models = [runnable]
        has_source = runnable.record is not None and not runnable.record.is_engine_only
        if against_source and has_source and isinstance(runnable.session, TensorRTSession):
            source = stack.enter_context(_source(model_uri, runnable, problems))
            models += [source] if source is not None else []
        rows = measure_runnables(models, batches, given, seconds, steps, problems)
        runtimes = tuple(model.session.description for model in models)
    return Benchmark(
        measurements=tuple(rows),
        runtimes=runtimes,
        problems=tuple(problems),
        machine=describe_machine(),
        settings=describe_settings(batches, seconds, data),
    )


def describe_settings(batches: Sequence[int], seconds: float, data: Any) -> dict[str, str]:
    """What was asked for, as the parameters of a run."""
    given = "given arrays"
    if data is None or isinstance(data, (str, os.PathLike)):
        given = "the model's example, or noise" if data is None else os.fspath(data)
    return {"batches": ":".join(map(str, batches)), "seconds": f"{seconds:g}", "data": str(given)}


class Steps:
    """Progress through the batch sizes that are measured."""

    def __init__(self, progress: Callable[[BuildProgress], None] | None, count: int) -> None:
        self._progress = progress
        self._count = count
        self._done = 0

    def next(self, phase: str) -> None:
        if self._progress is not None:
            self._progress(BuildProgress(phase=phase, fraction=min(self._done / self._count, 1.0)))
        self._done += 1


def measure_runnables(
    models: Sequence[Runnable],
    batches: Sequence[int],
    given: Feeds | None,
    seconds: float,
    steps: Steps,
    problems: list[str],
) -> list[Measurement]:
    """The rows of the table, model by model; a batch size that one refuses becomes a problem.

    The models take turns at each batch size, so that they are measured in the same circumstances.
    """
    sizes = [model.sizes(batches) for model in models]
    rows: list[list[Measurement]] = [[] for _ in models]
    for batch in dict.fromkeys(size for own in sizes for size in own):
        wanted = [number for number, own in enumerate(sizes) if batch in own]
        steps.next(f"batch {batch} on {', '.join(dict.fromkeys(models[number].runtime for number in wanted))}")
        ready: dict[int, Feeds] = {}
        for number in wanted:
            model = models[number]
            try:
                ready[number] = model.inputs(batch, given)
                model.session.run(ready[number])
            except MlflowTrtError as error:
                ready.pop(number, None)
                problems.append(f"{model.name} on {model.runtime}, batch {batch}: {error.message}")
        for number, found in _measure_batch({n: models[n] for n in ready}, batch, ready, seconds).items():
            rows[number] += found
    return [row for found in rows for row in found]


def _measure_batch(
    models: Mapping[int, Runnable], batch: int, feeds: Mapping[int, Feeds], seconds: float
) -> dict[int, list[Measurement]]:
    latencies = measure_in_turns([partial(models[n].session.run, feeds[n]) for n in models], seconds)
    rows = {
        number: [Measurement(model=model.name, runtime=model.runtime, part=PREDICT, batch=batch, latency=latency)]
        for (number, model), latency in zip(models.items(), latencies, strict=True)
    }
    for number, phases in _measure_phases(models, feeds, {n: rows[n][0].latency for n in rows}, seconds).items():
        whole = rows[number][0]
        engine = replace(whole, part=ENGINE, latency=Latency.of([phase.engine for phase in phases]))
        copies = replace(whole, part=COPIES, latency=Latency.of([phase.copy_in + phase.copy_out for phase in phases]))
        rows[number] = [engine, copies, whole]
    return rows


def _measure_phases(
    models: Mapping[int, Runnable], feeds: Mapping[int, Feeds], latencies: Mapping[int, Latency], seconds: float
) -> dict[int, list[Phases]]:
    """The phases of calls of those models that run on TensorRT, in turns."""
    sessions = {n: model.session for n, model in models.items() if isinstance(model.session, TensorRTSession)}
    phases: dict[int, list[Phases]] = {}
    for position in turns(len(sessions)):
        number = list(sessions)[position]
        runs = max(1, min(_MOST_TIMED, int(seconds * 1e3 / latencies[number].p50)) // ROUNDS)
        with contextlib.suppress(InputShapeError):  # run in pieces: there is no engine that takes it alone
            phases.setdefault(number, []).extend(sessions[number].time_phases(feeds[number], runs))
    return {number: found for number, found in phases.items() if found}


@contextmanager
def _source(model_uri: str, runnable: Runnable, problems: list[str]) -> Iterator[Runnable | None]:
    try:
        with open_source_of(model_uri) as source:
            # Its record knows the usual shapes and the batch axis; the ONNX file alone does not.
            yield replace(source, profiles=runnable.profiles, batch_axis=runnable.batch_axis, name=runnable.name)
    except MissingDependencyError as error:
        problems.append(f"the source model is not measured: {error.message}")
        yield None


def _check(batches: Sequence[int], seconds: float) -> None:
    if not batches or min(batches) < 1:
        raise OptionError(f"batches are {tuple(batches)}; expected numbers of 1 or more", option="batch")
    if not seconds > 0:
        raise OptionError(f"seconds is {seconds!r}; expected more than 0", option="seconds")
