"""The network of a whole model as it came: run it, and export it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow_trt.core.arrays import Feeds, Outputs
from mlflow_trt.core.whole_model import Answer, NetworkCall, NetworkKind
from mlflow_trt.registry.sources.exporting import TracedInput
from mlflow_trt.registry.sources.torch_export import export_module
from mlflow_trt.registry.sources.whole.capture import NetworkRun, Sizes, axes_of, outputs_of


def runner_of(network: Any, call: NetworkCall) -> Callable[[Feeds], Outputs]:
    """Runs the network of the source itself on arrays."""
    if call.kind is NetworkKind.ONNXRUNTIME:
        return lambda feeds: dict(zip(call.outputs, network.run(list(call.outputs), feeds), strict=True))
    import torch

    module = _called_like(network, call)

    def run(feeds: Feeds) -> Outputs:
        with torch.no_grad():
            values = module(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        return {name: value.numpy() for name, value in zip(call.outputs, values, strict=True)}

    return run


def export_network(
    network: Any, call: NetworkCall, runs: Sequence[NetworkRun], names: Mapping[Sizes, str], path: Path
) -> None:
    inputs = axes_of([run.feeds for run in runs])
    fullest = max(runs, key=lambda run: sum(array.size for array in run.feeds.values()))
    traced = [
        TracedInput(
            name=name,
            array=fullest.feeds[name],
            varying=tuple(number for number, axis in enumerate(inputs[name]) if len(set(axis)) > 1),
            axis_names={number: names[axis] for number, axis in enumerate(inputs[name]) if len(set(axis)) > 1},
        )
        for name in call.inputs
    ]
    export_module(_called_like(network, call), traced, path, output_names=call.outputs)


def _called_like(network: Any, call: NetworkCall) -> Any:
    """A module that takes the tensors of a call by name, and gives a tuple of the tensors of its answer."""
    torch: Any = importlib.import_module("torch")

    class Called(torch.nn.Module):  # type: ignore[misc]  # it has no types where torch is not installed
        def __init__(self) -> None:
            super().__init__()
            self.network = network

            def forward(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
                tensors = dict(zip(call.inputs, args, strict=False)) | kwargs
                given = {**tensors, **call.constants}
                output = network(given) if call.answer is Answer.FEATURES else network(**given)
                _, found = outputs_of(output)
                return tuple(found[key] for key in call.keys) if call.keys else tuple(found.values())

            by_name = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in call.inputs]
            forward.__signature__ = inspect.Signature(by_name)  # type: ignore[attr-defined]
            self.forward = forward

        def set_attn_implementation(self, name: str) -> None:
            for module in network.modules():
                if hasattr(module, "set_attn_implementation"):
                    module.set_attn_implementation(name)
                    return

    return Called()
