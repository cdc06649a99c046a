"""What several test files share."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import mlflow
import onnx
import pytest
from mlflow import MlflowClient
from packaging.version import Version
from real_models import RealModel

import mlflow_trt
from mlflow_trt.convert.conversion import Conversion, ConversionTask, convert_source
from mlflow_trt.convert.onnx.model import OnnxModel, read_onnx
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.convert.resolve_profiles import resolve_profiles
from mlflow_trt.convert.samples import SampleOrigin, cut_samples, generate_samples
from mlflow_trt.convert.typed_model.maker import maker_for
from mlflow_trt.core.types import ComputeCapability, Gpu
from mlflow_trt.flavor.conversions import LoggingOptions, log_conversion, save_conversion
from mlflow_trt.flavor.mlmodel import PackagingOptions
from mlflow_trt.flavor.undo import undo_on_failure
from mlflow_trt.pipeline.make import PreparedConversion, open_onnx, prepare_conversion
from mlflow_trt.pipeline.options import ConversionOptions
from mlflow_trt.runtime.onnxruntime_session import OnnxRuntimeSession


class Store:
    """A fresh MLflow store on SQLite, with its artifacts beside it."""

    def __init__(self, folder: Path, empty_database: Path) -> None:
        shutil.copyfile(empty_database, folder / "mlflow.db")
        self._open(folder)
        self.experiment_id = mlflow.create_experiment("test", artifact_location=(folder / "artifacts").as_uri())
        mlflow.set_experiment(experiment_id=self.experiment_id)

    @classmethod
    def copy_of(cls, other: Store, folder: Path) -> Store:
        """A store of its own with what is in another one: tests that change it do not cross."""
        shutil.copytree(other.folder, folder, dirs_exist_ok=True)
        with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
            for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                for _, column, kind, *_ in database.execute(f"PRAGMA table_info('{table}')").fetchall():
                    if kind.startswith(("VARCHAR", "TEXT")):
                        where = f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) WHERE "{column}" LIKE ?'
                        database.execute(where, (str(other.folder), str(folder), f"%{other.folder}%"))
        copy = cls.__new__(cls)
        copy._open(folder)
        copy.experiment_id = other.experiment_id
        mlflow.set_experiment(experiment_id=copy.experiment_id)
        return copy

    def _open(self, folder: Path) -> None:
        self.folder = folder
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        mlflow.set_tracking_uri(self.uri)
        self.client = MlflowClient()

    def logged_models(self):
        return self.client.search_logged_models([self.experiment_id])

    def is_untouched(self) -> bool:
        return not self.logged_models() and not self.client.search_registered_models()


def save_networks(networks: Mapping[str, Callable[[], onnx.ModelProto]], folder: Path) -> dict[str, Path]:
    """Save what these make, for batches of 1 to 8, in folders of their names; returns them."""
    for name, network in networks.items():
        mlflow_trt.save_model(network(), folder / name, batch=(1, 4, 8), verify=False)
    return {name: folder / name for name in networks}


@contextlib.contextmanager
def opened_on_cpu(folders: Mapping[str, Path]) -> Iterator[dict[str, mlflow_trt.Session]]:
    """Sessions on ONNX Runtime of the models in these folders, for the length of a block."""
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(mlflow_trt.load_model(str(folder), runtime="onnxruntime"))
            for name, folder in folders.items()
        }


def gpu(target: str) -> Gpu:
    """A GPU of this compute capability, which no machine has."""
    return Gpu(
        ordinal=0, name="a GPU", compute_capability=ComputeCapability.parse(target), memory=1 << 30, uuid="GPU-1"
    )


def needs_release(package: str, oldest: str) -> pytest.MarkDecorator:
    """For a test of what earlier releases lack, which `make test-lowest` installs."""
    return pytest.mark.skipif(Version(version(package)) < Version(oldest), reason=f"needs {package} {oldest}")


PATIENCE = 300.0
"""Seconds after which something that must happen is taken not to: far more than a busy machine needs."""


def wait_for(condition) -> None:
    """Wait until it holds, as long as there is patience."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def no_threads() -> Iterator[None]:
    """A system that has no thread to give to the package, while tests may start theirs."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("mlflow-trt"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield


@contextlib.contextmanager
def keep_asking(ask: Callable[[int], object], clients: int) -> Iterator[list[object]]:
    """Call `ask` again and again for the length of a block, in so many threads, with their numbers.

    Gives what came of it so far, and raises what `ask` raised.
    """
    answers: list[object] = []
    ended = threading.Event()

    def ask_again(number: int) -> None:
        while not ended.is_set():
            answers.append(ask(number))

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask_again, number) for number in range(clients)]
        try:
            yield answers
        finally:
            ended.set()
        for one in asking:
            one.result()


def reference(source: OnnxModel) -> OnnxRuntimeSession:
    return OnnxRuntimeSession(source.path, source.inputs, source.outputs)


def read(model: RealModel | onnx.ModelProto, folder: Path) -> OnnxModel:
    return read_onnx(model.path() if isinstance(model, RealModel) else model, folder)


def convert_in(folder: Path, source: OnnxModel, recipe: Recipe | None = None, **keywords) -> Conversion:
    return convert_source(ConversionTask(source=source, recipe=recipe or Recipe(), workdir=folder, **keywords))


def prepare(**keywords) -> PreparedConversion:
    """The options of a conversion, from the keywords of `save_model` and those that only tests give."""
    others = {field.name for field in fields(ConversionOptions)} - {"recipe"}
    options = {name: keywords.pop(name) for name in others & set(keywords)}
    return prepare_conversion(ConversionOptions(recipe=Recipe.of(**keywords), **options))


def save_prepared(model, path: Path, prepared: PreparedConversion, **packaging) -> None:
    """`mlflow_trt.save_model` with options that have no keyword there, such as another GPU than this machine's."""
    with open_onnx(model, prepared.options) as source:
        save_conversion(source, path, prepared, PackagingOptions(**packaging))


def log_prepared(model, prepared: PreparedConversion, **logging):
    """`mlflow_trt.log_model` with such options."""
    with undo_on_failure() as undo, open_onnx(model, prepared.options) as source:
        return log_conversion(source, prepared, PackagingOptions(), LoggingOptions(**logging), undo)


def typed_model(model, folder, precision, data=None, *, tolerance=None, weight_only=None, **recipe):
    """The typed model of a small network, without an engine."""
    source = read(model, folder)
    wanted = Recipe(precision=precision, **recipe)
    profiles = resolve_profiles(source, wanted)
    samples = (
        generate_samples(source, profiles)
        if data is None
        else cut_samples(data, SampleOrigin.CALIBRATION_DATA, source, profiles)
    )
    maker = maker_for(
        source, wanted, profiles, folder, samples=samples, tolerance=tolerance, weight_only=weight_only or {}
    )
    return maker.make({})
