"""Ask MLflow's scoring server, in this process."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from mlflow.pyfunc import PyFuncModel, scoring_server


def scored(model: PyFuncModel, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]) -> Any:
    """The answer of /invocations to a body of JSON, which has to be one."""
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")  # which the server sets, and nobody takes back

    async def answered() -> httpx.Response:
        transport = httpx.ASGITransport(app=scoring_server.init(model))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            headers = {"Content-Type": scoring_server.CONTENT_TYPE_JSON}
            return await client.post("/invocations", content=json.dumps(body), headers=headers)

    response = asyncio.run(answered())
    assert response.status_code == 200, response.text
    return response.json()
