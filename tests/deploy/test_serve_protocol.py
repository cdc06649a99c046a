"""Bodies of the Open Inference Protocol, written and read by Triton's client, and malformed ones; without a server."""

from __future__ import annotations

import json
import random

import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import np_to_triton_dtype

from mlflow_trt.core import open_inference as oip
from mlflow_trt.core.types import TensorSpec
from mlflow_trt.deploy.serve.protocol import Signature, make_answer, parse_request
from mlflow_trt.errors import InputDtypeError, InputError, InputShapeError, UnsupportedModelError

EDGES = {
    "bool": [True, False, True],
    **{name: [np.iinfo(name).min, 0, np.iinfo(name).max] for name in oip.DATATYPES if "int" in name},
    "float16": [0.1, -65504, float("inf")],
    "float32": [0.1, -3.4e38, float("nan")],
    "float64": [0.1, -1.7e308, float("-inf")],
    "bfloat16": [0.1, -3e38, float("inf")],
}
SHAPES = [(3,), (1, 3), (3, 1, 1), (0, 3), ()]


def array_of(dtype, shape):
    values = np.array(EDGES[dtype], oip.dtype_of(oip.DATATYPES[dtype]))
    return np.resize(values, shape) if shape else values[1:2].reshape(())


def request(*tensors, outputs=None, binary=True, **more):
    """A body as Triton's client writes it, and the length of its header."""
    inputs = []
    for name, array in tensors:
        made = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        inputs.append(made.set_data_from_numpy(array, binary_data=binary))
    return triton.InferenceServerClient.generate_request_body(inputs, outputs=outputs, **more)


def signature(*specs):
    tensors = tuple(TensorSpec(name=name, dtype=dtype, shape=shape) for name, dtype, shape in specs)
    return Signature(
        inputs=tensors, outputs=tuple(TensorSpec(name=f"{s.name}_out", dtype=s.dtype, shape=s.shape) for s in tensors)
    )


def parse(body, length, of):
    return parse_request(memoryview(body), length, of)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", oip.DATATYPES)
@pytest.mark.parametrize("binary", [True, False])
def test_every_dtype_there_and_back(dtype, shape, binary):
    array = array_of(dtype, shape)
    if binary and np_to_triton_dtype(array.dtype) is None:
        pytest.skip("older clients of Triton know no bfloat16 of ml_dtypes")
    of = signature(("x", dtype, (None,) * len(shape)))
    if binary or dtype not in ("bfloat16", "float16"):
        body, length = request(("x", array), binary=binary)
    else:  # which Triton's client sends as binary only
        tensor = {"name": "x", "datatype": oip.DATATYPES[dtype], "shape": list(shape), "data": oip.listed(array)}
        body, length = json.dumps({"inputs": [tensor]}).encode(), None
    asked = parse(body, length, of)
    assert asked.feeds["x"].dtype == array.dtype
    assert asked.feeds["x"].shape == array.shape
    assert asked.feeds["x"].tobytes() == array.tobytes()

    answer = make_answer(asked, "m", "1", {"x_out": array})
    assert (answer.header_length is None) != (asked.binary)
    found = triton.InferenceServerClient.parse_response_body(
        b"".join(answer.parts), header_length=answer.header_length
    ).as_numpy("x_out")
    assert found.shape == array.shape
    assert found.astype(array.dtype).tobytes() == array.tobytes()


def test_tensors_lie_where_processors_read_them():
    arrays = [("a", np.array([1, 2, 3], np.uint8)), ("b", np.array([0.5, 0.25]))]
    body, length = request(*arrays)
    asked = parse(body, length, signature(("a", "uint8", (3,)), ("b", "float64", (2,))))
    assert all(array.flags.aligned for array in asked.feeds.values())
    assert all(np.array_equal(asked.feeds[name], array) for name, array in arrays)


