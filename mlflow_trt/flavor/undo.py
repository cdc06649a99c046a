"""Nothing half-registered: what was put into MLflow is taken out again where a later step fails or is interrupted."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.entities.model_registry.model_version_search import ModelVersionSearch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from mlflow_trt.core.background import begin_call
from mlflow_trt.core.log import get_logger

ANSWER_SECONDS = 5.0
"""How long the answer to a request that was on its way is awaited after an interruption, and that to each step back."""

TOTAL_SECONDS = 15.0
"""How long taking back may last in all."""

_SILENT_SECONDS = 0.5
_THREAD = "mlflow-trt-request"
_log = get_logger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Step:
    """`what` begins the sentence "... could not be taken back". `is_known`: what is taken back was surely done."""

    what: str
    take_back: Callable[[], object]
    is_known: Callable[[], bool]


class Undo:
    """Steps that take back what was done, in reverse order.

    What is done is a request to MLflow's server. It is made in a thread, so that whoever interrupts can be told to wait
    for the answer, and what the answer names is known. Where none comes, what the request may have made is looked for.

    Attributes:
        token: 12 hex digits; what is made is tagged with it, to be found again.
    """

    def __init__(self) -> None:
        self.token = uuid.uuid4().hex[:12]
        self._steps: list[_Step] = []

    def make(
        self,
        what: str,
        request: Callable[[], str],
        *,
        take_back: Callable[[str], object],
        look: Callable[[], Iterable[str]],
    ) -> str:
        """Make a request that creates something, and return its name.

        `look` finds the names of all that such a request may have made: MLflow's client repeats one whose answer was
        lost, and then two are made, of which one is taken back at once.
        """
        made: list[str] = []

        def back() -> None:
            for name in made or look():
                _unless_gone(take_back, name)

        self._steps.append(_Step(what, back, is_known=lambda: bool(made)))
        _awaited(what, lambda: made.append(request()))
        for name in look():
            if name != made[0]:
                _unless_gone(take_back, name)
        return made[0]

    def change(self, what: str, request: Callable[[], object], *, restore: Callable[[], object]) -> None:
        """Make a request that changes something. `restore` does nothing where nothing was changed."""
        done: list[object] = []
        self._steps.append(_Step(what, lambda: _unless_gone(restore), is_known=lambda: bool(done)))
        _awaited(what, lambda: done.append(request()))

    def run(self) -> None:
        """Take everything back that can be within the time for it, and say what cannot."""
        end = time.monotonic() + TOTAL_SECONDS
        left, failed = [], False
        try:
            while self._steps:
                step = self._steps.pop()
                left = [step, *reversed(self._steps)]
                failed |= not _taken_back(step, min(ANSWER_SECONDS, end - time.monotonic()))
                left = left[1:]
        except BaseException:
            _log.warning("Interrupted again. Not taken back: %s", ", ".join(step.what for step in left))
            raise
        if failed:
            _log.warning("`mlflow-trt registry check models:/NAME` lists what was left behind")


@contextmanager
def undo_on_failure() -> Iterator[Undo]:
    """Take back what was done by the `Undo` where the block ends in an exception, KeyboardInterrupt included."""
    undo = Undo()
    try:
        yield undo
    except BaseException:
        undo.run()
        raise


def _taken_back(step: _Step, seconds: float) -> bool:
    error: object = f"the {TOTAL_SECONDS:.0f} s for all of it are over"
    if seconds > 0:
        future = begin_call(step.take_back, _THREAD)
        if _has_ended(future, f"to take back: {step.what}", seconds):
            error = future.exception()
        else:
            error = f"the server did not answer within {seconds:.0f} s"
    if error is None:
        return True
    if step.is_known():
        _log.warning("%s could not be taken back: %s", step.what, error)
    else:
        _log.warning("%s may have been made, which could not be found out: %s", step.what, error)
    return False


def _awaited(what: str, request: Callable[[], _T]) -> _T:
    """The answer to a request. Interrupted, wait for it all the same, for a while, and then go on being interrupted."""
    future = begin_call(request, _THREAD)
    try:
        return future.result()
    except BaseException:
        if not future.done():
            _has_ended(future, f"to the request for: {what}", ANSWER_SECONDS)
        raise


def _has_ended(future: Future[Any], what: str, seconds: float) -> bool:
    if not wait([future], min(_SILENT_SECONDS, seconds)).done and seconds > _SILENT_SECONDS:
        _log.warning("Waiting for the server's answer, at most %.0f s, %s", seconds, what)
        wait([future], seconds - _SILENT_SECONDS)
    return future.done()


def _unless_gone(call: Callable[..., object], *arguments: object) -> None:
    """Taking back what somebody else removed meanwhile is no failure."""
    try:
        call(*arguments)
    except MlflowException as error:
        if not is_missing(error):
            raise


def is_missing(error: MlflowException) -> bool:
    """Whether MLflow says that something does not exist."""
    return bool(error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST))


def exists(client: MlflowClient, registered_model_name: str) -> bool:
    try:
        client.get_registered_model(registered_model_name)
    except MlflowException as error:
        if is_missing(error):
            return False
        raise
    return True


def versions_of(client: MlflowClient, registered_model_name: str) -> Iterator[ModelVersion]:
    """Every version of a registered model with its tags, the newest first.

    They are listed by name alone and sorted here: Unity Catalog takes no order and no other condition, and its listing
    leaves the tags out.
    """
    quote = '"' if "'" in registered_model_name else "'"
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = {quote}{registered_model_name}{quote}", page_token=token)
        found += page
        token = page.token
        if not token:
            break
    for version in sorted(found, key=lambda version: int(version.version), reverse=True):
        is_partial = isinstance(version, ModelVersionSearch)
        yield client.get_model_version(version.name, str(version.version)) if is_partial else version
