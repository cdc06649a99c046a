"""What all commands share."""

from __future__ import annotations

from typing import Any

import typer


class Command(typer.core.TyperCommand):
    """A command whose help says nothing of the type of a flag, which takes no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = " "
        return params
