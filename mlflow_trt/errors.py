"""The errors this package raises on purpose.

    MlflowTrtError (mlflow.exceptions.MlflowException)
    ├── OnnxModelError (ValueError)                   400  the source model cannot be read or is not supported
    ├── OptionError (ValueError)                      400  an argument, load setting or path makes no sense
    │   └── RecipeError                               400  ... of a recipe: a precision, shape, batch or builder option
    ├── BuildError (RuntimeError)                     500  TensorRT did not build an engine
    │   └── UnsupportedModelError                     400  ... because of nodes it cannot run, or would misread
    ├── ArtifactError (ValueError)                    500  a model folder is not one of ours
    │   ├── FormatError                               500  ... or was written by a newer version
    │   └── IntegrityError                            500  ... or a file in it is not the one that was logged
    │       └── SignatureError                        500  ... or not the one that was signed
    ├── RuntimeUnavailableError (RuntimeError)        500  no GPU, or a GPU that nothing here can drive
    │   └── MissingDependencyError (ImportError)      500  a package is not installed
    ├── EngineMismatchError (RuntimeError)            500  no stored engine fits this GPU and TensorRT
    ├── InputError (ValueError)                       400  an input that the model cannot take
    │   ├── InputDtypeError (TypeError)               400  ... because of its dtype
    │   ├── InputShapeError                           400  ... because of its rank or shape
    │   └── InputTooLargeError                        413  ... because a server takes no more at once
    ├── AccuracyError (ValueError)                    400  a converted model is too far from its source model
    ├── ExecutionError (RuntimeError)                 500  TensorRT, CUDA or ONNX Runtime failed
    │   ├── OutOfMemoryError (MemoryError)            429  the GPU, or the host, has no room for this
    │   └── SelfTestError                             500  an engine runs, and answers wrongly
    ├── SessionClosedError (RuntimeError)             500  a session was used after close()
    ├── NotPicklableError (RuntimeError)              500  a loaded model was to be pickled; also a pickle.PicklingError
    └── ServerError (RuntimeError)                    500  a server failed, as its client sees it
        └── ServerUnavailableError (ConnectionError)  503  ... or cannot be reached
            └── ServerTimeoutError (TimeoutError)     504  ... or takes too long

The number is the HTTP status that an MLflow scoring server answers with. Every text says what was wrong, with which
tensor, file or option, and what to do.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    DEADLINE_EXCEEDED,
    INTERNAL_ERROR,
    INVALID_PARAMETER_VALUE,
    RESOURCE_EXHAUSTED,
    TEMPORARILY_UNAVAILABLE,
)

if TYPE_CHECKING:
    from mlflow_trt.core.accuracy import Comparison


class MlflowTrtError(MlflowException):
    """Root of everything this package raises on purpose."""

    _error_code: ClassVar[int] = INTERNAL_ERROR

    def __init__(self, message: str) -> None:
        self._message: str | None = None
        super().__init__(message, error_code=self._error_code)

    @property
    def message(self) -> str:
        """What was wrong and what to do."""
        return self._message or ""

    @message.setter
    def message(self, text: str) -> None:
        # Set once. MLflow's scoring server puts the data of the request before it, for whoever reads its logs.
        if self._message is None:
            self._message = text


class OnnxModelError(MlflowTrtError, ValueError):
    """The ONNX model is unreadable, incomplete or uses types TensorRT does not have. `path` is its file, if any."""

    _error_code = INVALID_PARAMETER_VALUE

    def __init__(self, message: str, *, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class OptionError(MlflowTrtError, ValueError):
    """An argument, load setting, environment variable or path makes no sense. `option` names the one to change."""

    _error_code = INVALID_PARAMETER_VALUE

    def __init__(self, message: str, *, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


class RecipeError(OptionError):
    """What was asked of an engine contradicts itself or the model. `option` names the keyword to change."""


class BuildError(MlflowTrtError, RuntimeError):
    """TensorRT built no engine. `log` holds the last error lines of its log and of its libraries' own output."""

    def __init__(self, message: str, *, log: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.log: tuple[str, ...] = tuple(log)


class UnsupportedModelError(BuildError):
    """TensorRT, or what the model is handed to, cannot run it. `nodes` lists those to blame as `name (operator)`."""

    _error_code = INVALID_PARAMETER_VALUE

    def __init__(self, message: str, *, nodes: Sequence[str] = (), log: Sequence[str] = ()) -> None:
        super().__init__(message, log=log)
        self.nodes: tuple[str, ...] = tuple(nodes)


class ArtifactError(MlflowTrtError, ValueError):
    """A folder is not a model of this flavor, or lacks a file. `path` is the folder or file."""

    def __init__(self, message: str, *, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class FormatError(ArtifactError):
    """The record of a model folder is of a version that this mlflow-trt does not know."""


class IntegrityError(ArtifactError):
    """A file of a model folder differs from the one that was logged."""


class SignatureError(IntegrityError):
    """The signature of a model is missing, or is not that of this model by whoever should have signed it."""


class RuntimeUnavailableError(MlflowTrtError, RuntimeError):
    """The runtime that was asked for cannot run on this machine."""

    def with_advice(self, *, advice: str, wanted: str | None = None) -> RuntimeUnavailableError:
        """The same error for whoever wanted the runtime: what for, and what to do instead."""
        before = "" if wanted is None else f"{wanted}, and this machine cannot: "
        return self._with_message(f"{before}{self.message.rstrip('.')}. {advice}")

    def _with_message(self, message: str) -> RuntimeUnavailableError:
        return RuntimeUnavailableError(message)


class MissingDependencyError(RuntimeUnavailableError, ImportError):
    """An optional package is needed and not installed. `packages` lists the ones that would serve."""

    def __init__(self, message: str, *, packages: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.packages: tuple[str, ...] = tuple(packages)

    def _with_message(self, message: str) -> MissingDependencyError:
        return MissingDependencyError(message, packages=self.packages)


class EngineMismatchError(MlflowTrtError, RuntimeError):
    """No stored engine fits this machine. `reasons` says, for each stored engine, why not."""

    def __init__(self, message: str, *, reasons: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.reasons: tuple[str, ...] = tuple(reasons)


class InputError(MlflowTrtError, ValueError):
    """An input does not fit the model. `tensor` is its name, where one input is to blame."""

    _error_code = INVALID_PARAMETER_VALUE

    def __init__(self, message: str, *, tensor: str | None = None) -> None:
        super().__init__(message)
        self.tensor = tensor


class InputDtypeError(InputError, TypeError):
    """An input's values cannot be converted to the dtype the model wants without losing them."""


class InputShapeError(InputError):
    """An input's rank or shape is outside of what the model, or every optimization profile, accepts."""


class InputTooLargeError(InputError):
    """A request to a server has more bytes than it takes at once."""

    def get_http_status_code(self) -> int:
        """MLflow has no error code for this status."""
        return 413


class AccuracyError(MlflowTrtError, ValueError):
    """A converted model is off by more than is tolerated. `comparison` has the numbers."""

    _error_code = INVALID_PARAMETER_VALUE

    def __init__(self, message: str, *, comparison: Comparison | None = None) -> None:
        super().__init__(message)
        self.comparison = comparison


class ExecutionError(MlflowTrtError, RuntimeError):
    """The runtime failed while it loaded or ran a model that it should be able to run."""


class OutOfMemoryError(ExecutionError, MemoryError):
    """There is not enough memory for this call, on the GPU or on the host."""

    _error_code = RESOURCE_EXHAUSTED


class SelfTestError(ExecutionError):
    """An engine ran the golden sample of its model and its outputs are wrong. `comparison` has the numbers."""

    def __init__(self, message: str, *, comparison: Comparison | None = None) -> None:
        super().__init__(message)
        self.comparison = comparison


class SessionClosedError(MlflowTrtError, RuntimeError):
    """A session was used after `close()`."""

    def __init__(self, message: str = "this session is closed; load the model again") -> None:
        super().__init__(message)


class NotPicklableError(MlflowTrtError, RuntimeError, pickle.PicklingError):
    """A loaded model was to be pickled or copied, as multiprocessing does with what it sends to a process."""


class ServerError(MlflowTrtError, RuntimeError):
    """A scoring or tracking server failed. `status` is the HTTP status of its answer, or None without one."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ServerUnavailableError(ServerError, ConnectionError):
    """No server can be reached, or the connection broke off, and trying again did not help."""

    _error_code = TEMPORARILY_UNAVAILABLE


class ServerTimeoutError(ServerUnavailableError, TimeoutError):
    """A scoring server did not answer in time."""

    _error_code = DEADLINE_EXCEEDED
