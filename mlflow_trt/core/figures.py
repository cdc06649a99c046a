"""What all pictures share: colors, axes, and files. Needs matplotlib, the extra `plots`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlflow_trt.core.optional import is_installed
from mlflow_trt.errors import MissingDependencyError

# Told apart by people who see colors differently, too (Okabe and Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")


def saved(figure: Any, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=160)
    return file


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes, without pyplot, whose state belongs to the user."""
    if not is_installed("matplotlib"):
        raise MissingDependencyError(
            "pictures need matplotlib: `pip install 'mlflow-trt[plots]'`", packages=("matplotlib",)
        )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def plain(axes: Any, grid: str) -> None:
    axes.grid(visible=True, axis=grid, color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
