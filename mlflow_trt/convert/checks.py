"""What a TensorRT, and the GPUs that an engine is for, cannot do: found out before anything is built."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, shape_inference

from mlflow_trt.backends import cuda_driver as hardware
from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.convert.onnx.graph import label_of
from mlflow_trt.convert.onnx.model import attribute_of, bodies_of, check_classical, is_operator_name
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.types import ComputeCapability, HardwareCompatibility, Precision, Weights
from mlflow_trt.errors import RecipeError, UnsupportedModelError

_log = get_logger(__name__)
FIRST_WITH_FP8 = ComputeCapability(8, 9)

_READ_BY_NAME = ("", "ai.onnx", "com.microsoft")
"""Domains whose operators TensorRT's parser has. Of com.microsoft, what shares a name of ONNX's means the same, but for
Attention, whose shapes the parser refuses."""
_NO_TENSORS = frozenset(
    {
        "ConcatFromSequence", "Optional", "OptionalGetElement", "OptionalHasElement", "RegexFullMatch", "SequenceAt",
        "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap",
        "SplitToSequence", "StringConcat", "StringNormalizer", "StringSplit",
    }
)  # fmt: skip
"""Operators that take or make sequences, optional values or strings."""
_NONPAD_KV_SEQLEN = 6
"""The position of this input of Attention, since opset 24."""


def _ignores_lengths(node: NodeProto) -> bool:
    return node.op_type == "Attention" and any(node.input[_NONPAD_KV_SEQLEN:])


def _ignores_layout(node: NodeProto) -> bool:
    return node.op_type in ("RNN", "GRU", "LSTM") and attribute_of(node, "layout").i == 1


def _ignores_mode(node: NodeProto) -> bool:
    return node.op_type == "SpaceToDepth" and attribute_of(node, "mode").s == b"CRD"


def _updates_in_place(node: NodeProto) -> bool:
    return node.op_type == "TensorScatter"


_REFUSED: dict[Callable[[NodeProto], bool], str] = {
    _ignores_lengths: (
        "TensorRT's parser ignores nonpad_kv_seqlen, the lengths of the rows, at {nodes}, and the engine would attend "
        "to the padding; export the model with attn_mask instead"
    ),
    _ignores_layout: (
        "TensorRT's parser ignores layout=1, which puts the batch before the sequence, at {nodes}, and the engine "
        "would take the one for the other; export the model with layout=0, and a Transpose before and after"
    ),
    _ignores_mode: (
        "TensorRT's parser ignores mode=CRD, at {nodes}, and the engine would order the channels as DCR; export the "
        "model with Reshape, Transpose and Reshape instead"
    ),
    _updates_in_place: (
        "TensorRT updates the cache of {nodes} in place, which takes input and output in one memory, and a session "
        "keeps them apart; export the model without a cache that comes in and goes out"
    ),
}
"""What TensorRT-RTX 1.6.1 and 1.7.1 build an engine from that answers wrongly, or cannot be run."""


def check_recipe(tensorrt: trt.TensorRT, recipe: Recipe) -> None:
    """Raise RecipeError for an option that this TensorRT does not have, or a target that cannot do what is asked."""
    if recipe.precision is Precision.BEST:
        raise RecipeError(
            "an engine has one precision; 'best' is for save_model, log_model, convert_model_version and "
            "`mlflow-trt convert`, which choose it by measuring",
            option="precision",
        )
    _check_plugins(tensorrt, recipe)
    if tensorrt.is_rtx:
        _check_rtx(tensorrt, recipe)
    elif recipe.targets:
        raise RecipeError(
            "TensorRT builds only for the GPU it runs on; leave targets= out, or build with TensorRT-RTX "
            f"({trt.DISTRIBUTION_VARIABLE}=tensorrt_rtx)",
            option="targets",
        )
    if recipe.precision is Precision.FP8:
        _check_fp8(tensorrt, recipe)


def check_nodes(model: ModelProto) -> None:
    """Raise UnsupportedModelError for what TensorRT's parser takes, and whose engine is no good, or explains badly."""
    check_classical(model)
    _check_names(model)
    _check_values(model)
    _check_domains(model)
    bodies = list(bodies_of(model))
    for is_refused, reason in _REFUSED.items():
        nodes = [node for body in bodies for node in body.node if not node.domain and is_refused(node)]
        if nodes:
            refused = [label_of(node) for node in nodes]
            raise UnsupportedModelError(reason.format(nodes=", ".join(refused)), nodes=refused)
    misread = _find_means_in_16_bits(model)
    if misread:
        raise UnsupportedModelError(
            f"TensorRT's parser misreads a constant of means in 16 bits, and the engine would answer wrongly, at "
            f"{', '.join(misread)}; export the model in float32 and choose precision='fp16' or 'bf16', which keep "
            "them in float32",
            nodes=misread,
        )


def _check_values(model: ModelProto) -> None:
    """Its parser gives no reason, and precision passes have to know types before."""
    called = {(node.domain, node.op_type) for body in bodies_of(model) for node in body.node}
    bodies = [
        body for body in bodies_of(model) if not isinstance(body, FunctionProto) or (body.domain, body.name) in called
    ]
    found = [label_of(node) for body in bodies for node in body.node if _is_beyond_tensors(node)]
    stored = [tensor for body in bodies if isinstance(body, GraphProto) for tensor in body.initializer]
    found += [f"{tensor.name} (initializer)" for tensor in stored if tensor.data_type == TensorProto.STRING]
    if found:
        raise UnsupportedModelError(
            "TensorRT has tensors of numbers alone, and no sequences, optional values or strings, as there are at "
            f"{', '.join(dict.fromkeys(found))}; export the model without them, or log it with mlflow.onnx, which runs "
            "it on ONNX Runtime",
            nodes=found,
        )


