"""How a job of the build process ends that did not end well."""

from __future__ import annotations

from typing import Any


class BuildFailure(Exception):  # noqa: N818  # not an error of this process but the report of one
    """Ends the job: `event` says why, in the form that `builder` reads."""

    def __init__(self, kind: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.event = {"event": "failed", "kind": kind, "message": message, **details}
