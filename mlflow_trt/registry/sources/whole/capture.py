"""See how a whole model calls its network: with which arrays, of which sizes, and what it gets back."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlflow_trt.core.arrays import Array, Feeds, Outputs
from mlflow_trt.core.whole_model import Answer, NetworkCall, NetworkKind
from mlflow_trt.errors import OnnxModelError
from mlflow_trt.flavor.whole.loading import parent_of
from mlflow_trt.flavor.whole.network import named_arguments
from mlflow_trt.registry.sources.exporting import ROWS

LENGTH = "length"
"""The name of the axis that texts vary along."""

Sizes = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class NetworkRun:
    """One call of the network: what went in and came out, by name."""

    feeds: Feeds
    outputs: Outputs


@dataclass
class Recording:
    """The calls of a network, which are all of one form."""

    kind: NetworkKind
    runs: list[NetworkRun] = field(default_factory=list)
    call: NetworkCall | None = None

    def add(self, call: NetworkCall, run: NetworkRun) -> None:
        if self.call is None:
            self.call = call
        elif self.call != call:
            raise OnnxModelError(
                f"the network is called in two ways, which one engine cannot serve: {_described(self.call)}, and "
                f"{_described(call)}"
            )
        self.runs.append(run)


def _described(call: NetworkCall) -> str:
    constants = "".join(f", {name}={value!r}" for name, value in call.constants.items())
    return f"({', '.join(call.inputs)}{constants}) for ({', '.join(call.outputs)})"


@contextlib.contextmanager
def recorded(impl: Any, path: str, kind: NetworkKind) -> Iterator[Recording]:
    """Record the calls of the network at `path` for the length of the block."""
    parent, name = parent_of(impl, path)
    network = getattr(parent, name)
    recording = Recording(kind)
    if kind is NetworkKind.ONNXRUNTIME:
        setattr(parent, name, _RecordingSession(network, recording))
        try:
            yield recording
        finally:
            setattr(parent, name, network)
        return
    network.forward = _RecordingForward(network.forward, recording)
    try:
        yield recording
    finally:
        del network.forward  # that of the class is seen again


class _RecordingForward:
    def __init__(self, forward: Callable[..., Any], recording: Recording) -> None:
        self._forward = forward
        self._recording = recording
        self.__signature__ = inspect.signature(forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import torch

        given = named_arguments(self.__signature__, args, kwargs)
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        feeds = {name: value.detach().cpu().numpy().copy() for name, value in tensors.items()}
        passes_features = len(args) == 1 and isinstance(args[0], Mapping)
        output = self._forward(*args, **kwargs)
        answer, found = outputs_of(output)
        if passes_features and answer in {Answer.DICT, Answer.MODEL_OUTPUT}:
            answer, found = Answer.FEATURES, {"sentence_embedding": found["sentence_embedding"]}
        outputs = {
            key if key not in feeds else f"output_{key}": value.detach().cpu().numpy() for key, value in found.items()
        }
        call = NetworkCall(
            kind=NetworkKind.TORCH,
            inputs=tuple(feeds),
            outputs=tuple(outputs),
            answer=answer,
            keys=tuple(found) if answer in {Answer.DICT, Answer.MODEL_OUTPUT, Answer.FEATURES} else (),
            constants=_constants({name: value for name, value in given.items() if name not in tensors}),
        )
        self._recording.add(call, NetworkRun(feeds=feeds, outputs=outputs))
        return output


class _RecordingSession:
    """An onnxruntime.InferenceSession that is seen through."""

    def __init__(self, session: Any, recording: Recording) -> None:
        self._session = session
        self._recording = recording

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], run_options: Any = None) -> Any:
        feeds = {name: np.asarray(value).copy() for name, value in input_feed.items()}
        every = [one.name for one in self._session.get_outputs()]
        outputs = dict(zip(every, self._session.run(every, feeds, run_options), strict=True))
        call = NetworkCall(kind=NetworkKind.ONNXRUNTIME, inputs=tuple(sorted(feeds)), outputs=tuple(every))
        self._recording.add(call, NetworkRun(feeds=feeds, outputs=outputs))
        return [outputs[name] for name in output_names or every]


def outputs_of(output: Any) -> tuple[Answer, dict[str, Any]]:
    """The tensors of an answer, and its form.

    Raises OnnxModelError for what is neither a tensor nor made of tensors. What transformers' outputs have beside them,
    such as a cache, is left out.
    """
    import torch

    if isinstance(output, torch.Tensor):
        return Answer.TENSOR, {"output": output}
    if isinstance(output, (tuple, list)) and output and all(isinstance(one, torch.Tensor) for one in output):
        form = Answer.TUPLE if isinstance(output, tuple) else Answer.LIST
        return form, {f"output_{number}": one for number, one in enumerate(output)}
    if isinstance(output, Mapping):
        found = {str(name): value for name, value in output.items() if isinstance(value, torch.Tensor)}
        if found:
            # transformers' own class is a mapping with attributes.
            return (Answer.MODEL_OUTPUT if hasattr(output, "to_tuple") else Answer.DICT), found
    raise OnnxModelError(
        f"the network answers with a {type(output).__name__}; expected a tensor, or a tuple, list or mapping of tensors"
    )


def _constants(others: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in others.items():
        if not isinstance(value, (bool, int, float, str)):
            raise OnnxModelError(
                f"the network is called with {name}, a {type(value).__name__}; an engine takes arrays, and beside them "
                "numbers and texts that are the same in every call"
            )
    return dict(others)


def axes_of(arrays: Sequence[Mapping[str, Array]]) -> dict[str, tuple[Sizes, ...]]:
    """For each array the sizes of each axis, one for every run. Raises OnnxModelError where the rank varies."""
    found = {}
    for name in arrays[0]:
        shapes = [one[name].shape for one in arrays]
        if len({len(shape) for shape in shapes}) > 1:
            raise OnnxModelError(f"{name!r} has another number of axes from call to call: {shapes[0]} and {shapes[-1]}")
        found[name] = tuple(zip(*shapes, strict=True))
    return found


def name_axes(runs: Sequence[NetworkRun]) -> dict[Sizes, str]:
    """A name for each axis that varies: those that vary together are one and the same."""
    names: dict[Sizes, str] = {}
    for axes in axes_of([run.feeds for run in runs]).values():
        for number, sizes in enumerate(axes):
            if len(set(sizes)) > 1 and sizes not in names:
                taken = set(names.values())
                first = ROWS if number == 0 else LENGTH if number == 1 else f"size_{number}"
                names[sizes] = first if first not in taken else f"size_{len(names)}"
    return names