def test_rows_as_bytes():
    cells = np.array([np.arange(3, dtype=np.float32).tobytes(), np.ones(3, np.float32).tobytes()], dtype=object)
    spec = TensorSpec(name="x", dtype="float32", shape=(None, 3))
    of = Signature(inputs=(spec,), outputs=(), binary=frozenset({"x"}))
    body, length = request(("x", cells))
    assert parse(body, length, of).feeds["x"].tolist() == [[0, 1, 2], [1, 1, 1]]
    for broken in (body[:-1], body[:-14] + b"\xff\xff\xff\xff" + body[-10:]):
        with pytest.raises(InputError, match="'x'"):
            parse(broken, length, of)
    assert of.described()["inputs"] == [{"name": "x", "datatype": "BYTES", "shape": [-1]}]
    plain = Signature(inputs=(spec,), outputs=())
    assert parse(body, length, plain).feeds["x"].tolist() == [[0, 1, 2], [1, 1, 1]]
    assert plain.described()["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]


@pytest.mark.parametrize("byte", [2, 254, 255])
def test_bytes_that_are_no_bools(byte):
    """Of which ONNX Runtime computes that they are true, and not equal to true."""
    of = signature(("x", "bool", (None, 2)))
    body, length = request(("x", np.array([[True, False], [False, True]])))
    assert parse(body, length, of).feeds["x"].tolist() == [[True, False], [False, True]]
    with pytest.raises(InputDtypeError, match=r"input 'x', row 1: the value at \[1, 1\] is neither 0 nor 1"):
        parse(body[:-1] + bytes([byte]), length, of)


def test_a_type_that_the_protocol_does_not_have():
    with pytest.raises(UnsupportedModelError, match="'x' is of dtype float8_e4m3fn"):
        signature(("x", "float8_e4m3fn", (None,)))


X = signature(("x", "int32", (None, 2)), ("y", "float32", (None,)))
GOOD = [
    {"name": "x", "datatype": "INT32", "shape": [1, 2], "data": [1, 2]},
    {"name": "y", "datatype": "FP32", "shape": [1], "data": [77.125]},
]


def changed(index=0, **fields):
    tensors = [dict(tensor) for tensor in GOOD]
    tensors[index].update(fields)
    return {"inputs": [{key: value for key, value in tensor.items() if value is not ...} for tensor in tensors]}


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (changed(name="z"), InputError, "there is no input 'z'; the model wants x: int32"),
        (changed(name="z" * 9999), InputError, r"there is no input '(z{99})\.\.\.; the model wants"),
        (changed(name=["x"]), InputError, r"there is no input \['x'\]"),
        (changed(name=...), InputError, "there is no input None"),
        (changed(1, name="x", datatype="INT32", shape=[1, 2], data=[1, 2]), InputError, "'x' is there twice"),
        (changed(datatype="INT64"), InputDtypeError, "'x' has the datatype 'INT64'; expected INT32"),
        (changed(datatype=...), InputDtypeError, "'x' has the datatype None"),
        (changed(datatype={}), InputDtypeError, "'x' has the datatype"),
        (changed(shape=[1, 3]), InputShapeError, r"'x' has 2 elements, and a shape of \[1, 3\]"),
        (changed(shape=[-1, 2]), InputShapeError, "'x' has no shape"),
        (changed(shape=[True, 2]), InputShapeError, "'x' has no shape"),
        (changed(shape="12"), InputShapeError, "'x' has no shape"),
        (changed(shape=...), InputShapeError, "'x' has no shape"),
        (changed(shape=[1] * 99 + [2]), InputShapeError, "'x'"),
        (changed(shape=[0, 2**62], data=[]), InputShapeError, "'x'"),
        (changed(shape=[2**70]), InputShapeError, "'x'"),
        (changed(shape=[0, 10**400], data=[]), InputShapeError, "'x' has no shape"),
        (changed(data=...), InputError, "'x' has no data"),
        (changed(data=5), InputError, "'x': data is no list"),
        (changed(data=[1, 2.0]), InputDtypeError, "'x': an element is not an integer"),
        (changed(data=[True, False]), InputDtypeError, "'x': an element is not an integer"),
        (changed(data=[True, 2]), InputDtypeError, "'x': an element is not an integer"),
        (changed(1, data=[True, 0.5], shape=[2]), InputDtypeError, "'y': an element is not a number"),
        (changed(shape=[2, 2], data=[[1, 2], [3, False]]), InputDtypeError, "'x': an element is not an integer"),
        (changed(data=["1", "2"]), InputDtypeError, "'x': an element is not an integer"),
        (changed(data=[1, None]), InputDtypeError, "'x': an element is not an integer"),
        (changed(data=[1, 2**31]), InputDtypeError, r"'x'.*: the value at \[1\] cannot be represented in int32"),
        (changed(data=[1, 2**70]), InputDtypeError, "'x': an element is not an integer"),
        (changed(data=[[1], [2, 3]]), InputShapeError, "'x' is no regular array"),
        (changed(1, data=["77.125"]), InputDtypeError, "'y': an element is not a number"),
        (changed(1, data=[1e39]), InputDtypeError, r"'y'.*: the value at \[0\] is too large for float32"),
        (changed(parameters=[]), InputError, "the parameters of input 'x' are no JSON object"),
        (changed(parameters={"binary_data_size": 8}), InputError, "'x': binary_data_size is 8, and 0 bytes are left"),
        (changed(parameters={"binary_data_size": -8}), InputError, "'x': binary_data_size is -8"),
        (changed(parameters={"shared_memory_region": "r"}), InputError, "'x' is in shared memory, which this server"),
        ({"inputs": {}}, InputError, "inputs is no list of JSON objects"),
        ({"inputs": [1]}, InputError, "inputs is no list of JSON objects"),
        ([], InputError, "the body is no JSON object"),
        ({**changed(), "id": 5}, InputError, "id is no string"),
        ({**changed(), "parameters": 5}, InputError, "the parameters of the request are no JSON object"),
        ({**changed(), "parameters": {"timeout": "soon"}}, InputError, "timeout of the request"),
        ({**changed(), "parameters": {"timeout": 10**400}}, InputError, "timeout of the request"),
        ({**changed(), "parameters": {"binary_data_output": 1}}, InputError, "neither true nor false"),
        ({**changed(), "outputs": [{"name": "x"}]}, InputError, "there is no output 'x'; the model has x_out"),
        ({**changed(), "outputs": [{"name": "x_out"}] * 2}, InputError, "output 'x_out' is asked for twice"),
        ({**changed(), "outputs": [{"name": "x_out", "parameters": {"classification": 3}}]}, InputError, "classify"),
    ],
)  # fmt: skip
def test_what_is_refused(body, error, message):
    with pytest.raises(error, match=message) as caught:
        parse(json.dumps(body).encode(), None, X)
    assert "77.125" not in caught.value.message


