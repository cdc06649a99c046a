"""One version of a model that is loaded and served."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from typing import Any

from mlflow import pyfunc
from mlflow.models import Model
from mlflow.types import DataType

from mlflow_trt.deploy.serve.model_source import ModelSource
from mlflow_trt.deploy.serve.protocol import Signature
from mlflow_trt.deploy.serve.statistics import Statistics
from mlflow_trt.flavor.fetch import model_config_here, open_folder, read_mlmodel
from mlflow_trt.flavor.pyfunc import pyfunc_of, settings_of
from mlflow_trt.runtime.session import Session
from mlflow_trt.store.load import open_session


class ServedModel:
    """A session under a name and a version, and what happened to its requests.

    Attributes:
        users: requests that hold it; only the event loop counts them.
        retired: no request comes to it any more, and the last one that holds it closes it.
    """

    def __init__(self, source: ModelSource, session: Session, metadata: Model, impl: Any) -> None:
        self.name = source.name
        self.version = source.version
        self.source = source
        self.session = session
        self.signature = Signature(
            inputs=session.inputs, outputs=session.outputs, binary=frozenset(_binary_columns(metadata))
        )
        self.statistics = Statistics()
        self.users = 0
        self.retired = False
        self.pyfunc = pyfunc.PyFuncModel(model_meta=metadata, model_impl=impl)
        self._files = contextlib.ExitStack()

    def __str__(self) -> str:
        return f"{self.name}, version {self.version}: {self.session.description}"

    def described(self, versions: list[str]) -> dict[str, Any]:
        """As `GET /v2/models/NAME` tells it."""
        return {"name": self.name, "versions": versions, "platform": "mlflow_trt", **self.signature.described()}

    def release(self) -> None:
        """One request less."""
        self.users -= 1
        self._close_if_unused()

    def retire(self) -> None:
        """Close it as soon as no request holds it."""
        self.retired = True
        self._close_if_unused()

    def close(self) -> None:
        """Free the GPU, after the calls that run."""
        self.session.close()
        self._files.close()

    def keep(self, files: contextlib.ExitStack) -> None:
        """Close files that the model reads when it likes, after it was closed itself."""
        self._files = files

    def _close_if_unused(self) -> None:
        if self.retired and not self.users:
            threading.Thread(target=self.close, name=f"mlflow-trt-close-{self.name}").start()


def load_served_model(source: ModelSource, settings: Mapping[str, Any]) -> ServedModel:
    """Load a model, with every batch size warmed up.

    What was downloaded for that is deleted, but for a whole model, whose code may read its files at any time.

    Raises what `mlflow_trt.load_model` raises.
    """
    with contextlib.ExitStack() as files:
        folder = files.enter_context(open_folder(source.uri))
        metadata = read_mlmodel(str(folder.path))
        chosen, rest = settings_of(folder, {**model_config_here(metadata), **settings})
        session = open_session(folder, chosen)
        try:
            impl = pyfunc_of(folder, session, chosen, rest)
            model = ServedModel(source, session, metadata, impl)
        except BaseException:
            session.close()
            raise
        if folder.record.whole is not None:
            model.keep(files.pop_all())
    return model


def _binary_columns(metadata: Model) -> list[str]:
    schema = metadata.get_input_schema()
    if schema is None or schema.is_tensor_spec():
        return []
    return [str(column.name) for column in schema.inputs if column.type == DataType.binary]
