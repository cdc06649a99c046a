"""Which model is meant: its URI, and the name and version that it is served as."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from mlflow import MlflowClient

from mlflow_trt.errors import OptionError
from mlflow_trt.flavor.fetch import local_path

_NAME = re.compile(r"[^/\s%?#]+")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model to serve. `registered` and `alias` are those of the registry, where it is there."""

    uri: str
    name: str
    version: str
    registered: str | None = None
    alias: str | None = None


def resolve_source(text: str) -> ModelSource:
    """Read `models:/resnet50/3`, `models:/resnet50@champion`, a folder, or any of them after `NAME=`.

    An alias is followed once: the URI names the version that it leads to now.

    Raises OptionError where no name follows from it, and what the registry raises.
    """
    given, _, uri = text.rpartition("=") if re.match(r"[\w.-]+=", text) else ("", "", text)
    registered = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))", uri)
    if registered:
        name, version, alias = registered.groups()
        if alias:
            version = alias_version(name, alias)
        return ModelSource(
            uri=f"models:/{name}/{version}",
            name=_checked(given or name, text),
            version=version,
            registered=name,
            alias=alias,
        )
    if re.fullmatch(r"models:/[^/@]+/latest", uri, re.IGNORECASE):
        raise OptionError(f"{uri} is another version tomorrow; name the version, or an alias", option="models")
    local = local_path(uri)
    name = given or (local.resolve().name if local.is_dir() else uri.rstrip("/").rpartition("/")[2])
    return ModelSource(uri=uri, name=_checked(name, text), version="1")


def alias_version(name: str, alias: str) -> str:
    """The version that an alias leads to now."""
    return str(MlflowClient().get_model_version_by_alias(name, alias).version)


def at_version(source: ModelSource, version: str) -> ModelSource:
    """The same registered model in another version."""
    return replace(source, uri=f"models:/{source.registered}/{version}", version=version)


def _checked(name: str, text: str) -> str:
    if not _NAME.fullmatch(name) or name in {".", ".."} or not Path(name).name:
        raise OptionError(
            f"{text} tells no name that can stand in an address; write NAME={text.rpartition('=')[2]}", option="models"
        )
    return name
