"""Pictures of `benchmarks.runtime`, for the documentation. Needs matplotlib, the extra `plots`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlflow_trt.core.figures import COLORS, MARKERS, new_figure


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write ratios.svg, and alternatives.svg where they were measured, into `folder`."""
    import matplotlib as mpl

    folder.mkdir(parents=True, exist_ok=True)
    # Text as text, and nothing that changes from run to run: the files are kept with the documentation.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mlflow-trt", "font.size": 9}):
        drawn = [_ratios(result, folder / "ratios.svg")]
        if result["alternatives"]:
            drawn.append(_alternatives(result, folder / "alternatives.svg"))
    return drawn


def _ratios(result: dict[str, Any], path: Path) -> Path:
    """The share of what the GPU allows that is reached: 100 % is the limit, a mark is the goal set for that case."""
    rows = [row for row in result["rows"] if "memory" not in row["case"] and "through" not in row["case"]]
    rows = [row for row in rows if "no stored" not in row["case"] and "alone" not in row["note"]]
    figure, axes = new_figure(8, 0.8 + 0.26 * len(rows))
    reached = [row["ratio"] if row["higher_is_better"] else 1 / row["ratio"] for row in rows]
    names = [f"{row['model']}: {row['case']}" for row in rows]
    spread = [share * row["spread"] for share, row in zip(reached, rows, strict=True)]
    axes.barh(range(len(rows)), reached, color=COLORS[0], height=0.7, label="reached: median")
    if any(spread):
        axes.errorbar(reached, range(len(rows)), xerr=spread, color="#333333", capsize=2, linewidth=0, elinewidth=1,
                      label="spread: half of what lies between the extremes")  # fmt: skip
    goals = [row["goal"] and (row["goal"] if row["higher_is_better"] else 1 / row["goal"]) for row in rows]
    marks = [(number, goal) for number, goal in enumerate(goals) if goal]
    axes.vlines([goal for _, goal in marks], [number - 0.42 for number, _ in marks],
                [number + 0.42 for number, _ in marks], color=COLORS[1], linewidth=2,
                label="goal: what this project set out to reach")  # fmt: skip
    axes.axvline(1, color="#999999", linewidth=1, label="limit: what the GPU allows")
    # In a column of their own, where nothing crosses them.
    for number, share in enumerate(reached):
        axes.text(1.02, number, f"{share:.0%}", va="center", transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.15, 1.05 * max(reached)))
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set_title(f"Share of the limit\n{result['about']['runtime']}", loc="left", fontsize=10)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    return _saved(figure, axes, path)


def _alternatives(result: dict[str, Any], path: Path) -> Path:
    """Milliseconds of a call over its batch size, arrays in and arrays out."""
    figure, axes = new_figure(8, 4)
    for color, marker, row in zip(COLORS, MARKERS, result["alternatives"], strict=False):
        sizes = [int(size) for size in row["milliseconds"]]
        rates = [size / ms * 1e3 for size, ms in zip(sizes, row["milliseconds"].values(), strict=True)]
        axes.plot(sizes, rates, color=color, marker=marker, label=row["what"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Batch size")
    axes.set_ylabel("Images per second")
    axes.set_title(f"ResNet-50, arrays in and arrays out\n{result['about']['runtime']}", loc="left", fontsize=10)
    axes.legend(frameon=False)
    return _saved(figure, axes, path)


def _saved(figure: Any, axes: Any, path: Path) -> Path:
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    return path
