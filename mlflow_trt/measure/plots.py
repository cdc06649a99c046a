"""Pictures of a benchmark, for reports. Needs matplotlib, the extra `plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow_trt.core.figures import COLORS, MARKERS, new_figure, plain, saved
from mlflow_trt.measure.benchmark import COPIES, Benchmark, Measurement

_MOST_LAYERS = 25


def draw_benchmark(benchmark: Benchmark, title: str, folder: Path) -> list[Path]:
    """Write latency.png and throughput.png into `folder`, and return them; none without measurements."""
    series = _series(benchmark)
    if not series:
        return []
    title = "\n".join(filter(None, (title, "; ".join(benchmark.runtimes))))
    return [
        _draw(series, title, "Latency, ms (line: median, band: to the 99th percentile)", folder / "latency.png"),
        _draw(series, title, "Throughput, rows per second", folder / "throughput.png", throughput=True),
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
    figure, axes = new_figure(9, 1.4 + 0.28 * len(shown))
    names = [_shortened(name) for name, _ in shown]
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
    several = len({row.model for row in benchmark.measurements}) > 1
    series: dict[str, list[Measurement]] = {}
    for row in benchmark.measurements:
        label = f"{row.runtime}, {row.part}" + (f", {row.model}" if several else "")
        if row.part != COPIES:
            series.setdefault(label, []).append(row)
    return {label: sorted(rows, key=lambda row: row.batch) for label, rows in series.items()}


def _draw(
    series: Mapping[str, Sequence[Measurement]], title: str, what: str, file: Path, *, throughput: bool = False
) -> Path:
    figure, axes = new_figure(8, 4.8)
    from matplotlib.ticker import FuncFormatter, LogLocator

    for number, (label, rows) in enumerate(series.items()):
        color, batches = COLORS[number % len(COLORS)], [row.batch for row in rows]
        values = [row.throughput if throughput else row.latency.p50 for row in rows]
        axes.plot(batches, values, color=color, marker=MARKERS[number % len(MARKERS)], markersize=5, label=label)
        if not throughput:
            axes.fill_between(batches, values, [row.latency.p99 for row in rows], color=color, alpha=0.15, linewidth=0)
    batches = sorted({row.batch for rows in series.values() for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_xlabel("Batch size, rows")
    axes.set_ylabel(what.partition(" (")[0])
    axes.set_title(title, loc="left", fontsize=11)
    if " (" in what:
        axes.set_xlabel(f"Batch size, rows ({what.partition(' (')[2]}")
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    axes.margins(y=0.12)
    plain(axes, grid="both")
    return saved(figure, file)


def _shortened(name: str) -> str:
    return name if len(name) <= 44 else f"{name[:22].strip()} ... {name[-16:].strip()}"
