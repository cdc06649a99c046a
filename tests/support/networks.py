"""Small ONNX models made here: one for each thing that real models do not show."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
value = helper.make_tensor_value_info


def model(nodes, inputs, outputs, initializers=()) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "network", list(inputs), list(outputs), list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def constant(name: str, array) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(array), name)


def product(batch: int | str | None = "batch", width: int = 16, outputs: int = 8) -> onnx.ModelProto:
    """y = x @ w: the simplest model whose rows do not depend on each other."""
    weights = np.random.default_rng(1).standard_normal((width, outputs)).astype(np.float32)
    return model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        [value("x", FLOAT, [batch, width])],
        [value("y", FLOAT, [batch, outputs])],
        [constant("w", weights)],
    )


def flags() -> onnx.ModelProto:
    """Two bools of each row, negated."""
    return model(
        [helper.make_node("Not", ["x"], ["y"])],
        [value("x", TensorProto.BOOL, ["batch", 2])],
        [value("y", TensorProto.BOOL, ["batch", 2])],
    )


def sequences() -> onnx.ModelProto:
    """Five steps of any number of sequences, as recurrent networks take them: the batch is axis 1."""
    return model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [value("x", FLOAT, [5, "N", 16])],
        [value("y", FLOAT, [5, "N", 8])],
        [constant("w", np.random.default_rng(1).standard_normal((16, 8)).astype(np.float32))],
    )


def mixed_sizes() -> onnx.ModelProto:
    """y = w @ x of a matrix with 4 rows, of which y has 8."""
    return model(
        [helper.make_node("MatMul", ["w", "x"], ["y"])],
        [value("x", FLOAT, [4, 16])],
        [value("y", FLOAT, [8, 16])],
        [constant("w", np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32))],
    )


def pooled(height: int = 2) -> onnx.ModelProto:
    """Every second value of an image of this height. For an even one, TensorRT counts a window that lies outside.

    The model declares the output that TensorRT would make.
    """
    return model(
        [helper.make_node("MaxPool", ["x"], ["y"], name="pool", kernel_shape=[1, 1], strides=[2, 2], ceil_mode=1)],
        [value("x", FLOAT, ["batch", 3, height, height])],
        [value("y", FLOAT, ["batch", 3, height // 2 + 1, height // 2 + 1])],
    )


def mean(count: int) -> onnx.ModelProto:
    """The mean of x times 1, x times 2, and so on: products, so that there is something else to compute in 16 bits."""
    names = [f"p{number}" for number in range(count)]
    products = [helper.make_node("Mul", ["x", f"c{number}"], [name], name=name) for number, name in enumerate(names)]
    return model(
        [*products, helper.make_node("Mean", names, ["y"], name="mean")],
        [value("x", FLOAT, ["batch", 16])],
        [value("y", FLOAT, ["batch", 16])],
        [constant(f"c{number}", np.float32(number + 1)) for number in range(count)],
    )


def rows(count: int, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def quantized_twice() -> onnx.ModelProto:
    """A product of int8, which ONNX Runtime's optimizer makes one kernel of, quantized again."""
    weights = np.random.default_rng(3).integers(-127, 128, (16, 8)).astype(np.int8)
    return model(
        [
            helper.make_node("QuantizeLinear", ["x", "xs", "zero"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "xs", "zero"], ["xd"]),
            helper.make_node("DequantizeLinear", ["wq", "ws", "zero"], ["wd"]),
            helper.make_node("MatMul", ["xd", "wd"], ["h"]),
            helper.make_node("QuantizeLinear", ["h", "hs", "zero"], ["hq"]),
            helper.make_node("DequantizeLinear", ["hq", "hs", "zero"], ["y"]),
        ],
        [value("x", FLOAT, ["batch", 16])],
        [value("y", FLOAT, ["batch", 8])],
        [
            constant("xs", np.float32(0.05)),
            constant("ws", np.float32(0.01)),
            constant("hs", np.float32(0.2)),
            constant("zero", np.int8(0)),
            constant("wq", weights),
        ],
    )


def ranks() -> onnx.ModelProto:
    """Three inputs of ranks 3, 1 and 2, one of them integers, and outputs of ranks 3, 2 and 1, one of them integers."""
    return model(
        [
            helper.make_node("Unsqueeze", ["gain", "two"], ["wide_gain"]),
            helper.make_node("Mul", ["image", "wide_gain"], ["scaled"]),
            helper.make_node("ReduceSum", ["scaled", "two"], ["sums"], keepdims=0),
            helper.make_node("ReduceSum", ["scaled", "both"], ["total"], keepdims=0),
            helper.make_node("Add", ["count", "count"], ["doubled"]),
        ],
        [
            value("image", FLOAT, ["batch", 2, 3]),
            value("count", INT64, ["batch"]),
            value("gain", FLOAT, ["batch", 1]),
        ],
        [
            value("scaled", FLOAT, ["batch", 2, 3]),
            value("sums", FLOAT, ["batch", 2]),
            value("total", FLOAT, ["batch"]),
            value("doubled", INT64, ["batch"]),
        ],
        [constant("two", np.array([2])), constant("both", np.array([1, 2]))],
    )


