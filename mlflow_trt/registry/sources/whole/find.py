"""Find the network in a whole model, and what speaks against converting it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow import pyfunc
from mlflow.models import Model

from mlflow_trt.core.whole_model import NetworkKind
from mlflow_trt.errors import ArtifactError, OptionError, UnsupportedModelError
from mlflow_trt.flavor.whole.loading import PYTHON_MODELS, parent_of

TRANSFORMERS, SENTENCE_TRANSFORMERS, PYTHON = "transformers", "sentence_transformers", "python_model"

TASKS = (
    "text-classification", "sentiment-analysis", "token-classification", "ner", "zero-shot-classification", "fill-mask",
    "feature-extraction", "image-classification", "audio-classification",
)  # fmt: skip
"""Tasks of transformers' pipelines that run their network once for a batch, and so can be converted."""

_NETWORKS = {TRANSFORMERS: "pipeline.model", SENTENCE_TRANSFORMERS: "model"}


def whole_flavor(model: Model) -> str | None:
    """The flavor that a model is converted by as a whole; None for one that is not."""
    for flavor in (TRANSFORMERS, SENTENCE_TRANSFORMERS):
        if flavor in model.flavors:
            return flavor
    conf = model.flavors.get(pyfunc.FLAVOR_NAME, {})
    return PYTHON if conf.get(pyfunc.MAIN) in PYTHON_MODELS else None


def check_flavor_conf(model: Model, source: str) -> None:
    """Raise UnsupportedModelError for what cannot be converted by what its MLmodel says."""
    conf = model.flavors.get(TRANSFORMERS)
    if conf is None:
        return
    task = str(conf.get("task", ""))
    if task not in TASKS:
        raise UnsupportedModelError(
            f"{source} is a pipeline for {task}; expected one of {', '.join(TASKS)}. Pipelines that generate run their "
            "network once for each word, with a state in between: no engine of one network can take its place"
        )
    if "peft_adaptor" in conf:
        raise UnsupportedModelError(
            f"{source} has a PEFT adapter beside its base model; merge them (merge_and_unload) and log the model again"
        )
    if "source_model_revision" in conf or "base_model_path" in conf or "model_binary" not in conf:
        raise UnsupportedModelError(
            f"{source} was logged without its weights (save_pretrained=False or base_model_path); make it whole with "
            "mlflow.transformers.persist_pretrained_model, or log it again"
        )


def check_no_remote_code(folder: Path, source: str) -> None:
    """Raise OptionError where loading would run code that is in the model folder as Python files of its author."""
    for file in sorted(folder.rglob("*.json")):
        if file.name not in {"config.json", "tokenizer_config.json", "modules.json", "preprocessor_config.json",
                             "processor_config.json"}:  # fmt: skip
            continue
        code = next(iter(_code_named_in(file)), None)
        if code is not None:
            raise OptionError(
                f"{source} brings Python code of its own, which loading it runs: {file.relative_to(folder)} names "
                f"{code}. MLflow runs such code without asking. Read it, and convert with --trust-remote-code "
                "(trust_remote_code=True) if you trust it",
                option="trust_remote_code",
            )


def _code_named_in(file: Path) -> Iterator[str]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if file.name == "modules.json" and isinstance(content, list):
        for module in content:
            kind = str(module.get("type", "")) if isinstance(module, Mapping) else ""
            if not kind.startswith("sentence_transformers."):
                yield kind
    elif isinstance(content, Mapping) and content.get("auto_map"):
        yield str(content["auto_map"])


def find_network(impl: Any, flavor: str, asked: str | None) -> tuple[str, NetworkKind]:
    """The path of the network in what MLflow loaded, and its kind.

    `asked` is what the user says of a PythonModel: `self.encoder`, or `encoder`. Raises OptionError where that is no
    network, or where there are several and none was named; ArtifactError where there is none at all.
    """
    if flavor in _NETWORKS:
        if asked is not None:
            raise OptionError(
                f"network is {asked!r}; it is only for PythonModels, which may have several", option="network"
            )
        return _NETWORKS[flavor], NetworkKind.TORCH
    model = impl.python_model
    if asked is not None:
        path = f"python_model.{asked.removeprefix('self.')}"
        parent, name = parent_of(impl, path)
        kind = _kind_of(getattr(parent, name, None))
        if kind is None:
            raise OptionError(
                f"network is {asked!r}, a {type(getattr(parent, name, None)).__name__}; expected a torch.nn.Module or "
                f"an onnxruntime.InferenceSession. {_listing(model)}",
                option="network",
            )
        return path, kind
    found = networks_in(model)
    if len(found) > 1:
        names = ", ".join(f"self.{name}" for name in found)
        raise OptionError(
            f"the PythonModel {type(model).__name__} has several networks ({names}); say which one to convert: "
            f"--network self.{next(iter(found))}",
            option="network",
        )
    if not found:
        raise ArtifactError(
            f"the PythonModel {type(model).__name__} has no torch.nn.Module and no onnxruntime.InferenceSession among "
            "its attributes, so there is nothing to run on TensorRT. Keep one there (self.network), or name the path "
            "to it with --network self.pipeline.model"
        )
    ((name, kind),) = found.items()
    return f"python_model.{name}", kind


def networks_in(model: Any) -> dict[str, NetworkKind]:
    """The attributes of an object that are networks."""
    kinds = {name: _kind_of(value) for name, value in vars(model).items()}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def _listing(model: Any) -> str:
    found = networks_in(model)
    return f"There is {', '.join(f'self.{name}' for name in found)}." if found else "It has none among its attributes."


def _kind_of(value: Any) -> NetworkKind | None:
    # Who has an object of these has their modules loaded.
    torch, onnxruntime = sys.modules.get("torch"), sys.modules.get("onnxruntime")
    if torch is not None and isinstance(value, torch.nn.Module):
        return NetworkKind.TORCH
    if onnxruntime is not None and isinstance(value, onnxruntime.InferenceSession):
        return NetworkKind.ONNXRUNTIME
    return None