def test_a_number_that_no_float_holds_is_not_infinity():
    """orjson refuses it as it does NaN and Infinity, which Python's JSON reads, and takes 1e400 for."""
    text = json.dumps(changed(1, data=[5]))
    for written, read in (("-Infinity", -np.inf), ("NaN", np.nan), ("3.4e38", np.float32(3.4e38))):
        found = parse(text.replace("[5]", f"[{written}]").encode(), None, X).feeds["y"]
        assert np.array_equal(found, np.array([read], np.float32), equal_nan=True)
    for written in ("1e400", "-1e400", "1" * 400 + ".5"):
        with pytest.raises(InputError, match="too large for a float of 64 bits"):
            parse(text.replace("[5]", f"[{written}]").encode(), None, X)


def test_integers_beyond_int64():
    of = signature(("x", "uint64", (None,)))
    body, length = request(("x", np.array([1, 2**63, 2**64 - 1], np.uint64)), binary=False)
    assert parse(body, length, of).feeds["x"].tolist() == [1, 2**63, 2**64 - 1]
    for data in ([1.5, 2**63], [-1, 2**63], [1, 2**64]):
        tensor = {"name": "x", "datatype": "UINT64", "shape": [2], "data": data}
        with pytest.raises(InputDtypeError, match="'x'"):
            parse(json.dumps({"inputs": [tensor]}).encode(), None, of)


@pytest.mark.parametrize("length", [0, -1, 1, 10, 10**18])
def test_headers_of_another_length(length):
    body, right = request(("x", np.zeros((1, 2), np.int32)), ("y", np.zeros(1, np.float32)))
    assert parse(body, right, X).feeds.keys() == {"x", "y"}
    with pytest.raises(InputError):
        parse(body, length, X)


@pytest.mark.parametrize("change", [-4, -1, 1, 4])
def test_bodies_that_are_too_short_or_too_long(change):
    body, length = request(("x", np.zeros((1, 2), np.int32)), ("y", np.zeros(1, np.float32)))
    body = body[:change] if change < 0 else body + b"\0" * change
    with pytest.raises(InputError, match="'y': binary_data_size is 4|belong to no input"):
        parse(body, length, X)


def test_malformed_bodies_in_bulk():
    """Bytes exchanged, cut out and put in at random: each is parsed or refused, and nothing else happens."""
    chance = random.Random(1)
    body, length = request(
        ("x", np.arange(8, dtype=np.int32).reshape(4, 2)), ("y", np.zeros(4, np.float32)), request_id="an id"
    )
    refused = 0
    for _ in range(5000):
        broken = bytearray(body)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(length + 4)
            what = chance.randrange(3)
            if what == 0:
                broken[at : at + 1] = bytes([chance.randrange(256)])
            elif what == 1:
                del broken[at : at + chance.randint(1, 9)]
            else:
                broken[at:at] = chance.choice([b"{", b"[" * 70, b'"', b"-1", b"1e9", b"null,", b"\xff", b"\\ud800"])
        told = length if chance.random() < 0.8 else chance.randrange(len(broken) * 2)
        try:
            asked = parse(bytes(broken), told, X)
        except InputError:
            refused += 1
        else:
            outputs = {"x_out": np.zeros((1, 2), np.int32), "y_out": np.zeros(1, np.float32)}
            assert make_answer(asked, "m", "1", outputs).size > 0
    assert refused > 4000


def test_numbers_that_are_none_in_json():
    """orjson would write null."""
    body, length = request(("x", np.zeros((1, 2), np.int32)), binary=False)
    answer = make_answer(parse(body, length, X), "m", "1", {})
    assert json.loads(answer.parts[0])["outputs"] == []
    asked = parse(json.dumps({**changed(), "id": "\ud800"}).encode(), None, X)
    answer = make_answer(asked, "m", "1", {"y_out": np.array([np.nan, np.inf, 1], ml_dtypes.bfloat16)})
    assert answer.parts[0].endswith(b'"data": [NaN, Infinity, 1.0]}]}')
    assert json.loads(answer.parts[0])["id"] == "\ud800"
