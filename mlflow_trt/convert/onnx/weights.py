"""Where the weights of a graph are while passes work on it: in files, so that a graph can be copied without them.

Source: ONNX's external data format, https://github.com/onnx/onnx/blob/main/docs/ExternalData.md.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    import onnx_ir as ir  # imported where it is used: it takes a second

SETTING = 8
"""Constants of up to so many values are settings of a node, such as an epsilon, rather than weights."""

_LARGEST_FILE = 1_500_000_000
"""In bytes. Beyond 2 GB protobuf writes nothing, so weights go to a file of their own well before."""

_DETACHED = 1024
"""In bytes: smaller tensors stay in the graph, where shape inference and onnx's converter can read them."""


def detach_weights(model: ir.Model, folder: Path, name: str) -> ModelProto:
    """The model with its weights in the file `name` of `folder`; they are read and written one after the other."""
    import onnx_ir as ir

    path = folder / name
    path.unlink(missing_ok=True)
    ir.external_data.unload_from_model(model, folder, name, size_threshold_bytes=_DETACHED)
    return ir.to_proto(model)


def read_weights(tensor: TensorProto, folder: Path) -> npt.NDArray[np.generic]:
    """The values of a tensor; those that lie in a file of `folder` are mapped into memory, not copied."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    shape = tuple(tensor.dims)
    if dtype.itemsize * math.prod(shape) != int(entries.get("length") or 0):
        return numpy_helper.to_array(tensor, str(folder))  # packed, as integers of 4 bits are
    file = folder / entries["location"]
    mapped = np.memmap(file, dtype, "r", int(entries.get("offset") or 0), shape)
    return mapped.view(np.ndarray)


class WeightFile:
    """A file that weights are added to as long as passes make new ones."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._path.write_bytes(b"")

    def add(self, name: str, values: npt.NDArray[np.generic], onnx_type: int) -> TensorProto:
        """The tensor that stands in the graph for these values."""
        if values.nbytes < _DETACHED:
            return helper.make_tensor(name, onnx_type, values.shape, values.tobytes(), raw=True)
        with self._path.open("ab") as file:
            offset = file.tell()
            np.ascontiguousarray(values).tofile(file)
        tensor = TensorProto(name=name, data_type=onnx_type, dims=values.shape, data_location=TensorProto.EXTERNAL)
        entries = {"location": self._path.name, "offset": offset, "length": values.nbytes}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def write_model(model: ModelProto, folder: Path, path: Path) -> None:
    """Write a model whose weights may lie in `folder` as one file, or beside a file of its weights if too large."""
    beside = path.with_name(f"{path.name}.data")
    beside.unlink(missing_ok=True)  # of a model that was here before: onnx would write behind what is in it
    if weight_bytes(model) <= _LARGEST_FILE:
        whole = ModelProto()
        whole.CopyFrom(model)
        onnx.load_external_data_for_model(whole, str(folder))
        onnx.save_model(whole, path)
        return
    import onnx_ir as ir

    detached = ir.from_proto(model)
    ir.external_data.set_base_dir(detached.graph, folder)
    onnx.save_model(detach_weights(detached, path.parent, beside.name), path)


def weight_bytes(model: ModelProto) -> int:
    """What the weights of a graph take, wherever they are."""
    return sum(_bytes_of(tensor) for tensor in model.graph.initializer)


def _bytes_of(tensor: TensorProto) -> int:
    if tensor.data_location != TensorProto.EXTERNAL:
        return int(tensor.ByteSize())
    entries: dict[str, str] = {entry.key: entry.value for entry in tensor.external_data}
    if "length" in entries:
        return int(entries["length"])
    return int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * math.prod(tensor.dims))
