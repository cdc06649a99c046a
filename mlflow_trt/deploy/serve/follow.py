"""Registry aliases that move: the version that one leads to now takes over from the one before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from mlflow_trt.core.background import begin_call
from mlflow_trt.core.log import get_logger
from mlflow_trt.deploy.serve.model_source import ModelSource, alias_version, at_version
from mlflow_trt.deploy.serve.repository import ModelRepository
from mlflow_trt.deploy.serve.served_model import ServedModel
from mlflow_trt.errors import OptionError

_T = TypeVar("_T")
_log = get_logger(__name__)


class AliasFollower:
    """Looks where aliases lead, every so many seconds, for as long as the server runs.

    A version is loaded and warmed up before it takes over; where that fails, the one before stays, and the next
    look tries again.

    Args:
        repository: whose models are exchanged.
        load: loads a version; in a thread of its own, for which nothing waits when the server ends.
        seconds: between two looks.
    """

    def __init__(self, repository: ModelRepository, load: Callable[[ModelSource], ServedModel], seconds: float) -> None:
        self._repository = repository
        self._load = load
        self._seconds = seconds

    async def follow(self) -> None:
        """Without end."""
        while True:
            await asyncio.sleep(self._seconds)
            for model in [model for model in self._repository if model.source.alias is not None]:
                try:
                    await self._look(model)
                except Exception as error:  # noqa: BLE001  # a registry that is away, a version that cannot be loaded
                    said = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
                    _log.warning("%s, version %s, stays: %s", model.name, model.version, said)

    async def _look(self, model: ServedModel) -> None:
        source = model.source
        version = await _await_call(lambda: alias_version(source.registered or "", source.alias or ""))
        if version == model.version:
            return
        if version in self._repository.versions(model.name):
            raise OptionError(
                f"alias {source.alias} leads to version {version}, which is served by itself already; serve the alias "
                f"under a name of its own: NAME=models:/{source.registered}@{source.alias}",
                option="models",
            )
        _log.info("%s: alias %s leads to version %s now; loading it", model.name, source.alias, version)
        new = await _await_call(lambda: self._load(at_version(source, version)), _close)
        self._repository.exchange(model, new)
        _log.info("Serving %s instead of version %s", new, model.version)


async def _await_call(call: Callable[[], _T], unwanted: Callable[[Future[_T]], object] | None = None) -> _T:
    """What the call returns. The server ends without it: MLflow asks a registry that is away for minutes, and a version
    may be built as long; `unwanted` is called with what comes then.
    """
    future = begin_call(call, "mlflow-trt-follow")
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        if unwanted is not None:
            future.add_done_callback(unwanted)
        raise


def _close(loaded: Future[ServedModel]) -> None:
    if loaded.exception() is None:
        loaded.result().close()
