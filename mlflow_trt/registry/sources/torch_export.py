"""Export a torch module to ONNX, with one name for the rows of all inputs and only axes that do vary."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import onnx

from mlflow_trt.core.log import get_logger
from mlflow_trt.errors import OnnxModelError
from mlflow_trt.registry.sources.exporting import ROWS, TracedInput, check_exported_inputs

_LARGE = 2**30  # protobuf ends at 2 GB
_SIZES = (16, 64, 224)
"""Sizes to trace with where nothing says any: a sentence, a small image, a usual one."""

_log = get_logger(__name__)


def export_module(
    module: Any, inputs: Sequence[TracedInput], path: Path, *, output_names: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Write `module` as ONNX to `path`, traced for inference with `inputs`; returns the names of the exported inputs.

    1. Inputs named like arguments of `forward` are passed by name, others by position.
    2. Axes that are named in `inputs` are one and the same wherever the name appears: axis 0 of all inputs is `rows`.
       Where the module's own code fixes or tells apart some of them, each axis is left to torch.
    3. An axis that was asked to vary does, or is an error; but for rows: the module may fix these, which is said.

    Raises OnnxModelError where torch cannot export the module, or fixes an axis that was asked to vary.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own insides
        is_traced = isinstance(module, torch.fx.GraphModule)  # so that its fixed sizes are those of its example
        if not is_traced:
            module.eval()
            if hasattr(module, "set_attn_implementation"):
                # The others look for rows without any token by IsNaN, which keeps TensorRT from fusing attention.
                module.set_attn_implementation("eager")
        call = _Call.of(module, inputs, by_name=not is_traced)
        size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
        try:
            usable = _with_sizes(torch, module, call, inputs)
            program = cast(
                torch.onnx.ONNXProgram, _exported(torch, module, call, usable, output_names, is_traced=is_traced)
            )
            program.save(str(path), external_data=size > _LARGE)
        except OnnxModelError:
            raise
        except Exception as error:  # torch raises many
            raise OnnxModelError(f"torch.onnx cannot export the model: {_first_lines(error)}") from error
    _tidy(path, call.names, inputs, _fixed_symbols(program.exported_program))
    return call.names


class _Call(NamedTuple):
    """How the module is called: the names of its inputs, and whether they are passed by these."""

    names: tuple[str, ...]
    by_name: bool

    @classmethod
    def of(cls, module: Any, inputs: Sequence[TracedInput], *, by_name: bool) -> _Call:
        """The names of the signature, or else of the arguments of `forward`."""
        parameters = inspect.signature(module.forward).parameters.values()
        positional = [
            parameter.name
            for parameter in parameters
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        given = [traced.name for traced in inputs if traced.name is not None]
        if by_name and len(given) == len(inputs) and set(given) <= {parameter.name for parameter in parameters}:
            return cls(tuple(given), True)
        if len(positional) < len(inputs):
            positional = ["input"] if len(inputs) == 1 else [f"input_{number}" for number in range(len(inputs))]
        names = (traced.name or argument for traced, argument in zip(inputs, positional, strict=False))
        return cls(tuple(names), False)

    def pass_on(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The values as positional and keyword arguments."""
        return ((), dict(zip(self.names, values, strict=True))) if self.by_name else (tuple(values), {})


