"""What stands in the place of a network: called like it, and answered by a session."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlflow_trt.core.arrays import Array, Feeds
from mlflow_trt.core.whole_model import Answer, Lengths, NetworkCall
from mlflow_trt.errors import InputError, InputShapeError
from mlflow_trt.flavor.whole.lengths import longest_text, run_in_lengths
from mlflow_trt.runtime.session import Session


class Network:
    """A session, in few lengths where the model has texts. Texts that are longer than these raise InputShapeError."""

    def __init__(self, session: Session, call: NetworkCall, lengths: Lengths | None) -> None:
        self.session = session
        self.call = call
        self._lengths = lengths

    def run(self, feeds: Feeds) -> dict[str, Array]:
        if self._lengths is None:
            return self.session.run(feeds)
        longest, length = self._lengths.sizes[-1], longest_text(feeds[self._lengths.mask])
        if length > longest:
            raise InputShapeError(
                f"a text has {length} tokens, and the network takes up to {longest}; pass shorter texts, or let the "
                "model truncate them",
                tensor=self._lengths.mask,
            )
        start_cost = self._lengths.start_cost if self.session.runtime == "tensorrt" else 0
        return run_in_lengths(self.session.run, feeds, self._lengths, start_cost)


def named_arguments(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, without those that are None. Raises TypeError for a call that does not fit."""
    named: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}_{number}": one for number, one in enumerate(value)}
        else:
            named[name] = value
    (only, *more) = named.values() or (None,)
    if isinstance(only, Mapping) and not more:  # sentence_transformers passes its features on in one
        named = dict(only)
    return {name: value for name, value in named.items() if value is not None}


class EngineForward:
    """In the place of `forward` of a torch module. Tensors come back on the device that the first of them came from."""

    def __init__(self, network: Network, signature: inspect.Signature) -> None:
        self._network = network
        self.__signature__ = signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import torch

        call = self._network.call
        given = named_arguments(self.__signature__, args, kwargs)
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        check_call(call, set(tensors), {name: value for name, value in given.items() if name not in tensors})
        feeds = {name: tensors[name].detach().cpu().numpy() for name in call.inputs}
        device = tensors[call.inputs[0]].device
        outputs = self._network.run(feeds)
        values = [torch.from_numpy(np.asarray(outputs[name])).to(device) for name in call.outputs]
        if call.answer is Answer.FEATURES:
            return {**given, **dict(zip(call.keys, values, strict=True))}
        return answered(call, values)


def check_call(call: NetworkCall, tensors: set[str], others: Mapping[str, Any]) -> None:
    """Raise InputError for a call with other arguments than the ones that the network was converted for."""
    for name in sorted(set(call.inputs) - tensors):
        raise InputError(f"the network is called without {name!r}, and was converted with it", tensor=name)
    for name in sorted(tensors - set(call.inputs)):
        raise InputError(
            f"the network is called with the tensor {name!r}, and was converted without it; convert the model with an "
            "input example that uses it",
            tensor=name,
        )
    for name in sorted({*others, *call.constants}):
        given, expected = others.get(name), call.constants.get(name)
        if given != expected:
            raise InputError(f"the network is called with {name}={given!r}, and was converted with {expected!r}")


def answered(call: NetworkCall, values: list[Any]) -> Any:
    """The outputs in the form that the network gave them back in."""
    if call.answer is Answer.TENSOR:
        return values[0]
    if call.answer is Answer.TUPLE:
        return tuple(values)
    if call.answer is Answer.LIST:
        return values
    named = dict(zip(call.keys, values, strict=True))
    if call.answer is Answer.DICT:
        return named
    output = importlib.import_module("transformers.utils").ModelOutput()
    for name, value in named.items():
        output[name] = value
    return output


class Port(NamedTuple):
    """What ONNX Runtime says of an input or output."""

    name: str
    type: str
    shape: list[Any]


class EngineInferenceSession:
    """In the place of an onnxruntime.InferenceSession, for those that run it and ask for its inputs and outputs."""

    def __init__(self, network: Network, original: Any) -> None:
        self._network = network
        self._inputs = [Port(one.name, one.type, list(one.shape)) for one in original.get_inputs()]
        self._outputs = [Port(one.name, one.type, list(one.shape)) for one in original.get_outputs()]
        self._metadata = original.get_modelmeta()

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], run_options: Any = None) -> Any:
        del run_options  # for a run on ONNX Runtime
        wanted = list(output_names or [port.name for port in self._outputs])
        known = {port.name for port in self._outputs}
        for name in wanted:
            if name not in known:
                raise InputError(f"the network has no output {name!r}; there are {', '.join(sorted(known))}")
        outputs = self._network.run({name: np.asarray(value) for name, value in input_feed.items()})
        return [outputs[name] for name in wanted]

    def get_inputs(self) -> list[Port]:
        return self._inputs

    def get_outputs(self) -> list[Port]:
        return self._outputs

    def get_modelmeta(self) -> Any:
        return self._metadata

    def get_providers(self) -> list[str]:
        return [self._network.session.description]
