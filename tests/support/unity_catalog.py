"""Unity Catalog, as far as MLflow's client knows it, put onto a SQLite store.

What MLflow's own store for it refuses before it asks the server is refused here by the same functions; what the server
refuses, as its documentation says: other filters than one name or run, and characters in the keys of tags.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.entities.model_registry.model_version_search import ModelVersionSearch
from mlflow.entities.model_registry.registered_model_search import RegisteredModelSearch
from mlflow.environment_variables import MLFLOW_REGISTRY_URI
from mlflow.exceptions import MlflowException
from mlflow.prompt.registry_utils import add_prompt_filter_string
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.store._unity_catalog.registry.rest_store import (
    UcModelRegistryStore,
    _raise_unsupported_method,
    _require_arg_unspecified,
)
from mlflow.store.entities.paged_list import PagedList
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking._model_registry.utils import _get_store_registry

SCHEME = "uc-sqlite"
_NO_PROMPTS = add_prompt_filter_string(None, False)
_NOT_IN_KEYS = re.compile(r"[.,\-=/:]")


class UnityCatalogStore(SqlAlchemyStore):
    """A store of models with names of three levels. `requests` counts what was asked of it."""

    def __init__(self, store_uri: str, tracking_uri: str | None = None) -> None:
        del tracking_uri  # the scheme's builder gets it
        super().__init__(store_uri.replace(SCHEME, "sqlite", 1))

    def create_registered_model(self, name: str, *arguments: Any, **keywords: Any) -> RegisteredModel:
        if len(name.split(".")) != 3:
            raise _refused(f"{name} does not specify all three levels: catalog.schema.model")
        return super().create_registered_model(name, *arguments, **keywords)

    def search_registered_models(
        self,
        filter_string: str | None = None,
        max_results: int = 100,
        order_by: Sequence[str] | None = None,
        page_token: str | None = None,
    ) -> PagedList[RegisteredModel]:
        if filter_string != _NO_PROMPTS:  # which MLflow's client says to every registry but Unity Catalog itself
            _require_arg_unspecified("filter_string", filter_string)
        _require_arg_unspecified("order_by", order_by)
        page = super().search_registered_models(max_results=max_results, page_token=page_token)
        names = ("name", "creation_timestamp", "last_updated_timestamp", "description")
        found = [RegisteredModelSearch(**{name: getattr(model, name) for name in names}) for model in page]
        return PagedList(found, page.token)

    def search_model_versions(
        self,
        filter_string: str | None = None,
        max_results: int = 100,
        order_by: Sequence[str] | None = None,
        page_token: str | None = None,
    ) -> PagedList[ModelVersion]:
        _require_arg_unspecified("order_by", order_by)
        if filter_string and not re.fullmatch(r"\s*(name|run_id)\s*=\s*'[^']*'\s*", filter_string):
            raise _refused(f"Unsupported filter query {filter_string!r}: expected one condition on name or run_id")
        # In no order that anybody could rely on.
        page = super().search_model_versions(
            filter_string, max_results=3, order_by=["creation_timestamp ASC"], page_token=page_token
        )
        names = ("name", "version", "creation_timestamp", "last_updated_timestamp", "description", "user_id", "source",
                 "run_id", "status", "status_message")  # fmt: skip
        found = [ModelVersionSearch(**{name: getattr(version, name) for name in names}) for version in page]
        return PagedList(found, page.token)

    def create_model_version(
        self,
        name: str,
        source: str,
        run_id: str | None = None,
        tags: Sequence[Any] | None = None,
        *arguments: Any,
        local_model_path: str | None = None,
        **keywords: Any,
    ) -> ModelVersion:
        for tag in tags or ():
            _check_key(tag.key)
        local = local_model_path or mlflow.artifacts.download_artifacts(source)
        UcModelRegistryStore._validate_model_signature(self, local)  # it uses nothing of the store
        return super().create_model_version(name, source, run_id, tags, *arguments, **keywords)

    def set_model_version_tag(self, name: str, version: str, tag: Any) -> None:
        _check_key(tag.key)
        super().set_model_version_tag(name, version, tag)

    def set_registered_model_tag(self, name: str, tag: Any) -> None:
        _check_key(tag.key)
        super().set_registered_model_tag(name, tag)

    def get_latest_versions(self, name: str, stages: Sequence[str] | None = None) -> Any:
        _raise_unsupported_method("get_latest_versions")

    def transition_model_version_stage(self, *arguments: Any, **keywords: Any) -> Any:
        _raise_unsupported_method("transition_model_version_stage")


def _check_key(key: str) -> None:
    if found := _NOT_IN_KEYS.search(key):
        raise _refused(f"Tag key {key} has the character {found[0]!r}, which is not allowed")


def _refused(message: str) -> MlflowException:
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


@contextmanager
def unity_catalog(folder: Path, empty_database: Path) -> Iterator[None]:
    """Models are registered there for the length of the block; everything else stays where it is."""
    shutil.copyfile(empty_database, folder / "registry.db")
    _get_store_registry().register(SCHEME, UnityCatalogStore)
    mlflow.set_registry_uri(f"{SCHEME}:///{folder / 'registry.db'}")
    try:
        yield
    finally:
        mlflow.set_registry_uri("")  # where everything else is kept, which MLflow also says to processes to come
        MLFLOW_REGISTRY_URI.unset()
