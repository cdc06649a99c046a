"""The memory of a slot: for each tensor of the engine a buffer on either side of the bus."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlflow_trt.core.arrays import Array, numpy_dtype
from mlflow_trt.runtime.cuda.device import DeviceBuffer, Moves, PinnedBuffer
from mlflow_trt.runtime.engine.engine import Engine


class Buffers:
    """Grow when more is needed, and are kept. Tensors that TensorRT has on the host have no `memory`.

    All methods but `nbytes` want the device to be current.

    Attributes:
        moves: of all this memory. CUDA graphs and contexts are good while their count stays the same.
    """

    def __init__(self, engine: Engine) -> None:
        names = (*engine.inputs, *engine.outputs)
        device = engine.device
        self._dtypes = {name: numpy_dtype(engine.dtypes[name]) for name in names}
        self.moves = Moves()
        self.host: dict[str, PinnedBuffer] = {name: device.pinned_buffer(self.moves) for name in names}
        self.memory: dict[str, DeviceBuffer] = {
            name: device.device_buffer(self.moves) for name in names if name not in engine.on_host
        }

    def nbytes(self, name: str, shape: Sequence[int]) -> int:
        """How much memory a tensor takes."""
        return math.prod(shape) * self._dtypes[name].itemsize

    def reserve(self, name: str, shape: tuple[int, ...]) -> int:
        """Make room for a tensor on both sides; returns the address that TensorRT is to use."""
        nbytes = self.nbytes(name, shape)
        address = self.host[name].reserve(nbytes)
        return self.memory[name].reserve(nbytes) if name in self.memory else address

    def array(self, name: str, shape: tuple[int, ...]) -> Array:
        """A tensor's pinned memory; not a copy."""
        return self.host[name].array(shape, self._dtypes[name])

    def address(self, name: str) -> int:
        return (self.memory if name in self.memory else self.host)[name].address

    def free(self) -> None:
        for pinned in self.host.values():
            pinned.free()
        for memory in self.memory.values():
            memory.free()
