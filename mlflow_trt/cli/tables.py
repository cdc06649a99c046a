"""How the commands print: tables for people, which fit 80 columns, and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlflow_trt.core.printable import printable

_DIGEST = 12
"""Characters of a sha256 that tables show; the JSON has it whole."""


def print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


def print_line(text: str = "") -> None:
    """A line of text that may quote what is in a model."""
    typer.echo(printable(text))


def _text(value: object) -> Text:
    """Without markup, and without what steers a terminal: names in a model are from whoever made it."""
    return Text(printable(str(value)))


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """A table of two columns; facts without a value are left out."""
    table = Table(title=_text(title), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value not in (None, "", ()):
            table.add_row(name, _text(value))
    Console().print(table)


def print_rows(title: str, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    table = Table(title=_text(title), title_justify="left", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(_text(cell) for cell in row))
    Console().print(table)


def shorten_digest(digest: str) -> str:
    return digest[:_DIGEST]
