"""The plugins that an engine needs: loaded where whoever loads the model named their libraries, and only then."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.convert.engine.builder import describe_plugins
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.types import EngineRecord, PluginLibrary
from mlflow_trt.errors import OptionError, RuntimeUnavailableError

_log = get_logger(__name__)


def check_plugins(engines: Iterable[EngineRecord], given: Sequence[str]) -> tuple[PluginLibrary, ...]:
    """The libraries that were given, which are those that the engines were built with, as far as one can tell.

    One of another content is warned of: it may be the same plugins, compiled again.

    Raises:
        RuntimeUnavailableError: a library that an engine was built with was not given.
        OptionError: one that was given cannot be read.
    """
    try:
        libraries = tuple(describe_plugins(given))
    except OSError as error:
        raise OptionError(f"plugins: {error.filename} cannot be read: {error.strerror}", option="plugins") from error
    digests = {library.sha256 for library in libraries}
    names = {library.name: library for library in libraries}
    for wanted in dict.fromkeys(plugin for engine in engines for plugin in engine.plugins):
        if wanted.sha256 in digests:
            continue
        if wanted.name not in names:
            raise RuntimeUnavailableError(
                f"the model's engine runs plugins of {wanted.name} (sha256 {wanted.sha256}), and nothing is loaded "
                "because a model says so. Name the library, if you trust it: model_config={'plugins': "
                f"['.../{wanted.name}']}}"
            )
        _log.warning(
            "The engine was built with another %s than the one that is loaded: sha256 %s, not %s",
            wanted.name,
            wanted.sha256,
            names[wanted.name].sha256,
        )
    return libraries


def load_plugins(tensorrt: trt.TensorRT, libraries: Sequence[str]) -> None:
    """Load libraries into this process. Raises RuntimeUnavailableError for one that cannot be loaded."""
    try:
        tensorrt.load_plugins(libraries)
    except trt.PluginError as error:
        raise RuntimeUnavailableError(str(error)) from error
