"""Read an ONNX model, check it, describe its inputs and outputs, and hash it.

Source: the ONNX IR specification, https://github.com/onnx/onnx/blob/main/docs/IR.md, and its external data format,
https://github.com/onnx/onnx/blob/main/docs/ExternalData.md.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from mlflow_trt.convert.onnx.external_data import check_external_data, without_links
from mlflow_trt.convert.onnx.missing_shapes import add_missing_shapes
from mlflow_trt.core.types import LARGEST_DIMENSION, Dim, TensorSpec
from mlflow_trt.errors import OnnxModelError, UnsupportedModelError

MODEL_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"

# The types that TensorRT has for inputs and outputs.
_DTYPES: Mapping[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "uint8",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
    TensorProto.BOOL: "bool",
}
_SOURCE_DTYPES: Mapping[int, str] = {**_DTYPES, TensorProto.DOUBLE: "float64"}
"""Those of a source model: float64 becomes float32 in the typed model."""

_CLASSICAL = "ai.onnx.ml"
_READ_OF_MICROSOFT = frozenset(
    {
        "GroupQueryAttention", "MatMulNBits", "MultiHeadAttention", "QMoE", "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)  # fmt: skip
"""Operators of ONNX Runtime that TensorRT-RTX 1.7's parser has, and ONNX has not."""

_MOST_DIMENSIONS = 8  # TensorRT's nvinfer1::Dims::MAX_DIMS