def _with_sizes(torch: Any, module: Any, call: _Call, inputs: Sequence[TracedInput]) -> Sequence[TracedInput]:
    """The inputs; where they have axes whose size nothing says, with the first size that the module runs with."""
    if not any(traced.unknown for traced in inputs):
        return inputs
    failure: Exception | None = None
    for size in _SIZES:
        sized = [traced.with_size(size) for traced in inputs]
        args, kwargs = call.pass_on([torch.from_numpy(traced.array) for traced in sized])
        try:
            with torch.no_grad():
                module(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  # whatever it is, another size may do
            failure = error
        else:
            return sized
    raise OnnxModelError(
        f"the signature leaves sizes open, and the model runs with none of {', '.join(map(str, _SIZES))} "
        f"({_first_lines(failure)}); log it again with an input_example="
    )


def _exported(
    torch: Any,
    module: Any,
    call: _Call,
    inputs: Sequence[TracedInput],
    output_names: Sequence[str] | None,
    *,
    is_traced: bool,
) -> Any:
    auto = torch.export.Dim.AUTO

    def export(arrays: Sequence[Any], shapes: Sequence[Mapping[int, Any]]) -> Any:
        args, kwargs = call.pass_on([torch.from_numpy(array) for array in arrays])
        return torch.onnx.export(
            module,
            args,
            kwargs=kwargs or None,
            input_names=None if call.by_name else list(call.names),
            output_names=output_names,
            dynamic_shapes=dict(zip(call.names, shapes, strict=True)) if call.by_name else tuple(shapes),
            dynamo=True,
            verbose=False,
        )

    named = {name: torch.export.Dim(name) for traced in inputs for name in traced.axis_names.values()}
    if not is_traced:
        try:
            shapes = [
                {axis: named[traced.axis_names[axis]] if axis in traced.axis_names else auto for axis in traced.varying}
                for traced in inputs
            ]
            return export([traced.with_larger_axes() for traced in inputs], shapes)
        except Exception as error:  # noqa: BLE001  # torch raises many, and what is wrong is found, and said, below
            _log.debug("Exporting with shared axes failed: %s", error)
    # With the rows of the example: where the module fixes them, it is to these.
    arrays = [traced.array if is_traced else traced.with_larger_axes(but=0) for traced in inputs]
    return export(arrays, [dict.fromkeys(traced.varying, auto) for traced in inputs])


def _first_lines(error: BaseException | None) -> str:
    text = str(error).strip() or repr(error)
    return re.sub(r"\x1b\[[0-9;]*m", "", text)[:2000]  # without the colours that torch writes


def _fixed_symbols(program: Any) -> dict[str, int]:
    """Symbols that torch writes as if they varied, and that the module takes one value of."""
    constraints = {} if program is None else program.range_constraints
    return {str(symbol): int(limits.lower) for symbol, limits in constraints.items() if limits.lower == limits.upper}


def _tidy(path: Path, names: Sequence[str], inputs: Sequence[TracedInput], fixed: Mapping[str, int]) -> None:
    """Name the axes, check which of them vary, and remove what torch notes about source code: paths of this machine."""
    proto = onnx.load(path, load_external_data=False)
    check_exported_inputs(proto, names)
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in fixed:
                dim.dim_value = fixed[dim.dim_param]
    renamed = _axis_names(proto, names, inputs)
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"[A-Za-z_]\w*", lambda found: renamed.get(found[0], found[0]), dim.dim_param)
        del value.metadata_props[:]
    for node in (*proto.graph.node, *(node for function in proto.functions for node in function.node)):
        del node.metadata_props[:]
    for holder in (proto, proto.graph, *proto.functions):
        del holder.metadata_props[:]
    onnx.save(proto, path)


def _axis_names(proto: onnx.ModelProto, names: Sequence[str], inputs: Sequence[TracedInput]) -> dict[str, str]:
    """A telling name for each symbol of torch's. Raises OnnxModelError where an axis has none that should."""
    dims = {value.name: value.type.tensor_type.shape.dim for value in proto.graph.input}
    axes = [(name, traced, axis) for name, traced in zip(names, inputs, strict=True) for axis in traced.varying]
    rows = {dims[name][0].dim_param for name, _, axis in axes if axis == 0} - {""}
    renamed = dict.fromkeys(rows, ROWS) if len(rows) == 1 else {}
    for name, traced, axis in axes:
        symbol = dims[name][axis].dim_param
        if symbol:
            known = None if axis == 0 else traced.axis_names.get(axis)
            renamed.setdefault(symbol, known or f"{name}_{axis}")
            continue
        fixed = dims[name][axis].dim_value
        if axis:
            raise OnnxModelError(
                f"axis {axis} of input {name!r} varies by the signature, and the exported graph has it fixed to "
                f"{fixed}: the model computes with its size as a number, or was saved as a traced program that did. "
                "Log it with a signature that gives this size, or change the model to take sizes from its inputs"
            )
        _log.warning("Input %r takes %d rows and no other number: the model itself fixes it", name, fixed)
    return renamed
