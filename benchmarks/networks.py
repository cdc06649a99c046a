"""BERT-base and a YOLO-like detector as ONNX, with seeded random weights: the right work, and no sense.

BERT-base (Devlin et al., 2018, https://arxiv.org/abs/1810.04805) with a classifier on its first token; a network of
the size and the blocks of YOLOv8n, with its box distribution decoded.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from benchmarks.resnet50 import Network

TOKENS = 128
_WORDS, _WIDTH, _HEADS, _INNER, _LABELS = 30_522, 768, 12, 3_072, 5
SIDE = 320
_CLASSES, _BINS = 80, 16


def bert(seed: int = 0, *, layers: int = 12) -> onnx.ModelProto:
    """`input_ids` and `attention_mask`, int64 [batch, 128] → `logits` float32 [batch, 5]."""
    network = Network(seed)

    def linear(x: str, inside: int, outside: int) -> str:
        weights = network.weights((inside, outside), inside, gain=0.7)
        return network.node("Add", [network.node("MatMul", [x, weights]), network.zeros(outside)])

    def normalized(x: str) -> str:
        scale = network.constant(np.ones(_WIDTH, np.float32))
        return network.node("LayerNormalization", [x, scale, network.zeros(_WIDTH)], axis=-1, epsilon=1e-12)

    def heads(x: str, order: list[int]) -> str:
        split = network.constant(np.array([0, TOKENS, _HEADS, _WIDTH // _HEADS]))
        return network.node("Transpose", [network.node("Reshape", [x, split])], perm=order)

    words = network.weights((_WORDS, _WIDTH), 2)
    x = network.node("Gather", [words, "input_ids"])
    x = normalized(network.node("Add", [x, network.weights((TOKENS, _WIDTH), 2)]))
    seen = network.node("Cast", ["attention_mask"], to=TensorProto.FLOAT)
    hidden = network.node("Sub", [network.constant(np.float32(1)), seen])
    mask = network.node("Mul", [hidden, network.constant(np.float32(-1e4))])
    mask = network.node("Unsqueeze", [mask, network.constant(np.array([1, 2]))])
    for _ in range(layers):
        query, key = heads(linear(x, _WIDTH, _WIDTH), [0, 2, 1, 3]), heads(linear(x, _WIDTH, _WIDTH), [0, 2, 3, 1])
        value = heads(linear(x, _WIDTH, _WIDTH), [0, 2, 1, 3])
        scores = network.node("Mul", [network.node("MatMul", [query, key]),
                                      network.constant(np.float32((_WIDTH // _HEADS) ** -0.5))])  # fmt: skip
        scores = network.node("Softmax", [network.node("Add", [scores, mask])], axis=-1)
        found = network.node("Transpose", [network.node("MatMul", [scores, value])], perm=[0, 2, 1, 3])
        found = network.node("Reshape", [found, network.constant(np.array([0, TOKENS, _WIDTH]))])
        x = normalized(network.node("Add", [x, linear(found, _WIDTH, _WIDTH)]))
        inner = linear(x, _WIDTH, _INNER)
        root = network.node("Erf", [network.node("Mul", [inner, network.constant(np.float32(0.5**0.5))])])
        gate = network.node("Mul", [network.node("Add", [root, network.constant(np.float32(1))]),
                                    network.constant(np.float32(0.5))])  # fmt: skip
        x = normalized(network.node("Add", [x, linear(network.node("Mul", [inner, gate]), _INNER, _WIDTH)]))
    first = network.node("Gather", [x, network.constant(np.array(0))], axis=1)
    pooled = network.node("Tanh", [linear(first, _WIDTH, _WIDTH)])
    weights = network.weights((_WIDTH, _LABELS), _WIDTH)
    network.node("Gemm", [pooled, weights, network.zeros(_LABELS)], output="logits")
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", TOKENS])
              for name in ("input_ids", "attention_mask")]  # fmt: skip
    return network.model("bert", inputs, helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", _LABELS]))


def sentences(count: int, seed: int = 0) -> dict[str, npt.NDArray[np.int64]]:
    """Random words, of which the last are hidden: a different number in each row."""
    random = np.random.default_rng(seed)
    length = random.integers(TOKENS // 4, TOKENS + 1, (count, 1))
    return {
        "input_ids": random.integers(1, _WORDS, (count, TOKENS)),
        "attention_mask": (np.arange(TOKENS) < length).astype(np.int64),
    }


def detector(seed: int = 0) -> onnx.ModelProto:
    """`images` float32 [batch, 3, 320, 320] → `found` float32 [batch, 84, 2100]: boxes and scores of 80 classes."""
    network = Network(seed)

    def convolution(x: str, inside: int, outside: int, kernel: int = 3, stride: int = 1) -> str:
        y = network.convolution(x, inside, outside, kernel=kernel, stride=stride, relu=False, gain=1.25)
        return network.node("Mul", [y, network.node("Sigmoid", [y])])

    def concatenated(parts: list[str], axis: int = 1) -> str:
        return network.node("Concat", parts, axis=axis)

    def stage(x: str, inside: int, outside: int, blocks: int, *, adds: bool) -> str:
        half = outside // 2
        x = convolution(x, inside, outside, kernel=1)
        halves = network.constant(np.array([half, half]))
        names = [f"{x}_left", f"{x}_right"]
        network.nodes.append(helper.make_node("Split", [x, halves], names, name=f"{x}_split", axis=1))
        parts = names
        for _ in range(blocks):
            y = convolution(convolution(parts[-1], half, half), half, half)
            parts = [*parts, network.node("Add", [parts[-1], y]) if adds else y]
        return convolution(concatenated(parts), half * len(parts), outside, kernel=1)

    def enlarged(x: str) -> str:
        return network.node("Resize", [x, "", network.constant(np.array([1, 1, 2, 2], np.float32))], mode="nearest",
                            coordinate_transformation_mode="asymmetric", nearest_mode="floor")  # fmt: skip

    def head(x: str, inside: int) -> str:
        boxes = convolution(convolution(x, inside, 64), 64, 64)
        scores = convolution(convolution(x, inside, _CLASSES), _CLASSES, _CLASSES)
        boxes = network.convolution(boxes, 64, 4 * _BINS, kernel=1, relu=False)
        scores = network.convolution(scores, _CLASSES, _CLASSES, kernel=1, relu=False)
        flat = network.constant(np.array([0, 4 * _BINS + _CLASSES, -1]))
        return network.node("Reshape", [concatenated([boxes, scores]), flat])

    x = convolution(convolution("images", 3, 16, stride=2), 16, 32, stride=2)
    x = stage(x, 32, 32, 1, adds=True)
    eighth = stage(convolution(x, 32, 64, stride=2), 64, 64, 2, adds=True)
    sixteenth = stage(convolution(eighth, 64, 128, stride=2), 128, 128, 2, adds=True)
    x = stage(convolution(sixteenth, 128, 256, stride=2), 256, 256, 1, adds=True)
    pooled = [convolution(x, 256, 128, kernel=1)]
    for _ in range(3):
        pooled.append(network.node("MaxPool", [pooled[-1]], kernel_shape=[5, 5], strides=[1, 1], pads=[2] * 4))
    deep = convolution(concatenated(pooled), 512, 256, kernel=1)
    middle = stage(concatenated([enlarged(deep), sixteenth]), 384, 128, 1, adds=False)
    fine = stage(concatenated([enlarged(middle), eighth]), 192, 64, 1, adds=False)
    middle = stage(concatenated([convolution(fine, 64, 64, stride=2), middle]), 192, 128, 1, adds=False)
    deep = stage(concatenated([convolution(middle, 128, 128, stride=2), deep]), 384, 256, 1, adds=False)
    every = concatenated([head(fine, 64), head(middle, 128), head(deep, 256)], axis=2)
    sizes = network.constant(np.array([4 * _BINS, _CLASSES]))
    network.nodes.append(helper.make_node("Split", [every, sizes], ["boxes", "scores"], name="split", axis=1))
    bins = network.node("Reshape", ["boxes", network.constant(np.array([0, 4, _BINS, -1]))])
    bins = network.node("Transpose", [network.node("Softmax", [bins], axis=2)], perm=[0, 1, 3, 2])
    sides = network.node("MatMul", [bins, network.constant(np.arange(_BINS, dtype=np.float32).reshape(-1, 1))])
    cells = (SIDE // 8) ** 2 + (SIDE // 16) ** 2 + (SIDE // 32) ** 2
    sides = network.node("Reshape", [sides, network.constant(np.array([0, 4, cells]))])
    network.node("Concat", [sides, network.node("Sigmoid", ["scores"])], output="found", axis=1)
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])
    found = helper.make_tensor_value_info("found", TensorProto.FLOAT, ["batch", 4 + _CLASSES, cells])
    return network.model("detector", [images], found)


def pictures(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """float32 [count, 3, 320, 320] between 0 and 1: 32 different ones, again and again."""
    random = np.random.default_rng(seed)
    some = random.random((min(count, 32), 3, SIDE, SIDE), dtype=np.float32)
    some *= random.uniform(0.2, 1.0, (len(some), 3, 1, 1)).astype(np.float32)
    return np.resize(some, (count, 3, SIDE, SIDE))