@dataclass(frozen=True, kw_only=True)
class OnnxModel:
    """A checked ONNX model on disk.

    `proto` is its graph; weights that the model keeps in external files are not loaded. `external_files` are those
    files, relative to the folder of `path`. `files` maps every file to its sha256, the model itself as `model.onnx`.
    """

    path: Path
    proto: ModelProto
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    external_files: tuple[str, ...]
    files: Mapping[str, str]

    @property
    def digest(self) -> str:
        """The sha256 of the model file; with external weights, of the sorted list of the digests of all files."""
        return combined_digest(self.files)

    def copy_to(self, folder: Path) -> None:
        """Copy the model as `model.onnx`, and its external files, byte for byte."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, folder / MODEL_FILE)
        copy_files(self.external_files, self.path.parent, folder)


def combined_digest(files: Mapping[str, str]) -> str:
    """One digest for a set of files: the file's own where there is one, else that of the sorted list of them."""
    if len(files) == 1:
        return next(iter(files.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def copy_files(names: tuple[str, ...], source: Path, target: Path) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_onnx(
    model: str | os.PathLike[str] | ModelProto,
    workdir: Path,
    *,
    allow_external_data_from: Path | None = None,
    save_as_external_data: bool | None = None,
) -> OnnxModel:
    """Read and check `model`, a path or a ModelProto; a ModelProto is written to `workdir` first and never changed.

    External data lies in the model's own folder. Where it is a symbolic link, that leads to a file of this folder or of
    `allow_external_data_from`. With `save_as_external_data` weights are moved into a file beside the model, and with
    False into it; None leaves them where they are.

    Raises OnnxModelError for a file that is no ONNX model, is truncated, lacks external weights, is refused by
    onnx.checker, or whose inputs or outputs are of a type that TensorRT does not have; and UnsupportedModelError where
    they are, and `check_classical` says more.
    """
    if isinstance(model, ModelProto):
        path = _write_proto(model, workdir)
    elif isinstance(model, (str, os.PathLike)):
        path = Path(model)
    else:
        raise OnnxModelError(f"expected the path of an ONNX file or an onnx.ModelProto, got {type(model).__name__}")
    proto = _parse(path)
    _check_text(proto, path)
    external_files = check_external_data(tensors_of(proto), path, allow_external_data_from)
    if save_as_external_data is not None and save_as_external_data != bool(external_files):
        path = _with_weights_moved(path, workdir, external=save_as_external_data)
        proto = _parse(path)
        external_files = check_external_data(tensors_of(proto), path, None)
    path = without_links(path, external_files, workdir)
    is_completed = add_missing_shapes(proto, path)
    try:
        inputs, outputs = describe(proto, path)
    except OnnxModelError:
        check_classical(proto)  # which tells all at once
        raise
    _check(path, proto, workdir, is_completed=is_completed)
    return OnnxModel(
        path=path,
        proto=proto,
        inputs=inputs,
        outputs=outputs,
        external_files=external_files,
        files={MODEL_FILE: sha256_of(path)} | {name: sha256_of(path.parent / name) for name in external_files},
    )


def describe(proto: ModelProto, path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs, without initializers, and the outputs of a model. Raises OnnxModelError for types and the like."""
    initializers = {tensor.name for tensor in proto.graph.initializer}
    inputs = [_describe(value, "input", path) for value in proto.graph.input if value.name not in initializers]
    return tuple(inputs), tuple(_describe(value, "output", path) for value in proto.graph.output)


def check_classical(proto: ModelProto) -> None:
    """Raise UnsupportedModelError for ONNX's operators for classical machine learning, of which TensorRT has none."""
    nodes = [node for body in bodies_of(proto) for node in body.node if node.domain == _CLASSICAL]
    if not nodes:
        return
    operators = ", ".join(dict.fromkeys(node.op_type for node in nodes))
    raise UnsupportedModelError(
        f"the model needs {operators}, operators of ONNX for classical machine learning ({_CLASSICAL}), of which "
        "TensorRT has none. If skl2onnx made it of a linear model, a neural network, PCA or a scaler, log the "
        "estimator with mlflow.sklearn and convert that (`mlflow-trt convert`, with --whole for its labels): it is "
        "exported without them. Trees, support vectors and neighbours stay with mlflow.onnx, which runs them on ONNX "
        "Runtime",
        nodes=[f"{node.name or 'unnamed'} ({node.op_type})" for node in nodes],
    )


def tensors_of(proto: ModelProto) -> Iterator[TensorProto]:
    """Every tensor stored in a model: in its graph, in the graphs inside its nodes, and in its functions."""
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                yield from _graph_tensors(inner)


def subgraphs_of(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    """The graphs directly inside of nodes: branches of If, bodies of Loop and Scan."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield attribute.g
            yield from attribute.graphs


def graphs_below(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    """The graphs inside of nodes, and those inside of their nodes."""
    for graph in subgraphs_of(nodes):
        yield graph
        yield from graphs_below(graph.node)


def bodies_of(proto: ModelProto) -> Iterator[GraphProto | FunctionProto]:
    """Everything in a model that has nodes."""
    yield from (proto.graph, *graphs_below(proto.graph.node), *proto.functions)


def is_operator_name(name: str) -> bool:
    """Whether TensorRT's parser, which looks at names alone, may take a node or a function for an operator it has."""
    return onnx.defs.has(name) or name in _READ_OF_MICROSOFT


def attribute_of(node: NodeProto, name: str) -> AttributeProto:
    """The attribute of that name; an empty one where the node has none."""
    return next((attribute for attribute in node.attribute if attribute.name == name), AttributeProto())


def copy_of(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def _write_proto(proto: ModelProto, workdir: Path) -> Path:
    for tensor in tensors_of(proto):
        if tensor.data_location == TensorProto.EXTERNAL:
            raise OnnxModelError(
                f"the weights of this ModelProto are not in it: {tensor.name!r} refers to an external file. "
                "Pass the path of the ONNX file instead. (mlflow.onnx.log_model and onnx.save_model with external "
                "data empty the ModelProto they are given; load it again.)"
            )
    try:
        data = proto.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise OnnxModelError(
            f"this ModelProto cannot be serialized ({error}), which protobuf does only up to 2 GB. Save it with "
            "onnx.save_model(..., save_as_external_data=True) and pass its path."
        ) from error
    path = workdir / MODEL_FILE
    path.write_bytes(data)
    return path


def _with_weights_moved(path: Path, workdir: Path, *, external: bool) -> Path:
    """The model with its larger weights in a file beside it, as `mlflow.onnx` writes models, or with all inside."""
    folder = workdir / "moved"
    folder.mkdir()
    target = folder / MODEL_FILE
    proto = onnx.load(path, format="protobuf")
    try:
        if external:
            onnx.save_model(proto, target, save_as_external_data=True, location=WEIGHTS_FILE)
        else:
            onnx.save_model(proto, target)
    except (EncodeError, ValueError) as error:
        raise OnnxModelError(
            f"{path} and its weights do not fit into one file ({error}), which protobuf limits to 2 GB; "
            "leave save_as_external_data out",
            path=path,
        ) from error
    return target


def _parse(path: Path) -> ModelProto:
    try:
        if path.is_dir():
            raise OnnxModelError(f"{path} is a folder; expected an ONNX file", path=path)
        if not path.is_file():
            raise OnnxModelError(f"{path} does not exist; expected an ONNX file", path=path)
        # Without a format, onnx would choose a parser by the file's extension.
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise OnnxModelError(f"{path} cannot be read: {error.strerror}", path=path) from error
    except DecodeError as error:
        raise OnnxModelError(f"{path} is no ONNX model, or a truncated one: {error}", path=path) from error
    if not proto.HasField("graph"):
        raise OnnxModelError(
            f"{path} holds no graph ({path.stat().st_size} bytes): it is no ONNX model, or one that was emptied",
            path=path,
        )
    if not proto.graph.node:
        raise OnnxModelError(f"{path} has a graph without nodes: there is nothing to run", path=path)
    return proto


def _check_text(proto: ModelProto, path: Path) -> None:
    """Protobuf hands over as bytes what is no text, which no name may be."""
    names: list[object] = [prop for entry in proto.opset_import for prop in (entry.domain,)]
    for graph in (proto.graph, *_inner_graphs(proto.graph.node)):
        names += [graph.name, *(tensor.name for tensor in graph.initializer)]
        for value in (*graph.input, *graph.output, *graph.value_info):
            names += [value.name, *(dim.dim_param for dim in value.type.tensor_type.shape.dim)]
        names += _names_of(graph.node)
    for function in proto.functions:
        names += [function.name, function.domain, *function.input, *function.output, *_names_of(function.node)]
    for tensor in tensors_of(proto):
        names += [text for entry in tensor.external_data for text in (entry.key, entry.value)]
    for name in names:
        if not isinstance(name, str):
            raise OnnxModelError(f"{path} is damaged: the name {name!r} in it is no text in UTF-8", path=path)


def _names_of(nodes: Iterable[NodeProto]) -> Iterator[object]:
    for node in nodes:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def _inner_graphs(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    for graph in subgraphs_of(nodes):
        yield graph
        yield from _inner_graphs(graph.node)


_DEPRECATED = "GroupNormalization"
"""Of opset 18 to 20: ONNX Runtime runs it, and `rewrite` says it in other words to TensorRT."""


def _check(path: Path, proto: ModelProto, workdir: Path, *, is_completed: bool) -> None:
    """`is_completed` tells that `proto` has shapes that the file lacks, without which the checker refuses it."""
    try:
        if is_completed:
            _check_copy(proto, workdir)
            return
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as error:
            if _DEPRECATED not in str(error) or "deprecated" not in str(error):
                raise
            _check_copy(proto, workdir)
    except (onnx.checker.ValidationError, UnicodeDecodeError) as error:
        raise OnnxModelError(f"{path} is no valid ONNX model: {str(error).strip()}", path=path) from error


def _check_copy(proto: ModelProto, workdir: Path) -> None:
    """Check all but the deprecated nodes: with an operator of the same inputs in their place.

    Initializers are inputs here: the checker would look for the files of external ones.
    """
    copy = ModelProto()
    copy.CopyFrom(proto)
    for body in bodies_of(copy):
        for node in body.node:
            if node.op_type == _DEPRECATED and not node.domain:
                kept = [attribute for attribute in node.attribute if attribute.name == "epsilon"]
                attributes = [AttributeProto.FromString(attribute.SerializeToString()) for attribute in kept]
                del node.attribute[:]
                node.attribute.extend(attributes)
                node.op_type = "InstanceNormalization"
    inputs = {value.name for value in copy.graph.input}
    for tensor in copy.graph.initializer:
        if tensor.name not in inputs:
            copy.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    copy.graph.ClearField("initializer")
    checked = workdir / "checked.onnx"
    onnx.save_model(copy, checked)
    onnx.checker.check_model(str(checked))


def _describe(value: ValueInfoProto, role: str, path: Path) -> TensorSpec:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        raise OnnxModelError(
            f"{path}: the {role} {value.name!r} is a {(kind or 'value of no type').removesuffix('_type')}; "
            "TensorRT has only tensors; export what is in it as tensors, or log the model with mlflow.onnx, which runs "
            "it on ONNX Runtime",
            path=path,
        )
    tensor = value.type.tensor_type
    if tensor.elem_type not in _SOURCE_DTYPES:
        raise OnnxModelError(
            f"{path}: the {role} {value.name!r} is of type {_type_name(tensor.elem_type)}, "
            f"which TensorRT does not have; export the model with one of {', '.join(sorted(_DTYPES.values()))}, or log "
            "it with mlflow.onnx, which runs it on ONNX Runtime",
            path=path,
        )
    if not tensor.HasField("shape"):
        raise OnnxModelError(
            f"{path}: the {role} {value.name!r} has no shape, not even a number of dimensions"
            + ("" if role == "input" else ", and neither onnx nor ONNX Runtime can tell it")
            + "; export the model with shapes",
            path=path,
        )
    shape = tuple(_dim(dim) for dim in tensor.shape.dim)
    if len(shape) > _MOST_DIMENSIONS or any(isinstance(dim, int) and dim > LARGEST_DIMENSION for dim in shape):
        raise OnnxModelError(
            f"{path}: the {role} {value.name!r} has the shape {shape[:_MOST_DIMENSIONS]}; TensorRT has up to "
            f"{_MOST_DIMENSIONS} dimensions, each below 2**31",
            path=path,
        )
    return TensorSpec(name=value.name, dtype=_SOURCE_DTYPES[tensor.elem_type], shape=shape)


def _type_name(number: int) -> str:
    try:
        return str(TensorProto.DataType.Name(number)).lower()
    except ValueError:
        return str(number)


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    # Some exporters write -1 as the value of a dimension that may vary.
    if dim.HasField("dim_value"):
        return dim.dim_value if dim.dim_value >= 0 else None
    return dim.dim_param or None
