"""Models that are opened to be measured or compared: what runs them here, and what is known of their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.models import Model

from mlflow_trt.convert.onnx.model import read_onnx
from mlflow_trt.core.arrays import Feeds
from mlflow_trt.core.progress_event import Progress
from mlflow_trt.core.scratch import scratch_folder
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.types import BatchAxis, ShapeProfile
from mlflow_trt.errors import BuildError, EngineMismatchError, ExecutionError, RuntimeUnavailableError
from mlflow_trt.flavor.fetch import is_of_this_flavor, open_folder
from mlflow_trt.measure.emulated import open_typed_model
from mlflow_trt.measure.inputs import example_feeds, given_feeds, sample
from mlflow_trt.registry.sources.open import open_source
from mlflow_trt.runtime.onnxruntime_session import OnnxRuntimeSession
from mlflow_trt.runtime.session import Session
from mlflow_trt.runtime.tensorrt_session import TensorRTSession
from mlflow_trt.store.folder import ModelFolder
from mlflow_trt.store.load import open_tensorrt
from mlflow_trt.store.record import Record


@dataclass(frozen=True, kw_only=True)
class Runnable:
    """A model that was opened: what runs it, what is known about its inputs, and why TensorRT does not run it.

    `digest` is the sha256 of what runs. `is_timed` says whether its times mean anything: those of a stand-in do not.
    """

    name: str
    session: Session
    record: Record | None
    profiles: tuple[ShapeProfile, ...]
    batch_axis: BatchAxis | None
    digest: str
    example: Any = None
    problem: str | None = None
    is_timed: bool = True

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

    def given(self, data: Any) -> Feeds | None:
        """What the user gave, else the input example; None where there is nothing but noise to run the model on.

        Raises InputError where what the user gave does not fit the model.
        """
        if data is not None:
            return given_feeds(data, self.session.inputs, self.batch_axis)
        return example_feeds(self.example, self.session.inputs, self.batch_axis)

    def inputs(self, rows: int, given: Feeds | None) -> Feeds:
        """So many rows of what `given` returned."""
        return sample(rows, self.session.inputs, self.profiles, self.batch_axis, given)


@contextmanager
def open_source_of(model_uri: str) -> Iterator[Runnable]:
    """The source model on ONNX Runtime, on the GPU where its CUDA provider works, else on the CPU."""
    with open_source(model_uri) as source, scratch_folder() as workdir:
        model = read_onnx(source.path, workdir)
        axes = tuple(spec.name for spec in model.inputs if spec.shape and not isinstance(spec.shape[0], int))
        with OnnxRuntimeSession(model.path, model.inputs, model.outputs, prefer_cuda=True) as session:
            yield Runnable(
                name=source.lineage["source"],
                session=session,
                record=None,
                profiles=(),
                batch_axis=BatchAxis(inputs=axes, splits=False, declared=False) if axes else None,
                digest=model.digest,
                # That of a whole model is for what surrounds the network.
                example=source.samples[0] if source.samples else source.input_example,
            )


@contextmanager
def open_runnable(
    model_uri: str, *, device: int = 0, emulates: bool = False, progress: Progress | None = None
) -> Iterator[Runnable]:
    """A model as it runs here: its engine on a GPU. Without one, which `problem` says, its source on ONNX Runtime.

    With `emulates` it is the typed model instead of the source, where they differ: the same numbers as the engine's,
    but for the order of sums, and times that mean nothing.
    """
    if not is_of_this_flavor(model_uri):
        with open_source_of(model_uri) as runnable:
            yield runnable
        return
    with open_folder(model_uri) as folder, scratch_folder() as workdir:
        record = folder.record
        session: Session
        try:
            session, problem = open_tensorrt(folder, LoadSettings(device=device, warm_up="off"), progress), None
        except (RuntimeUnavailableError, EngineMismatchError, BuildError, ExecutionError) as error:
            problem = f"{model_uri} does not run on TensorRT here: {error.message}"
            session, digest = _stand_in(folder, workdir, emulates=emulates)
        else:
            digest = session.plan_sha256 if isinstance(session, TensorRTSession) else ""
        with session:  # from here on: an input example that is damaged raises, and the session is closed
            yield Runnable(
                name=model_uri,
                session=session,
                record=record,
                profiles=record.profiles,
                batch_axis=record.batch_axis,
                digest=digest,
                example=_example_of(folder),
                problem=problem,
                is_timed=problem is None or not emulates,
            )


def _example_of(folder: ModelFolder) -> Any:
    """The input example of a model; the golden sample of a whole model, whose example is not for its network."""
    record = folder.record
    if record.whole is not None:
        return None if record.golden is None else folder.read_golden(record.golden).feeds
    return Model.load(str(folder.path)).load_input_example(str(folder.path))


def _stand_in(folder: ModelFolder, workdir: Path, *, emulates: bool) -> tuple[Session, str]:
    """What runs in place of an engine, and its digest."""
    record = folder.record
    typed = open_typed_model(folder, workdir) if emulates else None
    if typed is not None:
        return typed, record.typed.digest
    source = folder.checked_model(record.source)
    return OnnxRuntimeSession(source, record.inputs, record.outputs, prefer_cuda=True), record.source.digest
