"""Prometheus's metrics, from what the models count anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from mlflow_trt.deploy.serve.limits import Admission
from mlflow_trt.deploy.serve.problems import Cause
from mlflow_trt.deploy.serve.repository import ModelRepository
from mlflow_trt.deploy.serve.statistics import Histogram, Statistics

CONTENT_TYPE = CONTENT_TYPE_LATEST.encode()
_MODEL = ("model", "version")
_SECONDS: dict[str, tuple[str, Callable[[Statistics], Histogram]]] = {
    "request": ("From the whole request to the beginning of its answer.", lambda of: of.total),
    "read": ("Reading the tensors of a request.", lambda of: of.reading),
    "queue": ("Waiting for a turn, and for others to run with.", lambda of: of.waiting),
    "inference": ("Running, with the copies to the GPU and back.", lambda of: of.inference),
    "write": ("Writing the tensors of an answer.", lambda of: of.writing),
}


class Metrics(Collector):
    """The text that Prometheus reads.

    Args:
        repository: whose models' statistics are told.
        admission: who is in.
        refused: requests that came to no model, by why.
        gpu_memory: by GPU, its free and its total bytes.
    """

    def __init__(
        self,
        repository: ModelRepository,
        admission: Admission,
        refused: Mapping[Cause, int],
        gpu_memory: Callable[[], dict[str, tuple[int, int]]],
    ) -> None:
        self._repository = repository
        self._admission = admission
        self._refused = refused
        self._gpu_memory = gpu_memory
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(self)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily(
            "mlflow_trt_model", "The models that are served, each 1.", labels=(*_MODEL, "alias", "runtime")
        )
        requests = CounterMetricFamily("mlflow_trt_requests", "Requests that were answered well.", labels=_MODEL)
        rows = CounterMetricFamily("mlflow_trt_rows", "Rows of these requests.", labels=_MODEL)
        failures = CounterMetricFamily("mlflow_trt_failures", "Requests that failed.", labels=(*_MODEL, "cause"))
        runs = CounterMetricFamily(
            "mlflow_trt_runs", "Runs of each batch size; 0: not cut into batches.", labels=(*_MODEL, "rows")
        )
        seconds = {
            name: HistogramMetricFamily(f"mlflow_trt_{name}_seconds", text, labels=_MODEL)
            for name, (text, _) in _SECONDS.items()
        }
        for model in list(self._repository):
            labels = (model.name, model.version)
            counted = model.statistics
            info.add_metric((*labels, model.source.alias or "", model.session.runtime), 1)
            requests.add_metric(labels, counted.total.count)
            rows.add_metric(labels, counted.rows)
            for cause, count in list(counted.failures.items()):
                failures.add_metric((*labels, cause.value), count)
            for size, count in model.session.runs.items():
                runs.add_metric((*labels, str(size)), count)
            for name, (_, histogram) in _SECONDS.items():
                seconds[name].add_metric(labels, histogram(counted).buckets(), histogram(counted).seconds)
        for cause, count in list(self._refused.items()):
            failures.add_metric(("", "", cause.value), count)
        yield from (info, requests, rows, failures, runs, *seconds.values())
        yield GaugeMetricFamily(
            "mlflow_trt_requests_in_flight", "Requests that are read, wait or run.", value=self._admission.requests
        )
        yield GaugeMetricFamily("mlflow_trt_bytes_in_flight", "Bytes of their bodies.", value=self._admission.bytes)
        memory = GaugeMetricFamily("mlflow_trt_gpu_memory_bytes", "Memory of the GPU.", labels=("gpu", "state"))
        for gpu, (free, total) in self._gpu_memory().items():
            memory.add_metric((gpu, "used"), total - free)
            memory.add_metric((gpu, "free"), free)
        yield memory
