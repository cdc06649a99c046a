"""What an HTTP server answers when it does not answer: errors with the status that tells a client what to do."""

from __future__ import annotations

from enum import Enum

from mlflow.exceptions import MlflowException

from mlflow_trt.errors import InputError, InputTooLargeError, OutOfMemoryError


class Cause(str, Enum):
    """Why a request failed: the label of the metric that counts them."""

    BAD_REQUEST = "bad_request"
    UNAUTHORIZED = "unauthorized"
    NOT_FOUND = "not_found"
    TOO_LARGE = "too_large"
    BUSY = "busy"
    NO_MEMORY = "out_of_memory"
    DEADLINE = "deadline"
    DISCONNECTED = "disconnected"
    FAILED = "failed"


class HttpError(Exception):
    """A request that cannot be answered. `headers` go with the answer; with `closes`, so does the connection.

    Attributes:
        is_counted: it is among the failures of a model.
    """

    def __init__(
        self,
        status: int,
        cause: Cause,
        message: str,
        *,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        closes: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.cause = cause
        self.message = message
        self.headers = headers
        self.closes = closes
        self.is_counted = False


class DisconnectedError(Exception):
    """The client is gone: there is nobody to answer."""


def http_error_of(error: BaseException) -> HttpError:
    """What a client is told of an error. That of an unexpected one stays in the log."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, InputError):
        cause = Cause.TOO_LARGE if isinstance(error, InputTooLargeError) else Cause.BAD_REQUEST
        return HttpError(413 if cause is Cause.TOO_LARGE else 400, cause, error.message)
    if isinstance(error, OutOfMemoryError):
        return HttpError(429, Cause.NO_MEMORY, error.message)
    if isinstance(error, MemoryError):  # numpy's
        return HttpError(429, Cause.NO_MEMORY, "the host lacks memory for this; send fewer rows at once")
    if isinstance(error, MlflowException):
        status: int = error.get_http_status_code()
        return HttpError(status, Cause.BAD_REQUEST if status < 500 else Cause.FAILED, str(error.message))
    return HttpError(500, Cause.FAILED, "the server failed; its log says how")
