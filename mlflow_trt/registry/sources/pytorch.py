"""Models of flavor pytorch, by torch.onnx."""

from __future__ import annotations

import warnings
from pathlib import Path

from mlflow.models import Model

from mlflow_trt.convert.onnx.model import MODEL_FILE
from mlflow_trt.registry.sources.exporting import Export, Needs, traced_inputs
from mlflow_trt.registry.sources.torch_export import export_module

NEEDS = Needs(extra="pytorch", modules={"torch": "torch", "onnxscript": "onnxscript"})


def export(model: Model, folder: Path, target: Path) -> Export:
    """Export the module for inference. Its code runs here, as it does wherever MLflow loads such a model.

    Raises OnnxModelError where nothing tells its inputs, or torch cannot export it.
    """
    import mlflow.pytorch

    inputs = traced_inputs(model, folder)
    path = target / MODEL_FILE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and MLflow's, about their own insides
        module = mlflow.pytorch.load_model(str(folder), device="cpu")
    export_module(module, inputs, path)
    return Export(path=path, modules=NEEDS.modules)
