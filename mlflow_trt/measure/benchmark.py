"""Numbers: latency and throughput of a model for each batch size, on TensorRT and on ONNX Runtime.

The GPU's clocks are left alone, and so is whatever else runs on it: the numbers are those of the machine as it is.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlflow.models import Model

from mlflow_trt.convert.onnx.model import read_onnx
from mlflow_trt.core.arrays import Feeds
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.progress_event import BuildProgress, Progress
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.types import BatchAxis, ShapeProfile
from mlflow_trt.errors import (
    BuildError,
    EngineMismatchError,
    ExecutionError,
    InputShapeError,
    MissingDependencyError,
    MlflowTrtError,
    OptionError,
    RuntimeUnavailableError,
)
from mlflow_trt.flavor.fetch import is_of_this_flavor, open_folder
from mlflow_trt.measure.inputs import sample
from mlflow_trt.registry.sources.open import open_source
from mlflow_trt.runtime.latency import Latency, measure
from mlflow_trt.runtime.onnxruntime_session import OnnxRuntimeSession
from mlflow_trt.runtime.session import Session
from mlflow_trt.runtime.tensorrt_session import TensorRTSession
from mlflow_trt.store.folder import ModelFolder
from mlflow_trt.store.load import open_tensorrt
from mlflow_trt.store.record import Record

_log = get_logger(__name__)

ENGINE, COPIES, PREDICT = "engine alone", "copies", "predict"
_MOST_TIMED = 2_000


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row of the table. `part` is `engine alone`, `copies` (between host and GPU) or `predict` (all of it)."""

    model: str
    runtime: str
    part: str
    batch: int
    latency: Latency

    @property
    def throughput(self) -> float:
        """Rows a second."""
        return self.batch / self.latency.mean * 1e3

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "latency": vars(self.latency), "throughput": self.throughput}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """All measurements, what ran them, and what could not be measured and why."""

    measurements: tuple[Measurement, ...]
    runtimes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "runtimes": list(self.runtimes),
            "measurements": [row.to_dict() for row in self.measurements],
            "problems": list(self.problems),
        }

    def metrics(self) -> list[tuple[str, float, int]]:
        """Names, values and steps for MLflow; the step is the batch size."""
        found = []
        several = len({row.model for row in self.measurements}) > 1
        for row in self.measurements:
            prefix = f"{row.runtime}/{row.part}".replace(" ", "_").lower()
            if several:
                prefix = f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', row.model).strip('_')}/{prefix}"
            values = {"mean_ms": row.latency.mean, "p50_ms": row.latency.p50, "p90_ms": row.latency.p90}
            values |= {"p99_ms": row.latency.p99, "rows_per_second": row.throughput}
            found += [(f"{prefix}/{name}", value, row.batch) for name, value in values.items()]
        return found


@dataclass(frozen=True, kw_only=True)
class Runnable:
    """A model that was opened: what runs it, what is known about its inputs, and why TensorRT does not run it."""

    name: str
    session: Session
    record: Record | None
    profiles: tuple[ShapeProfile, ...]
    batch_axis: BatchAxis | None
    example: Mapping[str, Any] | None = None
    problem: str | None = None

    @property
    def runtime(self) -> str:
        """The word for tables and metrics; the session's description says more."""
        if isinstance(self.session, OnnxRuntimeSession):
            return f"ONNX Runtime {self.session.device}"
        return "TensorRT"

    def sizes(self, batches: Sequence[int]) -> Sequence[int]:
        """The batch sizes to measure: a model without a batch axis has only its own."""
        if self.batch_axis is not None:
            return batches
        leading = self.session.inputs[0].fixed[:1] if self.session.inputs else ()
        return [leading[0] or 1] if leading else [1]

    def inputs(self, rows: int, data: Any) -> Feeds:
        return sample(rows, self.session.inputs, self.profiles, self.batch_axis, self.example if data is None else data)


@contextmanager
def open_source_of(model_uri: str) -> Iterator[Runnable]:
    """The source model on ONNX Runtime, on the GPU where its CUDA provider works, else on the CPU."""
    with open_source(model_uri) as source, tempfile.TemporaryDirectory(prefix="mlflow-trt-") as workdir:
        model = read_onnx(source.path, Path(workdir))
        axes = tuple(spec.name for spec in model.inputs if spec.shape and not isinstance(spec.shape[0], int))
        with OnnxRuntimeSession(model.path, model.inputs, model.outputs, prefer_cuda=True) as session:
            yield Runnable(
                name=source.lineage["source"],
                session=session,
                record=None,
                profiles=(),
                batch_axis=BatchAxis(inputs=axes, splits=False, declared=False) if axes else None,
                # That of a whole model is for what surrounds the network.
                example=source.samples[0] if source.samples else _name_example(source.input_example, session),
            )


