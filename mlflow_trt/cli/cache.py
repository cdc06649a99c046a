"""mlflow-trt cache"""

from __future__ import annotations

from typing import Annotated

import typer

from mlflow_trt.cli.command import Command
from mlflow_trt.cli.options import results_on_stdout
from mlflow_trt.cli.render import print_cache, print_removed
from mlflow_trt.cli.tables import print_json

cache = typer.Typer(
    name="cache",
    help="What is kept on this machine: engines that were rebuilt for it, and compiled kernels.",
    no_args_is_help=True,
)


@cache.command("list", cls=Command)
def list_cache(as_json: Annotated[bool, typer.Option("--json", help="Print the entries as JSON.")] = False) -> None:
    """Show what lies in the user's cache (MLFLOW_TRT_CACHE_DIR), which was used last first."""
    from mlflow_trt.store.cache import root
    from mlflow_trt.store.cache_contents import limit, list_entries

    with results_on_stdout(as_json):
        folder = root()
        entries = list_entries(folder)
    if as_json:
        print_json({"folder": str(folder), "limit": limit(), "entries": [entry.to_dict() for entry in entries]})
    else:
        print_cache(folder, entries, limit())


@cache.command(cls=Command)
def prune(
    max_size: Annotated[
        str, typer.Option(help="Leave no more than this, like 2G. Default: MLFLOW_TRT_CACHE_SIZE, or 20G.")
    ] = "",
    unused_for: Annotated[float | None, typer.Option(help="Remove what was not used for so many days.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Remove everything, and that self-tests passed, too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was removed as JSON.")] = False,
) -> None:
    """Remove from the user's cache what was not used for longest. It is built again when it is needed."""
    from mlflow_trt.store.cache import prune_cache

    with results_on_stdout(as_json):
        removed = prune_cache(_size(max_size), unused_for=unused_for, everything=everything)
    if as_json:
        print_json({"removed": [entry.to_dict() for entry in removed]})
    else:
        print_removed(removed)


def _size(text: str) -> int | None:
    from mlflow_trt.store.cache_contents import parse_size

    try:
        return parse_size(text) if text else None
    except ValueError as error:
        raise typer.BadParameter(f"--max-size: {error}") from None
