"""Models of flavor pytorch, by torch.onnx."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import onnx
from mlflow.models import Model

from mlflow_trt.convert.onnx.model import MODEL_FILE
from mlflow_trt.errors import OnnxModelError
from mlflow_trt.registry.sources.exporting import ROWS, Export, Needs, TracedInput, traced_inputs

NEEDS = Needs(extra="pytorch", modules={"torch": "torch", "onnxscript": "onnxscript"})
_LARGE = 2**30  # protobuf ends at 2 GB


def export(model: Model, folder: Path, target: Path) -> Export:
    """Export the module for inference. Its code runs here, as it does wherever MLflow loads such a model.

    Raises OnnxModelError where nothing tells its inputs, or torch cannot export it.
    """
    import mlflow.pytorch
    import torch

    inputs = traced_inputs(model, folder)
    path = target / MODEL_FILE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own insides
        module = mlflow.pytorch.load_model(str(folder), device="cpu")
        is_traced = isinstance(module, torch.fx.GraphModule)  # so that its fixed sizes are those of its example
        size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
        try:
            program = torch.onnx.export(
                module,
                tuple(torch.from_numpy(traced.array if is_traced else traced.grown) for traced in inputs),
                input_names=_names(module, inputs),
                dynamic_shapes=tuple(dict.fromkeys(traced.varying, torch.export.Dim.AUTO) for traced in inputs),
                dynamo=True,
                verbose=False,
            )
            cast(torch.onnx.ONNXProgram, program).save(str(path), external_data=size > _LARGE)
        except Exception as error:  # torch raises many
            raise OnnxModelError(f"torch.onnx cannot export the model: {str(error).strip() or repr(error)}") from error
    _tidy(path)
    return Export(path=path, modules=NEEDS.modules)


def _names(module: Any, inputs: Sequence[TracedInput]) -> list[str]:
    """The names of the signature, or else of the arguments of `forward`."""
    arguments = [name for name in inspect.signature(module.forward).parameters if name not in ("args", "kwargs")]
    if len(arguments) < len(inputs):
        arguments = ["input"] if len(inputs) == 1 else [f"input_{number}" for number in range(len(inputs))]
    return [traced.name or argument for traced, argument in zip(inputs, arguments, strict=False)]


def _tidy(path: Path) -> None:
    """Name axis 0, and remove what torch notes about the source code: it holds paths of this machine."""
    proto = onnx.load(path, load_external_data=False)
    names = {value.type.tensor_type.shape.dim[0].dim_param for value in proto.graph.input if _rank(value)} - {""}
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if len(names) == 1 and dim.dim_param in names:
                dim.dim_param = ROWS
        del value.metadata_props[:]
    for node in (*proto.graph.node, *(node for function in proto.functions for node in function.node)):
        del node.metadata_props[:]
    del proto.graph.metadata_props[:]
    onnx.save(proto, path)


def _rank(value: onnx.ValueInfoProto) -> int:
    return len(value.type.tensor_type.shape.dim)
