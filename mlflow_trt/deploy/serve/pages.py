"""What a server tells of itself and its models."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from mlflow.version import VERSION as MLFLOW_VERSION

from mlflow_trt._version import __version__
from mlflow_trt.deploy.serve.http import Exchange
from mlflow_trt.deploy.serve.metrics import CONTENT_TYPE, Metrics
from mlflow_trt.deploy.serve.problems import HttpError
from mlflow_trt.deploy.serve.repository import ModelRepository
from mlflow_trt.deploy.serve.served_model import ServedModel

EXTENSIONS = ("binary_tensor_data", "statistics", "model_repository(index)")

Page = Callable[[Exchange], Awaitable[None]]


class Pages:
    """Answers by address.

    Args:
        repository: whose models are told of.
        metrics: what Prometheus reads.
        unready: why no request should come; None where they may.
        extensions: of the protocol, that this server has.
    """

    def __init__(
        self,
        repository: ModelRepository,
        metrics: Metrics,
        unready: Callable[[], HttpError | None],
        extensions: Iterable[str] = EXTENSIONS,
    ) -> None:
        self._repository = repository
        self._metrics = metrics
        self._unready = unready
        self._extensions = list(extensions)
        self.by_address: dict[tuple[str, str], Page] = {
            ("GET", "/v2"): self._server,
            ("GET", "/v2/health/live"): self._live,
            ("GET", "/v2/health/ready"): self._ready,
            ("GET", "/v2/models/stats"): self._all_statistics,
            ("POST", "/v2/repository/index"): self._index,
            ("GET", "/metrics"): self._tell_metrics,
            ("GET", "/ping"): self._ping,
            ("GET", "/health"): self._ping,
            ("GET", "/version"): self._mlflow_version,
        }

    async def model_ready(self, exchange: Exchange, model: ServedModel) -> None:
        """Whether requests for the model may come: 200, or an error."""
        self._check_ready()
        await exchange.answer_json({"name": model.name, "ready": True})

    async def model(self, exchange: Exchange, model: ServedModel, version: str | None) -> None:
        """What a model takes and gives."""
        versions = [version] if version else self._repository.versions(model.name)
        await exchange.answer_json(model.described(versions))

    async def statistics(self, exchange: Exchange, models: Iterable[ServedModel]) -> None:
        """What happened to the requests of models."""
        told = [model.statistics.told(model.name, model.version, model.session.runs) for model in models]
        await exchange.answer_json({"model_stats": told})

    async def _server(self, exchange: Exchange) -> None:
        await exchange.answer_json({"name": "mlflow-trt", "version": __version__, "extensions": self._extensions})

    async def _live(self, exchange: Exchange) -> None:
        await exchange.answer_json({"live": True})

    async def _ready(self, exchange: Exchange) -> None:
        self._check_ready()
        await exchange.answer_json({"ready": True})

    def _check_ready(self) -> None:
        problem = self._unready()
        if problem is not None:
            raise problem

    async def _all_statistics(self, exchange: Exchange) -> None:
        await self.statistics(exchange, self._repository)

    async def _index(self, exchange: Exchange) -> None:
        await exchange.answer_json(self._repository.index())

    async def _tell_metrics(self, exchange: Exchange) -> None:
        await exchange.answer(200, [self._metrics.text()], CONTENT_TYPE)

    async def _ping(self, exchange: Exchange) -> None:
        self._check_ready()
        await exchange.answer(200, [b"\n"])

    async def _mlflow_version(self, exchange: Exchange) -> None:
        await exchange.answer(200, [MLFLOW_VERSION.encode()])
