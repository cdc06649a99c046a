"""The models that a server has: by name and version, exchanged while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mlflow_trt.deploy.serve.problems import Cause, HttpError
from mlflow_trt.deploy.serve.served_model import ServedModel
from mlflow_trt.errors import OptionError


class ModelRepository:
    """Models by name, each with one version or several. Who names no version gets the one with the highest number.

    Only the event loop changes it, so a request sees the models before an exchange or those after it.
    """

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models: dict[str, dict[str, ServedModel]] = {}
        for model in models:
            versions = self._models.setdefault(model.name, {})
            if model.version in versions:
                raise OptionError(
                    f"{model.name}, version {model.version} is there twice; write OTHER_NAME=URI for one of them",
                    option="models",
                )
            versions[model.version] = model
        self.default = models[0].name if models else ""

    def __iter__(self) -> Iterator[ServedModel]:
        for versions in self._models.values():
            yield from versions.values()

    def find(self, name: str, version: str | None = None) -> ServedModel:
        """Raises HttpError, 404, where there is no such model."""
        versions = self._models.get(name)
        if versions is None:
            known = ", ".join(self._models)
            raise HttpError(404, Cause.NOT_FOUND, f"there is no model of that name; there are {known}")
        if version is None:
            return versions[max(versions, key=_number)]
        if version not in versions:
            known = ", ".join(versions)
            raise HttpError(404, Cause.NOT_FOUND, f"{name} has no such version; there are {known}")
        return versions[version]

    def versions(self, name: str) -> list[str]:
        return sorted(self._models[name], key=_number)

    def exchange(self, old: ServedModel, new: ServedModel) -> None:
        """From now on requests go to the new one; the old one is closed after those that it has."""
        versions = self._models[old.name]
        del versions[old.version]
        versions[new.version] = new
        old.retire()

    def index(self) -> list[dict[str, Any]]:
        """As Triton's model repository index tells it."""
        return [{"name": model.name, "version": model.version, "state": "READY", "reason": ""} for model in self]

    def broken(self) -> str | None:
        """Why a model cannot run any more; None where nothing speaks against it."""
        return next((reason for model in self if (reason := model.session.broken()) is not None), None)

    def close(self) -> None:
        """Free all models, after the calls that run."""
        for model in self:
            model.close()


def _number(version: str) -> tuple[int, str]:
    return (int(version) if version.isdigit() else -1, version)
