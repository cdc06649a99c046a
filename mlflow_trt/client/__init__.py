"""A client of `mlflow-trt serve`, of other servers of the Open Inference Protocol, and of MLflow's scoring server.

    from mlflow_trt.client import Client

    with Client("http://127.0.0.1:8080") as client:
        scores = client.predict({"x": array})["scores"]

Arrays go as they lie in memory where the server speaks the Open Inference Protocol. To MLflow's server they go as
parquet, which it reads many times faster than JSON, and what parquet cannot hold as JSON.
Needs the extra `client`, and neither a GPU nor TensorRT.
"""

from __future__ import annotations

try:
    import httpx as _httpx
except ImportError as error:
    from mlflow_trt.errors import MissingDependencyError

    raise MissingDependencyError(
        "httpx is not installed: `pip install 'mlflow-trt[client]'`", packages=("httpx",)
    ) from error

from mlflow_trt.client.clients import AsyncClient, Client

_USED = (_httpx,)  # by the modules below: a missing one is missed here

__all__ = ["AsyncClient", "Client"]
