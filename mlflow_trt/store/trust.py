"""What has to hold of a model folder before anything of it is used, by the load settings."""

from __future__ import annotations

from pathlib import Path

from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.errors import IntegrityError
from mlflow_trt.store.folder import ModelFolder


def check_trust(folder: ModelFolder, settings: LoadSettings) -> None:
    """Raise IntegrityError for another record than the expected one, SignatureError for one that nobody vouches for."""
    expected = settings.expected_digest
    if expected is not None and folder.digest != expected:
        raise IntegrityError(
            f"{folder.path} is not the model that was expected: the sha256 of its record is {folder.digest}, and "
            f"expected_digest {expected}. It is not used.",
            path=folder.path,
        )
    if settings.signature is not None and settings.signed_by is not None:
        from mlflow_trt.store.signature import check_signature

        check_signature(folder.path, Path(settings.signature), settings.signed_by)