@contextmanager
def open_runnable(model_uri: str, *, device: int = 0, progress: Progress | None = None) -> Iterator[Runnable]:
    """A model as it runs here: its engine on a GPU; without one its source on ONNX Runtime, and a word that says so."""
    if not is_of_this_flavor(model_uri):
        with open_source_of(model_uri) as runnable:
            yield runnable
        return
    with open_folder(model_uri) as folder:
        record = folder.record
        try:
            session, problem = open_tensorrt(folder, LoadSettings(device=device, warm_up="off"), progress), None
        except (RuntimeUnavailableError, EngineMismatchError, BuildError, ExecutionError) as error:
            problem = f"{model_uri} does not run on TensorRT here: {error.message}"
            source = folder.checked_model(record.source)
            session = OnnxRuntimeSession(source, record.inputs, record.outputs, prefer_cuda=True)
        with session:  # from here on: an input example that is damaged raises, and the session is closed
            example = _example_of(folder, session)
            yield Runnable(
                name=model_uri,
                session=session,
                record=record,
                profiles=record.profiles,
                batch_axis=record.batch_axis,
                example=example,
                problem=problem,
            )


def benchmark(
    model_uri: str,
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
        batches: how many rows at once.
        data: inputs by name, whose rows are repeated or cut; else the model's input example, else made up ones.
        seconds: how long each row of the table is measured, after a warm-up.
        against_source: measure the source model on ONNX Runtime too.
        progress: called before each measurement.

    Without a GPU the engine cannot be measured, which `problems` says; ONNX Runtime is measured all the same.
    """
    _check(batches, seconds)
    rows: list[Measurement] = []
    problems: list[str] = []
    steps = _Steps(progress, len(batches) * (2 if against_source else 1))
    with open_runnable(model_uri, device=device) as runnable:
        if runnable.problem is not None:
            problems.append(runnable.problem)
            _log.warning("%s", runnable.problem)
        rows += measure_runnable(runnable, batches, data, seconds, steps, problems)
        runtimes = [runnable.session.description]
        if against_source and isinstance(runnable.session, TensorRTSession):
            with _source(model_uri, runnable, problems) as source:
                if source is not None:
                    rows += measure_runnable(source, batches, data, seconds, steps, problems)
                    runtimes.append(source.session.description)
    return Benchmark(measurements=tuple(rows), runtimes=tuple(runtimes), problems=tuple(problems))


class _Steps:
    def __init__(self, progress: Callable[[BuildProgress], None] | None, count: int) -> None:
        self._progress = progress
        self._count = count
        self._done = 0

    def next(self, phase: str) -> None:
        if self._progress is not None:
            self._progress(BuildProgress(phase=phase, fraction=min(self._done / self._count, 1.0)))
        self._done += 1


def measure_runnable(
    runnable: Runnable,
    batches: Sequence[int],
    data: Any,
    seconds: float,
    steps: _Steps | None = None,
    problems: list[str] | None = None,
) -> list[Measurement]:
    """The rows of the table for one model; a batch size that it refuses becomes a problem."""
    rows: list[Measurement] = []
    for batch in runnable.sizes(batches):
        if steps is not None:
            steps.next(f"{runnable.runtime}, batch {batch}")
        try:
            rows += _at(runnable, batch, runnable.inputs(batch, data), seconds)
        except MlflowTrtError as error:
            if problems is None:
                raise
            problems.append(f"{runnable.name} on {runnable.runtime}, batch {batch}: {error.message}")
    return rows


def _at(runnable: Runnable, batch: int, feeds: Feeds, seconds: float) -> list[Measurement]:
    session = runnable.session
    whole = measure(lambda: session.run(feeds), seconds)
    row = Measurement(model=runnable.name, runtime=runnable.runtime, part=PREDICT, batch=batch, latency=whole)
    rows = [row]
    if isinstance(session, TensorRTSession):
        runs = max(10, min(_MOST_TIMED, int(seconds * 1e3 / whole.p50)))
        with contextlib.suppress(InputShapeError):  # run in pieces: there is no engine that takes it alone
            phases = session.time_phases(feeds, runs)
            rows.insert(0, replace(row, part=ENGINE, latency=Latency.of([phase.engine for phase in phases])))
            copies = [phase.copy_in + phase.copy_out for phase in phases]
            rows.insert(1, replace(row, part=COPIES, latency=Latency.of(copies)))
    return rows


@contextmanager
def _source(model_uri: str, runnable: Runnable, problems: list[str]) -> Iterator[Runnable | None]:
    try:
        with open_source_of(model_uri) as source:
            # Its record knows the usual shapes and the batch axis; the ONNX file alone does not.
            yield replace(source, profiles=runnable.profiles, batch_axis=runnable.batch_axis, name=runnable.name)
    except MissingDependencyError as error:
        problems.append(f"the source model is not measured: {error.message}")
        yield None


def _example_of(folder: ModelFolder, session: Session) -> Mapping[str, Any] | None:
    """The input example of a model; the golden sample of a whole model, whose example is not for its network."""
    record = folder.record
    if record.whole is not None:
        return None if record.golden is None else folder.read_golden(record.golden).feeds
    return _name_example(Model.load(str(folder.path)).load_input_example(str(folder.path)), session)


def _name_example(example: Any, session: Session) -> Mapping[str, Any] | None:
    """An input example as arrays by name, where it is of a form that says so."""
    if isinstance(example, Mapping):
        return example
    if example is not None and hasattr(example, "shape") and len(session.inputs) == 1 and not hasattr(example, "iloc"):
        return {session.inputs[0].name: example}
    return None


def _check(batches: Sequence[int], seconds: float) -> None:
    if not batches or min(batches) < 1:
        raise OptionError(f"batches are {tuple(batches)}; expected numbers of 1 or more", option="batch")
    if not seconds > 0:
        raise OptionError(f"seconds is {seconds!r}; expected more than 0", option="seconds")