def _is_beyond_tensors(node: NodeProto) -> bool:
    if node.domain:
        return False
    strings = any(
        attribute.name in ("value_string", "value_strings") or attribute.t.data_type == TensorProto.STRING
        for attribute in node.attribute
        if attribute.name.startswith("value")
    )
    return strings or node.op_type in _NO_TENSORS


def _check_domains(model: ModelProto) -> None:
    """TensorRT's parser looks at the name of an operator alone, and takes one of another domain for ONNX's."""
    functions = {(function.domain, function.name) for function in model.functions}  # which rewriting sees to
    nodes = [
        node
        for body in bodies_of(model)
        for node in body.node
        if node.domain not in _READ_BY_NAME
        and (node.domain, node.op_type) not in functions
        and is_operator_name(node.op_type)
    ]
    if nodes:
        refused = list(dict.fromkeys(map(label_of, nodes)))
        domains = sorted({node.domain for node in nodes})
        of_onnxruntime = any(domain.startswith(("com.microsoft.", "com.ms.")) for domain in domains)
        advice = (
            "convert the model from before ONNX Runtime optimized it" if of_onnxruntime else "give them other names"
        )
        raise UnsupportedModelError(
            f"TensorRT's parser takes {', '.join(refused)} for operators of ONNX, but they are of "
            f"{', '.join(domains)}, where they may mean anything; {advice}",
            nodes=refused,
        )


def _check_names(model: ModelProto) -> None:
    """TensorRT renames an input that is an output too, and has no output twice."""
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name for value in model.graph.input} - stored
    names = [value.name for value in model.graph.output]
    both = [name for name in names if name in inputs]
    if both:
        raise UnsupportedModelError(
            f"output {both[0]!r} is an input, too, and an engine has one tensor of a name; export the model with an "
            "Identity between them, or without this output"
        )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UnsupportedModelError(
            f"the model has {names.count(twice[0])} outputs of the name {twice[0]!r}; export it with each output once"
        )


def _find_means_in_16_bits(model: ModelProto) -> list[str]:
    """The means that a model brings in 16 bits: those that a precision pass would keep in float32."""
    means = [node for node in model.graph.node if node.op_type == "Mean" and not node.domain]
    if not means:
        return []
    graph = shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    narrow = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    return [label_of(node) for node in means if types.get(node.input[0]) in narrow]


def weight_only_operators(tensorrt: trt.TensorRT, precision: Precision) -> dict[str, str]:
    """Operators of which this TensorRT can have no more than the weights in a precision, with the reason."""
    if precision is Precision.INT8 and tensorrt.is_rtx and tensorrt.version_info < (1, 7):
        reason = f"{tensorrt} builds no convolutions in int8; TensorRT-RTX 1.7 does"
        return {"Conv": reason, "ConvTranspose": reason}
    return {}


def _check_plugins(tensorrt: trt.TensorRT, recipe: Recipe) -> None:
    if recipe.plugins and tensorrt.is_rtx:
        raise RecipeError(
            "TensorRT-RTX has no plugins: its networks have no layer for them (1.6 refuses custom operators, and the "
            "parser of 1.7 ends its process). Build with the tensorrt distribution, or export the model without them",
            option="plugins",
        )
    for library in recipe.plugins:
        if not Path(library).is_file():
            raise RecipeError(f"plugins: {library} does not exist; expected a shared library", option="plugins")


def _check_rtx(tensorrt: trt.TensorRT, recipe: Recipe) -> None:
    known = tensorrt.compute_capabilities()
    unknown = [target for target in recipe.targets if target not in known]
    if unknown:
        raise RecipeError(
            f"{tensorrt} cannot build for {', '.join(unknown)}; its targets are {', '.join(known)}",
            option="targets",
        )
    if recipe.hardware_compatibility is not HardwareCompatibility.NONE:
        raise RecipeError(
            "TensorRT-RTX has no hardware compatibility levels; name the GPUs with targets= instead",
            option="hardware_compatibility",
        )
    if recipe.version_compatible:
        raise RecipeError(
            "TensorRT-RTX has no version-compatible engines; leave version_compatible out, and the engine is "
            "rebuilt where another release loads it",
            option="version_compatible",
        )
    if recipe.weights is not Weights.INCLUDED and (problem := hardware.probe().problem) is not None:
        raise RecipeError(
            f"TensorRT-RTX builds {recipe.weights} engines only where there is a GPU ({problem}); "
            "leave weights= out, or convert on a GPU machine",
            option="weights",
        )
    if recipe.timing_cache is not None:
        _log_once("TensorRT-RTX has no timing cache: the file is left alone")


@functools.cache
def _log_once(message: str) -> None:
    """What holds for every build of this process is said with the first."""
    _log.info("%s", message)


def _check_fp8(tensorrt: trt.TensorRT, recipe: Recipe) -> None:
    if not tensorrt.is_rtx:
        return  # the engine is for this machine's GPU, which TensorRT asks itself
    able = [name for name in tensorrt.compute_capabilities() if ComputeCapability.parse(name) >= FIRST_WITH_FP8]
    unable = [name for name in recipe.targets if name not in able]
    if unable or not recipe.targets:
        what = ", ".join(unable) if unable else "the default target, which is every GPU from sm80 on,"
        raise RecipeError(
            f"{what} cannot execute fp8, which came with {FIRST_WITH_FP8}; name GPUs that can: targets={able}",
            option="targets",
        )
