"""Convert every registered model that a filter finds; one that fails does not stop the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mlflow import MlflowClient
from mlflow.entities.model_registry import RegisteredModel
from mlflow.entities.model_registry.registered_model_search import RegisteredModelSearch
from mlflow.exceptions import MlflowException
from mlflow.utils.search_utils import SearchModelUtils

from mlflow_trt.core.log import get_logger
from mlflow_trt.errors import OptionError
from mlflow_trt.flavor.mlmodel import check_names
from mlflow_trt.flavor.recognize import own_tags
from mlflow_trt.flavor.tracking import check_server
from mlflow_trt.flavor.undo import exists, versions_of
from mlflow_trt.pipeline.make import PreparedConversion, prepare_conversion
from mlflow_trt.pipeline.options import ConversionOptions
from mlflow_trt.registry.convert_version import convert_to_version
from mlflow_trt.registry.plan import plan_conversion

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What happened to one registered model.

    `status` is `converted`, `exists` (it was converted by this recipe before), `planned` (a dry run), `skipped` or
    `failed`; `detail` is the URI of the result, or the reason.
    """

    source: str
    status: str
    detail: str
    seconds: float = 0.0


def convert_all(
    filter_string: str,
    options: ConversionOptions,
    *,
    name_pattern: str = "{name}-trt",
    alias: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Convert the newest version of every registered model that MLflow's filter finds.

    Args:
        filter_string: as for `MlflowClient.search_registered_models`, such as `tags.deploy = 'gpu'`.
        name_pattern: the name to register each result under; `{name}` stands for the source's.
        alias, force: as for `convert_model_version`.
        dry_run: convert nothing, and find out what would be done.
        on_outcome: called after each model.

    Raises OptionError where the pattern gives several models one name; what MLflow raises for a filter that it does
    not understand and an alias that it does not allow; what `prepare_conversion` raises. What goes wrong with one model
    becomes its outcome.
    """
    if "{name}" not in name_pattern:
        raise OptionError(
            f"{name_pattern!r} would be the name of every result; write {{name}} where the source's name goes, "
            "like '{name}-trt'",
            option="register_as",
        )
    check_names(None, alias=alias)
    check_server()
    prepared = prepare_conversion(options)
    outcomes = []
    for model in _matching(filter_string):
        started = time.monotonic()
        target = name_pattern.replace("{name}", model.name)
        outcome = _convert_newest(model, target, prepared, alias=alias, force=force, dry_run=dry_run)
        outcome = replace(outcome, seconds=round(time.monotonic() - started, 1))
        outcomes.append(outcome)
        if on_outcome is not None:
            on_outcome(outcome)
    return outcomes


def _convert_newest(
    model: RegisteredModel, target: str, prepared: PreparedConversion, *, alias: str | None, force: bool, dry_run: bool
) -> Outcome:
    source = f"models:/{model.name}"
    try:
        newest = next(versions_of(MlflowClient(), model.name), None)
        if newest is None:
            return Outcome(source=source, status="skipped", detail="it has no versions")
        source = f"models:/{model.name}/{newest.version}"
        if own_tags(MlflowClient(), newest) is not None:
            return Outcome(source=source, status="skipped", detail="it was made by mlflow-trt")
        if dry_run:
            plan = plan_conversion(source, prepared, registered_model_name=target, force=force)
            detail = plan.existing or plan.destination
            return Outcome(source=source, status="exists" if plan.existing else "planned", detail=detail)
        before = set(_versions(target))
        version = convert_to_version(source, target, prepared, alias=alias, force=force)
    except MlflowException as error:
        return Outcome(source=source, status="failed", detail=error.message)
    except Exception as error:  # noqa: BLE001
        # The others are still to be converted; this one is reported with the traceback that a bug deserves.
        _log.exception("%s could not be converted", source)
        return Outcome(source=source, status="failed", detail=f"{type(error).__name__}: {error}")
    uri = f"models:/{version.name}/{version.version}"
    status = "exists" if str(version.version) in before else "converted"
    return Outcome(source=source, status=status, detail=uri)


def _versions(registered_model_name: str) -> Iterator[str]:
    client = MlflowClient()
    if exists(client, registered_model_name):
        yield from (str(version.version) for version in versions_of(client, registered_model_name))


def _matching(filter_string: str) -> list[RegisteredModel]:
    """The registered models that a filter finds; found here where the registry takes no filter, like Unity Catalog."""
    client = MlflowClient()
    try:
        return _pages(client, filter_string)
    except MlflowException:
        SearchModelUtils.parse_search_filter(filter_string)  # or it is the filter that is wrong
        listed = _pages(client, None)
    whole = [client.get_registered_model(m.name) if isinstance(m, RegisteredModelSearch) else m for m in listed]
    matching: list[RegisteredModel] = SearchModelUtils.filter(whole, filter_string)
    return matching


def _pages(client: MlflowClient, filter_string: str | None) -> list[RegisteredModel]:
    found: list[RegisteredModel] = []
    token = None
    while True:
        page = client.search_registered_models(filter_string or None, page_token=token)
        found += page
        token = page.token
        if not token:
            return found
