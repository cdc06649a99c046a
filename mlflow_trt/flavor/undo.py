"""Nothing half-registered: what was put into MLflow is taken out again where a later step fails or is interrupted."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from mlflow_trt.core.log import get_logger

_log = get_logger(__name__)


class Undo:
    """Steps that take back what was done, in reverse order.

    Each is added before the thing is done, so that an interruption in between is covered; it must therefore do nothing
    where there is nothing to take back.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], object]]] = []

    def add(self, what: str, step: Callable[[], object]) -> None:
        """`what` completes the sentence "... could not be taken back"."""
        self._steps.append((what, step))

    def run(self) -> None:
        for what, step in reversed(self._steps):
            try:
                step()
            except Exception as error:  # noqa: BLE001  # the error that led here is the one to raise
                _log.warning("%s could not be taken back: %s", what, error)


@contextmanager
def undo_on_failure() -> Iterator[Undo]:
    """Run the steps that were added to the `Undo` where the block ends in an exception, KeyboardInterrupt included."""
    undo = Undo()
    try:
        yield undo
    except BaseException:
        undo.run()
        raise


def undo_logging(undo: Undo, registered_model_name: str | None, *, keep_model: bool = False) -> Callable[[str], None]:
    """Prepare to take back a logged model and what is registered of it; returns what to call with its id.

    With `keep_model`, for a logged model that was there before, only what is registered is taken back.
    """
    client = MlflowClient()
    is_new = registered_model_name is not None and not exists(client, registered_model_name)
    if registered_model_name is not None and is_new:
        undo.add(
            f"The registered model {registered_model_name}", lambda: _delete_if_empty(client, registered_model_name)
        )

    def logged(model_id: str) -> None:
        if not keep_model:
            undo.add(f"The logged model {model_id}", lambda: client.delete_logged_model(model_id))
        if registered_model_name is not None:
            undo.add(
                f"The version of {registered_model_name} that was made of {model_id}",
                lambda: _delete_versions_of(client, registered_model_name, model_id),
            )

    return logged


def exists(client: MlflowClient, registered_model_name: str) -> bool:
    try:
        client.get_registered_model(registered_model_name)
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            return False
        raise
    return True


def versions_of(client: MlflowClient, registered_model_name: str, condition: str = "") -> Iterator[ModelVersion]:
    """Every version of a registered model, the newest first; `condition` is more of a filter for MLflow's search."""
    quote = '"' if "'" in registered_model_name else "'"
    clauses = [f"name = {quote}{registered_model_name}{quote}", *([condition] if condition else [])]
    token = None
    while True:
        page = client.search_model_versions(" and ".join(clauses), order_by=["version_number DESC"], page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def restore_tag(client: MlflowClient, version: ModelVersion, key: str) -> None:
    """Give a model version the value of a tag that it had when `version` was read."""
    if key in version.tags:
        client.set_model_version_tag(version.name, str(version.version), key, version.tags[key])
    elif key in client.get_model_version(version.name, str(version.version)).tags:
        client.delete_model_version_tag(version.name, str(version.version), key)


def set_alias(undo: Undo, registered_model_name: str, alias: str, version: str) -> None:
    """Point an alias at a version. Taken back, it points to where it did before."""
    client = MlflowClient()
    before = client.get_registered_model(registered_model_name).aliases.get(alias)

    def restore() -> None:
        if before is not None:
            client.set_registered_model_alias(registered_model_name, alias, str(before))
        else:
            with contextlib.suppress(MlflowException):
                client.delete_registered_model_alias(registered_model_name, alias)

    undo.add(f"The alias {alias}", restore)
    client.set_registered_model_alias(registered_model_name, alias, version)


def _delete_if_empty(client: MlflowClient, registered_model_name: str) -> None:
    """Somebody else may have put a version into it meanwhile."""
    if exists(client, registered_model_name) and next(versions_of(client, registered_model_name), None) is None:
        client.delete_registered_model(registered_model_name)


def _delete_versions_of(client: MlflowClient, registered_model_name: str, model_id: str) -> None:
    if not exists(client, registered_model_name):
        return
    for version in list(versions_of(client, registered_model_name)):
        # A search over HTTP leaves the model_id out; the source is a URI that ends in it, or a path that holds it.
        if version.model_id == model_id or model_id in re.split(r"[/\\]", version.source or ""):
            client.delete_model_version(registered_model_name, str(version.version))
