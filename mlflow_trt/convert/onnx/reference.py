"""What a source model computes: on ONNX Runtime, on the CPU."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import ModelProto

from mlflow_trt.backends.onnxruntime_process import IsolatedModel
from mlflow_trt.convert.onnx.model import OnnxModel, bodies_of
from mlflow_trt.core.arrays import Feeds, Outputs

_KEPT_BYTES = 256 * 2**20
"""Outputs are kept for comparing as long as they take no more than this."""


def reference_runner(source: OnnxModel) -> IsolatedModel:
    """The source model on ONNX Runtime: where it brings Q/DQ, node by node, so that its numbers are those of ONNX.

    ONNX Runtime fuses such nodes into integer kernels, which saturate on CPUs that lack VNNI.
    """
    return IsolatedModel(source.path, optimize=not brings_quantization(source.proto))


def reference_outputs(source: OnnxModel, feeds: Iterable[Feeds]) -> tuple[Outputs, ...]:
    """What the source model computes on ONNX Runtime, for as many feeds as there is room for, and at least one."""
    runner, names = reference_runner(source), [spec.name for spec in source.outputs]
    outputs: list[Outputs] = []
    size = 0
    for one in feeds:
        outputs.append(runner.run(names, one))
        size += sum(array.nbytes for array in outputs[-1].values())
        if size > _KEPT_BYTES:
            break
    return tuple(outputs)


def brings_quantization(model: ModelProto) -> bool:
    """Whether a model has Q/DQ, from which ONNX Runtime's optimizer makes kernels with other numbers.

    Where one side of a comparison is optimized and the other is not, they differ by a per cent, and neither is wrong.
    """
    operators = ("QuantizeLinear", "DequantizeLinear")
    return any(node.op_type in operators for body in bodies_of(model) for node in body.node)
