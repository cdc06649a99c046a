"""Whether MLflow's server is there, found out before the work, and without MLflow's minutes of retries; which it is."""

from __future__ import annotations

import re

import mlflow
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from mlflow_trt.errors import ServerUnavailableError

_SECONDS = 5
_GATEWAY_ERRORS = (502, 503, 504)


def check_server() -> None:
    """Raise ServerUnavailableError where the tracking server or the registry's does not answer within seconds.

    Stores that are no server, such as databases and folders, are not asked.
    """
    for uri in dict.fromkeys((mlflow.get_tracking_uri(), mlflow.get_registry_uri())):
        if uri.startswith(("http://", "https://")):
            _check(uri)


def check_server_of(model_uri: str) -> None:
    """`check_server`, for a URI that MLflow's server is needed for."""
    if model_uri.startswith(("models:", "runs:", "mlflow-artifacts:")):
        check_server()


def name_stores() -> str:
    """Where models are looked for, for who meant another store; without the password that its address may have."""
    stores = dict.fromkeys((mlflow.get_tracking_uri(), mlflow.get_registry_uri()))
    named = " and ".join(re.sub(r"(?<=//)[^/@]*@", "", uri) for uri in stores)
    return f"That was looked up in {named}; MLFLOW_TRACKING_URI names another one."


def _check(uri: str) -> None:
    advice = "Start it, or name another one with MLFLOW_TRACKING_URI (and MLFLOW_REGISTRY_URI, if that is set)."
    try:
        answer = http_request(
            get_default_host_creds(uri),
            "/health",
            "GET",
            max_retries=1,
            backoff_factor=0,
            backoff_jitter=0,
            retry_codes=(),
            timeout=min(_SECONDS, MLFLOW_HTTP_REQUEST_TIMEOUT.get()),
            raise_on_status=False,
        )
    except MlflowException as error:
        raise ServerUnavailableError(f"MLflow's server at {uri} cannot be reached. {advice} ({error})") from error
    # Any other answer is one: a server behind a login need not have this page.
    if answer.status_code in _GATEWAY_ERRORS:
        raise ServerUnavailableError(
            f"MLflow's server at {uri} answers {answer.status_code}: what stands before it does not reach it. {advice}",
            status=answer.status_code,
        )
