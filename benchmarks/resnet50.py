"""ResNet-50 (He et al., 2015, https://arxiv.org/abs/1512.03385) as ONNX, its batch norms folded into the convolutions.

The weights are random but seeded and scaled, so that the outputs differ from image to image: enough to measure speed
and to compare results, useless for telling cats from dogs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

_STAGES = ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2))
_EXPANSION = 4


def resnet50(seed: int = 0) -> onnx.ModelProto:
    """`image` float32 [batch, 3, 224, 224] → `scores` float32 [batch, 1000]."""
    network = Network(seed)
    x = network.convolution("image", 3, 64, kernel=7, stride=2)
    x = network.node("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for blocks, width, first_stride in _STAGES:
        for block in range(blocks):
            x = network.bottleneck(x, channels, width, first_stride if block == 0 else 1)
            channels = width * _EXPANSION
    x = network.node("Flatten", [network.node("GlobalAveragePool", [x])])
    weights = network.weights((channels, 1000), channels)
    network.node("Gemm", [x, weights, network.zeros(1000)], output="scores")
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 224, 224])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 1000])
    return network.model("resnet50", [image], scores)


def images(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """float32 [count, 3, 224, 224]: 64 different noisy images, again and again."""
    random = np.random.default_rng(seed)
    some = random.standard_normal((min(count, 64), 3, 224, 224), dtype=np.float32)
    some *= random.uniform(0.2, 2.0, (len(some), 3, 1, 1)).astype(np.float32)
    return np.resize(some, (count, 3, 224, 224))


class Network:
    """Nodes and weights as they come."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)

    def node(self, operator: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        name = output or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def weights(self, shape: tuple[int, ...], fan_in: int, gain: float = 1.0) -> str:
        values = self._random.standard_normal(shape, dtype=np.float32) * np.float32(gain * (2 / fan_in) ** 0.5)
        return self.constant(values)

    def zeros(self, size: int) -> str:
        return self.constant(np.zeros(size, np.float32))

    def convolution(self, x: str, inside: int, outside: int, *, kernel: int, stride: int = 1, gain: float = 1.0,
                    relu: bool = True) -> str:  # fmt: skip
        weights = self.weights((outside, inside, kernel, kernel), inside * kernel**2, gain)
        pad = kernel // 2
        y = self.node(
            "Conv",
            [x, weights, self.zeros(outside)],
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[pad] * 4,
        )
        return self.node("Relu", [y]) if relu else y

    def bottleneck(self, x: str, inside: int, width: int, stride: int) -> str:
        outside = width * _EXPANSION
        y = self.convolution(x, inside, width, kernel=1)
        y = self.convolution(y, width, width, kernel=3, stride=stride)
        # Small, so that the sums of sixteen blocks stay of one size.
        y = self.convolution(y, width, outside, kernel=1, gain=0.3, relu=False)
        if inside != outside or stride != 1:
            x = self.convolution(x, inside, outside, kernel=1, stride=stride, gain=0.7, relu=False)
        return self.node("Relu", [self.node("Add", [x, y])])

    def model(self, name: str, inputs: list[onnx.ValueInfoProto], output: onnx.ValueInfoProto) -> onnx.ModelProto:
        """All that was added, as a model."""
        graph = helper.make_graph(self.nodes, name, inputs, [output], self.initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    def constant(self, values: Any) -> str:
        name = f"weights_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(values), name))
        return name
