"""The server as an ASGI application: which address means what, and an answer whatever happens."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import Callable, Sequence

from mlflow_trt.core.log import get_logger
from mlflow_trt.core.scoring_server import end_server
from mlflow_trt.deploy.serve import keys
from mlflow_trt.deploy.serve.access_log import AccessLog
from mlflow_trt.deploy.serve.calls import Calls
from mlflow_trt.deploy.serve.http import Exchange
from mlflow_trt.deploy.serve.limits import Deadline, Limits
from mlflow_trt.deploy.serve.metrics import Metrics
from mlflow_trt.deploy.serve.pages import EXTENSIONS, Pages
from mlflow_trt.deploy.serve.problems import Cause, DisconnectedError, HttpError, http_error_of
from mlflow_trt.deploy.serve.repository import ModelRepository
from mlflow_trt.deploy.serve.shared_memory import ADDRESS as SHARED_MEMORY
from mlflow_trt.deploy.serve.shared_memory import SharedMemory
from mlflow_trt.deploy.serve.uvicorn_config import Receive, Scope, Send

_OPEN = frozenset({"/ping", "/health", "/v2/health/live", "/v2/health/ready"})
"""What probes ask, who have no key."""
UNTRACED = _OPEN | {"/metrics"}
"""What is asked every few seconds, which would bury the traces of requests."""
_MODELS = "/v2/models/"
_ACTIONS = {"": "GET", "ready": "GET", "stats": "GET", "infer": "POST"}
_DISCARDING = 5.0
_log = get_logger(__name__)


class App:
    """Answers for the models of a repository.

    Args:
        repository: what is served.
        limits: what is refused.
        api_keys: who may ask; empty for everybody.
        regions: memory that clients share; None for none.
        access_log: where each request is written down; None for nowhere.
        gpu_memory: by GPU, its free and its total bytes.

    Attributes:
        draining: the server ends soon: it says that it is not ready, and each answer closes its connection.
        lost: why nothing can run any more; None while all is well.
    """

    def __init__(
        self,
        repository: ModelRepository,
        *,
        limits: Limits,
        api_keys: Sequence[bytes] = (),
        regions: SharedMemory | None = None,
        access_log: AccessLog | None = None,
        gpu_memory: Callable[[], dict[str, tuple[int, int]]] = dict,
    ) -> None:
        self.draining = False
        self.lost: str | None = None
        self._repository = repository
        self._calls = Calls(limits, regions, self.lose)
        self._keys = api_keys
        self._access_log = access_log
        self._refused: collections.Counter[Cause] = collections.Counter()
        metrics = Metrics(repository, self._calls.admission, self._refused, gpu_memory)
        self._regions = regions
        extensions = (*EXTENSIONS, *(["system_shared_memory"] if regions is not None else []))
        self._pages = Pages(repository, metrics, self._unready, extensions)
        self._addresses = {path for _, path in self._pages.by_address} | {"/invocations"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as ASGI has it."""
        exchange = Exchange(scope, receive, send, closes=self.draining)
        began = time.monotonic()
        cause = ""
        try:
            self._check_key(exchange)
            await self._dispatch(exchange, scope["method"], scope["path"])
        except DisconnectedError:
            cause = Cause.DISCONNECTED.value
        except Exception as error:  # noqa: BLE001  # whatever it is, there is an answer
            cause = await self._refuse(exchange, error)
        finally:
            if self._access_log is not None:
                self._access_log.write(exchange, began, cause)

    def close(self) -> None:
        """Free all that is served, after the calls that run."""
        self._calls.close()
        self._repository.close()

    def lose(self, reason: str) -> None:
        """End, since nothing can be answered any more."""
        if self.lost is None:
            self.lost = reason
            end_server(reason)

    async def _dispatch(self, exchange: Exchange, method: str, path: str) -> None:
        if method == "HEAD":
            method = "GET"
        if path == "/invocations" and method == "POST":
            await self._calls.invoke(exchange, self._repository.find(self._repository.default))
            return
        page = self._pages.by_address.get((method, path))
        if page is not None:
            await page(exchange)
        elif self._regions is not None and path.startswith(f"{SHARED_MEMORY}/"):
            await self._regions.handle(exchange, self._calls.admission, method, path)
        elif path.startswith(_MODELS):
            await self._dispatch_model(exchange, method, path)
        else:
            raise _no_such(is_address=path in self._addresses)

    async def _dispatch_model(self, exchange: Exchange, method: str, path: str) -> None:
        """`/v2/models/NAME[/versions/VERSION][/ready|/infer|/stats]`."""
        name, *rest = path[len(_MODELS) :].split("/")
        version = None
        if rest[:1] == ["versions"] and len(rest) > 1:
            version, rest = rest[1], rest[2:]
        action = "/".join(rest)
        if _ACTIONS.get(action) != method:
            raise _no_such(is_address=action in _ACTIONS)
        model = self._repository.find(name, version)
        if action == "infer":
            await self._calls.infer(exchange, model)
        elif action == "ready":
            await self._pages.model_ready(exchange, model)
        elif action == "stats":
            versions = [version] if version else self._repository.versions(name)
            await self._pages.statistics(exchange, [self._repository.find(name, one) for one in versions])
        else:
            await self._pages.model(exchange, model, version)

    def _check_key(self, exchange: Exchange) -> None:
        if self._keys and exchange.scope["path"] not in _OPEN and not keys.is_allowed(exchange.headers, self._keys):
            headers = ((b"www-authenticate", b"Bearer"),)
            raise HttpError(401, Cause.UNAUTHORIZED, "the API key is missing or wrong", headers=headers)

    async def _refuse(self, exchange: Exchange, error: Exception) -> str:
        """Answer with the error; returns its cause."""
        problem = http_error_of(error)
        unexpected = error.__cause__ or error
        if problem.status == 500 and unexpected is not problem:
            _log.error("A request failed", exc_info=unexpected)
        if not problem.is_counted:
            self._refused[problem.cause] += 1
        if exchange.status:  # the client takes the answer too slowly
            return problem.cause.value
        try:
            with Deadline(asyncio.get_running_loop(), _DISCARDING):
                await exchange.discard()
        except TimeoutError:
            exchange.closes = True
        except DisconnectedError:
            return Cause.DISCONNECTED.value
        with contextlib.suppress(DisconnectedError):
            await exchange.answer_error(problem)
        return problem.cause.value

    def _unready(self) -> HttpError | None:
        reason = self.lost or ("it is about to end" if self.draining else self._repository.broken())
        return HttpError(503, Cause.FAILED, f"the server is not ready: {reason}") if reason else None


def _no_such(*, is_address: bool) -> HttpError:
    if is_address:
        return HttpError(405, Cause.NOT_FOUND, "this address takes another method")
    return HttpError(404, Cause.NOT_FOUND, "there is nothing at this address; GET /v2 tells what this server is")