def ranks_feeds(count: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(count)
    return {
        "image": random.standard_normal((count, 2, 3)).astype(np.float32),
        "count": random.integers(-5, 100, count),
        "gain": random.uniform(1, 2, (count, 1)).astype(np.float32),
    }


def scaled_by_a_scalar() -> onnx.ModelProto:
    """Inputs without a common axis: a matrix of any size, and a number."""
    return model(
        [helper.make_node("Mul", ["x", "k"], ["y"])],
        [value("x", FLOAT, ["height", "width"]), value("k", FLOAT, [])],
        [value("y", FLOAT, ["height", "width"])],
    )


def square() -> onnx.ModelProto:
    """Its rows depend on each other. A million of them, which are 4 MB, want the square of that in memory, 4 TB."""
    return model(
        [
            helper.make_node("Unsqueeze", ["x", "one"], ["column"]),
            helper.make_node("Unsqueeze", ["x", "zero"], ["row"]),
            helper.make_node("MatMul", ["column", "row"], ["products"]),
            helper.make_node("ReduceMax", ["products"], ["y"], axes=[1], keepdims=0),
        ],
        [value("x", FLOAT, ["points"])],
        [value("y", FLOAT, ["points"])],
        [constant("one", np.array([1])), constant("zero", np.array([0]))],
    )


def pixels() -> onnx.ModelProto:
    """An image of uint8 goes in, the mean of each channel comes out."""
    return model(
        [
            helper.make_node("Cast", ["image"], ["as_float"], to=FLOAT),
            helper.make_node("ReduceMean", ["as_float"], ["means"], axes=[1, 2], keepdims=0),
        ],
        [value("image", TensorProto.UINT8, ["batch", 8, 6, 3])],
        [value("means", FLOAT, ["batch", 3])],
    )


def reshaped() -> onnx.ModelProto:
    """An input, `shape`, whose values other shapes are computed from."""
    return model(
        [helper.make_node("Reshape", ["x", "shape"], ["y"], name="reshape")],
        [value("x", FLOAT, ["rows", 16]), value("shape", INT64, [2])],
        [value("y", FLOAT, ["a", "b"])],
    )


def shape_output() -> onnx.ModelProto:
    """An output, `s`, that TensorRT computes on the host."""
    return model(
        [helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Relu", ["x"], ["y"])],
        [value("x", FLOAT, ["rows", 16])],
        [value("s", INT64, [2]), value("y", FLOAT, ["rows", 16])],
    )


def through_int16() -> onnx.ModelProto:
    """A type that TensorRT lacks inside the graph, of which its libraries complain past their logger."""
    return model(
        [
            helper.make_node("Cast", ["x"], ["z"], to=TensorProto.INT16),
            helper.make_node("Cast", ["z"], ["y"], to=FLOAT),
        ],
        [value("x", FLOAT, [4])],
        [value("y", FLOAT, [4])],
    )


def every_dtype() -> onnx.ModelProto:
    """Inputs and outputs of every type that ONNX Runtime and TensorRT both have, a scalar among them."""
    nodes = [
        helper.make_node("Cast", ["u8"], ["u8f"], to=FLOAT),
        helper.make_node("Cast", ["b"], ["bf"], to=FLOAT),
        helper.make_node("Cast", ["i64"], ["i64f"], to=FLOAT),
        helper.make_node("Cast", ["i32"], ["i32f"], to=FLOAT),
        helper.make_node("Cast", ["f16"], ["f16f"], to=FLOAT),
        helper.make_node("Sum", ["u8f", "bf", "i64f", "i32f", "f16f"], ["sum"]),
        helper.make_node("Mul", ["sum", "scale"], ["f32_out"]),
        helper.make_node("Greater", ["sum", "u8f"], ["b_out"]),
        helper.make_node("Cast", ["sum"], ["f16_out"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["sum"], ["i32_out"], to=TensorProto.INT32),
        helper.make_node("Cast", ["sum"], ["i64_out"], to=INT64),
        helper.make_node("Abs", ["sum"], ["positive"]),
        helper.make_node("Cast", ["positive"], ["u8_out"], to=TensorProto.UINT8),
    ]
    inputs = {"u8": TensorProto.UINT8, "b": TensorProto.BOOL, "i64": INT64, "i32": TensorProto.INT32,
              "f16": TensorProto.FLOAT16}  # fmt: skip
    outputs = {"f32_out": FLOAT, "b_out": TensorProto.BOOL, "f16_out": TensorProto.FLOAT16,
               "i32_out": TensorProto.INT32, "i64_out": INT64, "u8_out": TensorProto.UINT8}  # fmt: skip
    return model(
        nodes,
        [*(value(name, kind, ["batch", 4]) for name, kind in inputs.items()), value("scale", FLOAT, [])],
        [value(name, kind, ["batch", 4]) for name, kind in outputs.items()],
    )


def every_dtype_feeds(count: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(count)
    return {
        "u8": random.integers(0, 100, (count, 4)).astype(np.uint8),
        "b": random.random((count, 4)) > 0.5,
        "i64": random.integers(-9, 9, (count, 4)),
        "i32": random.integers(-9, 9, (count, 4)).astype(np.int32),
        "f16": random.standard_normal((count, 4)).astype(np.float16),
        "scale": np.array(2.5, np.float32),
    }


def bfloat16_product() -> onnx.ModelProto:
    weights = np.random.default_rng(1).standard_normal(16 * 8).astype(np.float32)
    return model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [value("x", TensorProto.BFLOAT16, ["batch", 16])],
        [value("y", TensorProto.BFLOAT16, ["batch", 8])],
        [helper.make_tensor("w", TensorProto.BFLOAT16, (16, 8), weights)],
    )


def wide_product() -> onnx.ModelProto:
    """y = x @ w in float64."""
    return model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        [value("x", TensorProto.DOUBLE, ["batch", 4])],
        [value("y", TensorProto.DOUBLE, ["batch", 512])],
        [constant("w", np.random.default_rng(1).standard_normal((4, 512)))],
    )


def rarely_alive() -> onnx.ModelProto:
    """y = x @ w + relu(x @ w - 100) @ v, of which the second part is 0 for all but large x."""
    random = np.random.default_rng(3)
    return model(
        [
            helper.make_node("MatMul", ["x", "w"], ["seen"], name="seen_product"),
            helper.make_node("Sub", ["seen", "far"], ["below"], name="shift"),
            helper.make_node("Relu", ["below"], ["dead"], name="relu"),
            helper.make_node("MatMul", ["dead", "v"], ["rare"], name="dead_product"),
            helper.make_node("Add", ["rare", "seen"], ["y"], name="sum"),
        ],
        [value("x", FLOAT, ["batch", 16])],
        [value("y", FLOAT, ["batch", 8])],
        [
            constant("w", random.standard_normal((16, 8)).astype(np.float32)),
            constant("v", random.standard_normal((8, 8)).astype(np.float32)),
            constant("far", np.float32(100)),
        ],
    )


def external(path, folder="") -> onnx.ModelProto:
    """Save `product` with its weights in an external file beside it, and return it as it was before."""
    kept = product()
    location = f"{folder}weights.bin"
    (path.parent / location).parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(product(), path, save_as_external_data=True, location=location, size_threshold=0)
    return kept


VOCABULARY, WIDTH, HEADS, LONGEST = 97, 32, 4, 64


def transformer(layers: int = 2) -> onnx.ModelProto:
    """A BERT-like encoder: `input_ids` and `attention_mask`, int64 [batch, sequence], to hidden states and a score."""
    random = np.random.default_rng(7)
    initializers: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def weight(name: str, *shape: int, scale: float = 0.3) -> str:
        initializers.append(constant(name, (random.standard_normal(shape) * scale).astype(np.float32)))
        return name

    def node(operator: str, inputs: list[str], name: str, **attributes) -> str:
        nodes.append(helper.make_node(operator, inputs, [name], name=f"{name}_node", **attributes))
        return name

    initializers += [
        constant("one", np.float32(1)),
        constant("masked", np.float32(-10000)),
        constant("mask_axes", np.array([1, 2])),
        constant("heads_shape", np.array([0, 0, HEADS, WIDTH // HEADS])),
        constant("joined_shape", np.array([0, 0, WIDTH])),
        constant("head_scale", np.float32((WIDTH // HEADS) ** -0.5)),
        constant("zero", np.array([0])),
        constant("axis_1", np.array([1])),
        constant("ones", np.ones(WIDTH, np.float32)),
        constant("zeros", np.zeros(WIDTH, np.float32)),
    ]
    tokens = node("Gather", [weight("tokens", VOCABULARY, WIDTH, scale=1), "input_ids"], "token_rows")
    sequence = node("Slice", [node("Shape", ["input_ids"], "ids_shape"), "axis_1", "two", "zero"], "sequence_length")
    initializers.append(constant("two", np.array([2])))
    positions = node(
        "Slice", [weight("positions", LONGEST, WIDTH, scale=0.5), "zero", sequence, "zero"], "position_rows"
    )
    hidden = node("Add", [tokens, positions], "embedded")
    mask = node("Cast", ["attention_mask"], "mask_float", to=FLOAT)
    mask = node("Mul", [node("Sub", ["one", mask], "inverse_mask"), "masked"], "mask_bias")
    mask = node("Unsqueeze", [mask, "mask_axes"], "mask_4d")
    for index in range(layers):
        p = f"layer{index}_"
        query, key, values = (
            node("Transpose", [
                node("Reshape", [
                    node("MatMul", [hidden, weight(f"{p}{part}_weight", WIDTH, WIDTH)], f"{p}{part}"), "heads_shape",
                ], f"{p}{part}_split"),
            ], f"{p}{part}_heads", perm=perm)
            for part, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3]))
        )  # fmt: skip
        scores = node("Mul", [node("MatMul", [query, key], f"{p}products"), "head_scale"], f"{p}scores")
        attention = node("Softmax", [node("Add", [scores, mask], f"{p}masked")], f"{p}attention", axis=-1)
        context = node(
            "Transpose", [node("MatMul", [attention, values], f"{p}mixed")], f"{p}context", perm=[0, 2, 1, 3]
        )
        context = node("Reshape", [context, "joined_shape"], f"{p}joined")
        context = node("MatMul", [context, weight(f"{p}out", WIDTH, WIDTH)], f"{p}projected")
        hidden = node("LayerNormalization", [node("Add", [hidden, context], f"{p}sum1"), "ones", "zeros"], f"{p}norm1")
        inner = node("Relu", [node("MatMul", [hidden, weight(f"{p}up", WIDTH, 4 * WIDTH)], f"{p}wide")], f"{p}relu")
        inner = node("MatMul", [inner, weight(f"{p}down", 4 * WIDTH, WIDTH)], f"{p}narrow")
        hidden = node("LayerNormalization", [node("Add", [hidden, inner], f"{p}sum2"), "ones", "zeros"], f"{p}norm2")
    node("Identity", [hidden], "hidden")
    first = node("Gather", [hidden, "first_index"], "first", axis=1)
    initializers.append(constant("first_index", np.array(0)))
    node("MatMul", [first, weight("classes", WIDTH, 3)], "logits")
    return model(
        nodes,
        [value("input_ids", INT64, ["batch", "sequence"]), value("attention_mask", INT64, ["batch", "sequence"])],
        [value("hidden", FLOAT, ["batch", "sequence", WIDTH]), value("logits", FLOAT, ["batch", 3])],
        initializers,
    )


def sentences(count: int, length: int) -> dict[str, np.ndarray]:
    """Random token ids; each row is masked from another position on."""
    random = np.random.default_rng(count * 1000 + length)
    lengths = random.integers(max(1, length // 2), length + 1, count)
    return {
        "input_ids": random.integers(0, VOCABULARY, (count, length)),
        "attention_mask": (np.arange(length) < lengths[:, None]).astype(np.int64),
    }


def doubled(dtype: int, *row: int) -> onnx.ModelProto:
    """y = 2 x, in float32: what reached a model with an input of this type, whose rows have this shape."""
    shape = ["batch", *row]
    return model(
        [helper.make_node("Cast", ["x"], ["numbers"], to=FLOAT), helper.make_node("Mul", ["numbers", "two"], ["y"])],
        [value("x", dtype, shape)],
        [value("y", FLOAT, shape)],
        [constant("two", np.float32(2))],
    )


WEIGHTS = (np.random.default_rng(5).standard_normal((16, 16)) / 4).astype(np.float32)


def quantized(zero, *, opset=17, scale=0.02, outputs=(), **attributes) -> onnx.ModelProto:
    """x → Q → DQ → MatMul, with this zero point, or none."""
    names = ["scale"] if zero is None else ["scale", "zero"]
    made = model(
        [
            helper.make_node("QuantizeLinear", ["x", *names], ["q"], name="quantize", **attributes),
            helper.make_node("DequantizeLinear", ["q", *names], ["d"], name="dequantize"),
            helper.make_node("MatMul", ["d", "w"], ["y"], name="product"),
        ],
        [value("x", FLOAT, ["batch", 16])],
        [value("y", FLOAT, ["batch", 16]), *outputs],
        [constant("scale", np.float32(scale)), constant("w", WEIGHTS)]
        + ([] if zero is None else [constant("zero", zero)]),
    )
    made.opset_import[0].version = opset
    return made
