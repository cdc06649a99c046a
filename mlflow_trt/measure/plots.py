"""Pictures of a benchmark, for reports. Needs matplotlib, the extra `plots`."""

from __future__ import annotations

import collections
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mlflow_trt.core.figures import COLORS, MARKERS, new_figure, plain, saved
from mlflow_trt.measure.benchmark import COPIES, Benchmark, Measurement

_MOST_LAYERS = 25
_MOST_TICKS = 24
_WIDEST = 88
"""Characters that fit over a picture."""


def draw_benchmark(benchmark: Benchmark, title: str, folder: Path) -> list[Path]:
    """Write latency.png and throughput.png into `folder`, and return them; none without measurements."""
    series = _series(benchmark)
    if not series:
        return []
    title = "\n".join(textwrap.fill(line, _WIDEST) for line in (title, "; ".join(benchmark.runtimes)) if line)
    return [
        _draw(series, title, "Latency, ms", folder / "latency.png", lambda _, ms: ms),
        _draw(series, title, "Rows per second", folder / "throughput.png", lambda row, ms: row.batch / ms * 1e3),
    ]


def draw_layers(milliseconds: Mapping[str, float], title: str, folder: Path) -> list[Path]:
    """Write layers.png: the slowest layers, and the rest together."""
    if not milliseconds:
        return []
    ordered = sorted(milliseconds.items(), key=lambda item: -item[1])
    shown = ordered[:_MOST_LAYERS]
    rest = ordered[_MOST_LAYERS:]
    if rest:
        shown.append((f"{len(rest)} other layers", sum(time for _, time in rest)))
    total = sum(milliseconds.values())
    figure, axes = new_figure(10, 1.4 + 0.28 * len(shown))
    names = _shortened([name for name, _ in shown])
    positions = range(len(shown))
    colors = [COLORS[0]] * (len(shown) - bool(rest)) + ["#999999"] * bool(rest)
    bars = axes.barh(positions, [time for _, time in shown], color=colors, height=0.7)
    axes.bar_label(bars, [f"{time:.3g} ms, {time / total:.0%}" for _, time in shown], padding=3, fontsize=8)
    axes.set_yticks(positions, names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2, y=0.01)
    axes.set_xlabel("Mean time, ms")
    axes.set_title(f"{title}: {total:.3g} ms in {len(milliseconds)} layers", loc="left", fontsize=11)
    plain(axes, grid="x")
    return [saved(figure, folder / "layers.png")]


def _series(benchmark: Benchmark) -> dict[str, list[Measurement]]:
    series: dict[str, list[Measurement]] = {}
    for row in benchmark.measurements:
        if row.part != COPIES:
            series.setdefault(benchmark.label(row), []).append(row)
    return {label: sorted(rows, key=lambda row: row.batch) for label, rows in series.items()}


def _draw(
    series: Mapping[str, Sequence[Measurement]],
    title: str,
    what: str,
    file: Path,
    value: Callable[[Measurement, float], float],
) -> Path:
    """The median over the batch size, and around it what lies between the 10th and the 90th percentile."""
    figure, axes = new_figure(8, 4.8)
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    lines = []
    for number, rows in enumerate(series.values()):
        color, batches = COLORS[number % len(COLORS)], [row.batch for row in rows]
        medians = [value(row, row.latency.p50) for row in rows]
        low, high = ([value(row, ms) for row, ms in zip(rows, times, strict=True)] for times in _spread(rows))
        lines += axes.plot(batches, medians, color=color, marker=MARKERS[number % len(MARKERS)], markersize=5)
        axes.fill_between(batches, low, high, color=color, alpha=0.18, linewidth=0)
        below, above = (np.abs(np.subtract(medians, edge)) for edge in sorted((low, high)))
        axes.errorbar(batches, medians, [below, above], color=color, capsize=3, linewidth=0, elinewidth=1)
    batches = sorted({row.batch for rows in series.values() for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    shown = _apart(batches)
    axes.set_xticks(shown, [str(batch) for batch in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.10g}"))
    axes.set_xlabel("Batch size, rows (line: median, band: 10th to 90th percentile)")
    axes.set_ylabel(what)
    axes.set_title(title, loc="left", fontsize=10)
    labels = [textwrap.fill(label, _WIDEST) for label in series]
    figure.legend(labels=labels, handles=lines, frameon=False, fontsize=9,
                  loc="outside lower center", ncols=1 if max(map(len, labels)) > _WIDEST // 2 else 2)  # fmt: skip
    axes.margins(y=0.12)
    plain(axes, grid="both")
    return saved(figure, file)


def _spread(rows: Sequence[Measurement]) -> tuple[list[float], list[float]]:
    return [row.latency.p10 for row in rows], [row.latency.p90 for row in rows]


def _apart(batches: Sequence[int]) -> list[int]:
    """Those of the sizes whose labels do not touch on a logarithmic axis, the first and the last among them."""
    least = (math.log2(batches[-1]) - math.log2(batches[0])) / _MOST_TICKS
    shown = [batches[0]]
    for batch in batches[1:-1]:
        if min(math.log2(batch / shown[-1]), math.log2(batches[-1] / batch)) >= least:
            shown.append(batch)
    return shown + [batches[-1]] * (len(batches) > 1)


def _shortened(names: Sequence[str]) -> list[str]:
    """Names that fit beside a picture, and still differ; the page has them whole."""
    short = [name if len(name) <= 60 else f"{name[:34].strip()} ... {name[-21:].strip()}" for name in names]
    counts: collections.Counter[str] = collections.Counter()
    labels = []
    for name in short:
        counts[name] += 1
        labels.append(name if counts[name] == 1 else f"{name} ({counts[name]})")
    return labels
