"""The shapes that TensorRT's network gives the outputs of a model, against those of what ONNX Runtime computed.

A network that misreads a node builds as well as any other, and its engine answers wrongly. Where it shows in a shape,
it is found without running the engine, so also where there is no GPU. What the model itself declares is not looked at:
exporters write shapes there that are not true.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mlflow_trt.core.arrays import Feeds, Outputs
from mlflow_trt.core.types import BatchAxis, EngineRecord, Shape
from mlflow_trt.errors import UnsupportedModelError

_VARIES = -1
"""What TensorRT writes for a dimension that depends on the inputs, on their shapes or on their values."""


def check_output_shapes(
    engine: EngineRecord,
    network: Mapping[str, Shape],
    samples: Iterable[tuple[Feeds, Outputs]],
    batch_axis: BatchAxis | None,
) -> None:
    """Raise UnsupportedModelError for an output whose rank, or a dimension that does not vary, is another.

    Args:
        network: the shapes of TensorRT's network, by the names of its inputs and outputs.
        samples: inputs, and what ONNX Runtime computed for them. Those that the engine does not take prove nothing.
    """
    for feeds, outputs in samples:
        shapes = _as_run(feeds, outputs, network, batch_axis)
        if not all(_fits(shapes[name], network[name]) for name in feeds if name in network):
            continue
        for name in outputs:
            if name in network and not _fits(shapes[name], network[name]):
                raise UnsupportedModelError(
                    f"{engine} would answer wrongly: output {name!r} has the shape {_text(network[name])} in "
                    f"TensorRT's network, and {_text(shapes[name])} where ONNX Runtime computes it, so TensorRT reads "
                    "one of the nodes that it comes from in another way than ONNX means it. Export the model with "
                    "other operators there (TensorRT may count a window too many in a pooling with ceil_mode=1), try "
                    "another release of TensorRT, or log the model with mlflow.onnx, which runs it on ONNX Runtime"
                )


def _as_run(feeds: Feeds, outputs: Outputs, network: Mapping[str, Shape], axis: BatchAxis | None) -> dict[str, Shape]:
    """The shapes of a sample where an engine runs it: for a fixed batch, a session fills its rows up or cuts them."""
    shapes = {name: array.shape for name, array in (*feeds.items(), *outputs.items())}
    if axis is None or not axis.splits:
        return shapes
    first = axis.inputs[0]
    given, fixed = shapes[first][:1], network.get(first, (_VARIES,))[:1]
    if fixed != (_VARIES,):
        for name in (*axis.inputs, *outputs):
            if shapes[name][:1] == given:
                shapes[name] = (*fixed, *shapes[name][1:])
    return shapes


def _fits(shape: Shape, network: Shape) -> bool:
    return len(shape) == len(network) and all(
        size in (_VARIES, actual) for size, actual in zip(network, shape, strict=True)
    )


def _text(shape: Shape) -> str:
    return f"({', '.join('any' if size == _VARIES else str(size) for size in shape)})"
