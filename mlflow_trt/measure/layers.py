"""The layers of an engine: what TensorRT's engine inspector and profiler tell about them.

Source: the engine inspector's JSON, https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/advanced.html.
An engine tells names only, unless it was built with profiling_verbosity="detailed".
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.convert.engine.builder import read_network
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.progress_event import Progress
from mlflow_trt.core.types import Interface
from mlflow_trt.errors import ExecutionError, RuntimeUnavailableError
from mlflow_trt.flavor.fetch import open_folder
from mlflow_trt.measure.runnable import open_runnable
from mlflow_trt.runtime.tensorrt_session import TensorRTSession
from mlflow_trt.store.folder import ModelFolder

_log = get_logger(__name__)
_TENSOR_FORMAT = ("Format/Datatype", "Format", "Datatype")


@dataclass(frozen=True, kw_only=True)
class LayerTensor:
    """An input or output of a layer; `format` is TensorRT's words for its type and layout."""

    name: str
    format: str = ""
    shape: tuple[int, ...] = ()

    def __str__(self) -> str:
        return " ".join(filter(None, (self.name, "x".join(map(str, self.shape)), self.format)))


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of an engine, usually several nodes of the graph; `milliseconds` where it was timed."""

    name: str
    kind: str = ""
    tactic: str = ""
    inputs: tuple[LayerTensor, ...] = ()
    outputs: tuple[LayerTensor, ...] = ()
    milliseconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """All layers of an engine, and what runs it; `rows` is the batch that was timed, None where none was.

    Without a GPU they are those of the network that the engine is built of.
    """

    model: str
    description: str
    rows: int | None
    layers: tuple[Layer, ...]

    @property
    def milliseconds(self) -> dict[str, float]:
        return {layer.name: layer.milliseconds for layer in self.layers if layer.milliseconds is not None}

    def slowest_first(self) -> list[tuple[int, Layer]]:
        """The layers with their place in the engine, the slowest first; those without a time as they come, last."""
        return sorted(enumerate(self.layers), key=lambda place: -(place[1].milliseconds or 0.0))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_layers(
    model_uri: str,
    *,
    rows: int | None = None,
    runs: int = 20,
    data: Any = None,
    device: int = 0,
    progress: Progress | None = None,
) -> LayerReport:
    """Load an engine, ask the inspector about its layers, and time each over so many runs.

    Where the engine cannot run, the layers are those of the network that TensorRT parses, before it fuses them: their
    names, types and tensors, without times.

    Raises RuntimeUnavailableError for a model of another flavor, which has no engine, and ArtifactError for a plan that
    was imported, where it cannot run: its layers are not to be seen in it.
    """
    with open_runnable(model_uri, device=device, progress=progress) as runnable:
        session = runnable.session
        if isinstance(session, TensorRTSession):
            usual = _usual_rows(runnable) if rows is None else rows
            layers = parse(session.layer_information())
            times = session.time_layers(runnable.inputs(usual, runnable.given(data)), runs)
            return LayerReport(
                model=model_uri, description=session.description, rows=usual, layers=with_times(layers, times)
            )
        problem = runnable.problem
    if problem is None:
        raise RuntimeUnavailableError(f"{model_uri} is no model of this flavor, so it has no engine with layers")
    _log.warning("These are the layers before TensorRT fuses them: %s", problem)
    with open_folder(model_uri) as folder:
        return _network_report(model_uri, folder)


def _network_report(model_uri: str, folder: ModelFolder) -> LayerReport:
    record = folder.record
    distribution = record.engines[0].distribution
    layers = read_network(
        folder.checked_model(record.typed),
        record.recipe,
        interface=Interface(record.inputs, record.outputs),
        distribution=distribution,
    )
    return LayerReport(
        model=model_uri,
        description=f"the network that {trt.load(distribution)} parses",
        rows=None,
        layers=tuple(map(_layer, layers)),
    )


def parse(information: str) -> tuple[Layer, ...]:
    """Read the inspector's JSON, in which a layer is an object, or just its name. Raises ExecutionError for other."""
    try:
        content = json.loads(information)
        return tuple(_layer(entry) for entry in content["Layers"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExecutionError(f"TensorRT's engine inspector answers in a form that is not known: {error!r}") from error


def with_times(layers: Sequence[Layer], milliseconds: Mapping[str, float]) -> tuple[Layer, ...]:
    """The layers with the profiler's times; what it timed under names that the inspector does not know comes last."""
    known = [replace(layer, milliseconds=milliseconds.get(layer.name)) for layer in layers]
    names = {layer.name for layer in layers}
    others = [Layer(name=name, milliseconds=time) for name, time in milliseconds.items() if name not in names]
    return (*known, *others)


def page(report: LayerReport) -> str:
    """A standalone HTML page: no scripts, nothing loaded from elsewhere."""
    total = sum(report.milliseconds.values())
    slowest = max(report.milliseconds.values(), default=0.0)
    rows = "\n".join(_row(number, layer, total, slowest) for number, layer in report.slowest_first())
    timed = f", {total:.3f} ms for {report.rows} rows" if total and report.rows is not None else ""
    return _PAGE.format(
        title=html.escape(report.model),
        facts=html.escape(f"{report.description}: {len(report.layers)} layers{timed}"),
        rows=rows,
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff; }}
h1 {{ font-size: 1.3em; margin: 0; }} p {{ color: #555; margin: .3em 0 1.2em; }}
table {{ border-collapse: collapse; width: 100%; }}
th {{ text-align: left; border-bottom: 2px solid #ccc; position: sticky; top: 0; background: #fff; }}
th, td {{ padding: .3em .7em; vertical-align: top; }} tr:nth-child(even) td {{ background: #f6f7f9; }}
td.name {{ overflow-wrap: anywhere; min-width: 16em; }} td.tensors {{ font-size: .85em; color: #444; }}
td.time {{ white-space: nowrap; text-align: right; font-variant-numeric: tabular-nums; }}
td.bar {{ width: 10em; }} td.bar div {{ background: #0072b2; height: .8em; margin-top: .35em; }}
</style></head><body>
<h1>{title}</h1><p>{facts}</p>
<table><thead><tr><th>#</th><th>layer</th><th>type</th><th>inputs</th><th>outputs</th><th>ms</th><th></th></tr></thead>
<tbody>
{rows}
</tbody></table></body></html>
"""


def _row(number: int, layer: Layer, total: float, slowest: float) -> str:
    time, bar = "", ""
    if layer.milliseconds is not None and slowest:
        time = f"{layer.milliseconds:.4f}<br>{layer.milliseconds / total:.1%}"
        bar = f'<div style="width:{100 * layer.milliseconds / slowest:.1f}%"></div>'
    kind = "<br>".join(html.escape(text) for text in (layer.kind, layer.tactic) if text)
    inputs, outputs = ("<br>".join(html.escape(str(t)) for t in tensors) for tensors in (layer.inputs, layer.outputs))
    return (
        f'<tr><td>{number}</td><td class="name">{html.escape(layer.name)}</td><td>{kind}</td>'
        f'<td class="tensors">{inputs}</td><td class="tensors">{outputs}</td>'
        f'<td class="time">{time}</td><td class="bar">{bar}</td></tr>'
    )


def _layer(entry: Any) -> Layer:
    if isinstance(entry, str):
        return Layer(name=entry)
    return Layer(
        name=str(entry["Name"]),
        kind=str(entry.get("LayerType", "")),
        tactic=str(entry.get("TacticName", "")),
        inputs=tuple(map(_tensor, entry.get("Inputs", ()))),
        outputs=tuple(map(_tensor, entry.get("Outputs", ()))),
    )


def _tensor(entry: Mapping[str, Any]) -> LayerTensor:
    name = next((str(entry[key]) for key in _TENSOR_FORMAT if key in entry), "")
    shape = entry.get("Dimensions") or ()
    return LayerTensor(name=str(entry.get("Name", "")), format=name, shape=tuple(map(int, shape)))


def _usual_rows(runnable: Any) -> int:
    axis = runnable.batch_axis
    if axis is None or not runnable.profiles:
        return 1
    return int(runnable.profiles[0].ranges[axis.inputs[0]].opt[0])
