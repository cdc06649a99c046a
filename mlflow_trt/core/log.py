"""Where this package's messages go."""

from __future__ import annotations

import logging


def get_logger(module: str) -> logging.Logger:
    """A logger below MLflow's own, so that what we tell the user appears where and how MLflow's messages do."""
    return logging.getLogger(f"mlflow.{module}")
