"""Whether a model answers the same inputs with the same outputs, without which nothing can be compared."""

from __future__ import annotations

from mlflow_trt.convert.onnx.graph import label_of
from mlflow_trt.convert.onnx.model import OnnxModel, bodies_of
from mlflow_trt.convert.onnx.reference import reference_runner
from mlflow_trt.convert.samples import Samples
from mlflow_trt.errors import ExecutionError, InputError, RuntimeUnavailableError, UnsupportedModelError

_DRAWING = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


def check_repeatable(source: OnnxModel, samples: Samples) -> None:
    """Raise UnsupportedModelError where a model draws random numbers, and its outputs change with them.

    Two sessions of ONNX Runtime draw the same ones, so that a typed model would seem to agree with its source; TensorRT
    draws others. Noise that has no effect, such as one that is multiplied by 0, is none. What keeps ONNX Runtime from
    running the model is left to those who need to know.
    """
    nodes = [
        label_of(node)
        for body in bodies_of(source.proto)
        for node in body.node
        if node.op_type in _DRAWING and not node.domain
    ]
    if not nodes:
        return
    try:
        runner, names = reference_runner(source), [spec.name for spec in source.outputs]
        first, second = (runner.run(names, samples.feeds[0]) for _ in range(2))
    except (RuntimeUnavailableError, ExecutionError, InputError):
        return
    changing = [name for name in names if first[name].tobytes() != second[name].tobytes()]
    if changing:
        raise UnsupportedModelError(
            f"the model draws random numbers at {', '.join(nodes)}, and answers the same inputs differently each time "
            f"({', '.join(changing)}), so nothing can be compared, neither here nor by the self-test at load. Export "
            "the model with the noise as an input, or log it with verify=False",
            nodes=nodes,
        )
