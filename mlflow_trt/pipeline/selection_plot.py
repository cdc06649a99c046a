"""The picture of a selection: error against latency, for reports. Needs matplotlib, the extra `plots`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlflow_trt.core.figures import COLORS, MARKERS, new_figure, plain, saved
from mlflow_trt.core.selection import Candidate, Fate, Selection

PICTURE_FILE = "candidates.png"
_EXACT = 1e-8
"""Where an error of 0 is drawn, which a logarithmic axis does not have."""


def draw_candidates(selection: Selection, title: str, folder: Path) -> Path:
    """Write candidates.png into `folder`: one point for each candidate that was measured, with its quartiles.

    Raises MissingDependencyError without matplotlib.
    """
    figure, axes = new_figure(8, 4.8)
    shown = [candidate for candidate in selection.candidates if candidate.milliseconds]
    for number, candidate in enumerate(shown):
        low, middle, high = np.percentile(candidate.milliseconds, (25, 50, 75))
        error = max(candidate.relative_error or 0.0, _EXACT)
        axes.errorbar(
            middle,
            error,
            xerr=[[middle - low], [high - middle]],
            marker="X" if candidate.fate is Fate.FAILED_GATE else MARKERS[number % len(MARKERS)],
            markersize=13 if candidate.fate is Fate.WON else 8,
            color=COLORS[number % len(COLORS)],
            capsize=3,
            linestyle="none",
            label=_label(candidate, float(middle)),
        )
    axes.set_yscale("log")
    axes.margins(y=0.25)
    axes.set_xlim(0, 1.25 * max((max(candidate.milliseconds) for candidate in shown), default=1.0))
    axes.set_xlabel("Latency of the engine alone, ms (median and quartiles of the rounds)")
    axes.set_ylabel("Relative error, against the source model")
    axes.set_title(f"{title}: {selection.winner} won\n{selection.measured_on}", loc="left", fontsize=11)
    missing = [
        f"{candidate.precision} {candidate.fate}" for candidate in selection.candidates if candidate not in shown
    ]
    if missing:
        axes.set_xlabel(f"{axes.get_xlabel()}\nNot measured: {', '.join(missing)}")
    if shown:
        legend = figure.legend(frameon=False, fontsize=9, loc="outside lower center", markerscale=0.7, ncols=3)
        for text, candidate in zip(legend.get_texts(), shown, strict=True):
            text.set_fontweight("bold" if candidate.fate is Fate.WON else "normal")
    plain(axes, grid="both")
    return saved(figure, folder / PICTURE_FILE)


def _label(candidate: Candidate, milliseconds: float) -> str:
    word = "" if candidate.fate is Fate.SLOWER else f", {candidate.fate}"
    return f"{candidate.precision}{word}: {milliseconds:.3g} ms"
