"""Where this package's messages go."""

from __future__ import annotations

import contextlib
import logging

from mlflow_trt.core.printable import printable


def get_logger(module: str) -> logging.Logger:
    """A logger below MLflow's own, so that what we tell the user appears where and how MLflow's messages do."""
    logger = logging.getLogger(f"mlflow.{module}")
    logger.addFilter(_make_printable)  # the same one again changes nothing
    return logger


def _make_printable(record: logging.LogRecord) -> bool:
    """What is quoted in messages, such as names in a model, does not steer the terminal."""
    with contextlib.suppress(TypeError, ValueError):  # arguments that do not fit, which logging itself reports
        record.msg, record.args = printable(record.getMessage()), None
    return True
