"""The client of `mlflow models serve`: what it sends, what it makes of answers, and when it tries again."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import ml_dtypes
import mlflow
import networks
import numpy as np
import pandas as pd
import pytest
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema, TensorSpec
from servers import served

import mlflow_trt
from examples.serving import free_port
from mlflow_trt.client import AsyncClient, Client
from mlflow_trt.core import wire
from mlflow_trt.errors import (
    InputDtypeError,
    InputError,
    InputShapeError,
    OptionError,
    OutOfMemoryError,
    ServerError,
    ServerTimeoutError,
    ServerUnavailableError,
)

CPU = {"runtime": "onnxruntime"}
RANKS_DTYPES = {"scaled": "float32", "sums": "float32", "total": "float32", "doubled": "int64"}


@contextmanager
def scripted(*answers, silent=False, signatures=(b"{}",)):
    """A server that gives these (status, headers, body) one after the other, then the last one; and what it got.

    Whoever asks for the signature gets one of those in the same way, which is not counted. A silent one answers nothing
    else before the block ends.
    """
    remaining = list(answers)
    signatures = [(400, {}, signature) for signature in signatures]
    received = []
    ends = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # the body is written after the headers

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            left = signatures if body == wire.signature_request().content else remaining
            if left is remaining:
                received.append((self.headers["content-type"], body))
                if silent:
                    ends.wait()
            status, headers, content = left.pop(0) if len(left) > 1 else left[0]
            if status is None:
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(BrokenPipeError):  # the client waited for no answer
                self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=[0.02])  # seconds between looks whether it is to end
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        ends.set()
        server.shutdown()
        server.server_close()
        thread.join()


GOOD = (200, {}, b'{"predictions": {"y": [[1.5, 2.5]]}}')
BUSY = (503, {}, b"busy")
HANGS_UP = (None, {}, b"")
ROW = {"x": np.ones((1, 2), np.float32)}


class TestWire:
    def test_what_goes_as_a_table(self):
        rows = np.zeros((3, 2, 4), np.float32)
        assert wire.fits_table({"a": rows, "b": np.arange(3)})
        assert wire.fits_table({"a": rows, "b": [b"1", b"2", b"3"]})
        assert not wire.fits_table({"a": rows, "b": np.arange(4)})
        assert not wire.fits_table({"a": rows, "b": np.float32(1)})
        assert not wire.fits_table({"a": rows.tolist()})
        assert not wire.fits_table({"a": rows[:0]})

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "uint8", "int32", "int64", "bool"])
    def test_tables_keep_numbers_and_dtypes(self, dtype):
        array = (np.random.default_rng(0).standard_normal((5, 2, 3)) * 50).astype(dtype)
        request = wire.parquet_request({"x": array, "bytes": [b"a\0", b"", b"c", b"d", b"e"], "n": np.arange(5)})
        frame = pd.read_parquet(io.BytesIO(request.content))
        cells = np.stack(frame["x"].tolist())
        assert cells.dtype == array.dtype
        assert np.array_equal(cells.reshape(array.shape), array)
        assert frame["bytes"].tolist() == [b"a\0", b"", b"c", b"d", b"e"]
        assert frame["n"].tolist() == [0, 1, 2, 3, 4]

    def test_arrays_of_another_byte_order(self):
        array = np.arange(6, dtype=">f4").reshape(2, 3)
        frame = pd.read_parquet(io.BytesIO(wire.parquet_request({"x": array, "n": np.arange(2, dtype=">i8")}).content))
        assert np.stack(frame["x"].tolist()).tolist() == array.tolist()
        assert frame["n"].tolist() == [0, 1]

    def test_bfloat16_goes_as_float32_and_what_does_not_go(self):
        array = np.ones((2, 2), ml_dtypes.bfloat16)
        assert json.loads(wire.json_request({"x": array}).content) == {"inputs": {"x": [[1, 1], [1, 1]]}}
        with pytest.raises(InputDtypeError, match="input 'x' is of dtype <U1; expected numbers"):
            wire.json_request({"x": ["a"]})
        for request in (wire.json_request, wire.parquet_request):
            with pytest.raises(InputError, match="these inputs do not fit a table"):
                request({"x": [b"a", b"b"], "k": np.ones(3)})
        with pytest.raises(InputShapeError, match=r"'x' has the shape \(0, 3\), which JSON cannot tell; send one row"):
            wire.json_request({"x": np.zeros((0, 3), np.float32)})
        with pytest.raises(InputError, match="input 'x' is no regular array"):
            wire.json_request({"x": [[1], [2, 3]]})
        for request in (wire.json_request, wire.parquet_request):
            assert request({"x": np.ma.masked_array([1, 2], [False, False])})
            with pytest.raises(InputDtypeError, match=r"input 'x', row 1: the value at \[1\] is missing"):
                request({"x": np.ma.masked_array([1, 2], [False, True])})

    @pytest.mark.parametrize("array", [
        np.array([[1.5, np.nan, -np.inf]], np.float32), np.zeros((0, 4), np.int64), np.array(3, np.uint8),
        np.array([True, False]), np.arange(6, dtype=">f4").reshape(2, 3), np.arange(4, dtype=np.float16),
    ])  # fmt: skip
    def test_packed_answers_keep_everything(self, array):
        from mlflow.utils.proto_json_utils import NumpyEncoder

        answer = json.dumps({"predictions": {"y": wire.packed(array)}}, cls=NumpyEncoder)
        decoded = wire.decode_answer(answer.encode())["y"]
        assert (decoded.dtype.name, decoded.shape) == (array.dtype.name, array.shape)
        assert np.array_equal(decoded, array, equal_nan=array.dtype.kind == "f")
        assert decoded.flags.writeable

    def test_answers_of_other_forms(self):
        records = b'{"predictions": [{"y": [1, 2], "n": 3}, {"y": [4, 5], "n": 6}]}'
        answer = wire.decode_answer(records, {"y": "float32"})
        assert answer["y"].tolist() == [[1, 2], [4, 5]]
        assert (answer["y"].dtype, answer["n"].dtype) == (np.float32, np.int64)
        assert wire.decode_answer(b'{"predictions": [0.5]}')["predictions"].tolist() == [0.5]
        packed = b'{"predictions": {"y": {"dtype": "object", "shape": [1], "base64": "AAAA"}}}'
        for body in (b"<html>", b'{"rows": 1}', b'{"predictions": [[1], [2, 3]]}', packed):
            with pytest.raises(ServerError, match="the answer is none of MLflow's scoring server"):
                wire.decode_answer(body)

    def test_errors_quote_no_data(self):
        text = (
            "Failed to predict data '{'x': array([[123.25]])}'. \nError: Failed to enforce schema of data "
            "'{'x': array([[123.25]])}' with schema '['x': Tensor('float32', (-1, 2))]'. Error: Shape of input (1, 1)"
        )
        error = wire.error_of(400, json.dumps({"error_code": "BAD_REQUEST", "message": text}).encode())
        assert isinstance(error, InputError)
        assert error.message == (
            "the server refused the input: Shape of input (1, 1) The model wants ['x': Tensor('float32', (-1, 2))]"
        )
        assert "secret" not in wire.error_of(400, b'{"message": "no JSON\\nInput: \\nsecret"}').message

    @pytest.mark.parametrize(
        ("status", "kind"),
        [(400, InputError), (413, InputError), (429, OutOfMemoryError), (500, ServerError), (504, ServerTimeoutError)],
    )
    def test_errors_by_status(self, status, kind):
        error = wire.error_of(status, b"<html>so long</html>")
        assert type(error) is kind
        assert "so long" in error.message


class TestTryingAgain:
    def test_a_busy_server(self):
        with scripted(BUSY, BUSY, GOOD) as (address, received), Client(address, backoff=0.01) as client:
            assert client.predict(ROW)["y"].tolist() == [[1.5, 2.5]]
        assert [content_type for content_type, _ in received] == [wire.PARQUET] * 3
        assert len({body for _, body in received}) == 1

    def test_a_server_that_hangs_up(self):
        with scripted(HANGS_UP, GOOD) as (address, received), Client(address, backoff=0.01) as client:
            assert client.predict(ROW)["y"].shape == (1, 2)
        assert len(received) == 2
        with (
            scripted(HANGS_UP) as (address, _),
            Client(address, retries=1, backoff=0.01) as client,
            pytest.raises(ServerUnavailableError, match="broke the connection off after 2 attempts .*raise retries="),
        ):
            client.predict(ROW)

    def test_until_the_retries_are_used_up(self):
        with (
            scripted(BUSY) as (address, received),
            Client(address, retries=2, backoff=0.01) as client,
            pytest.raises(ServerError, match="the server answered 503: busy") as caught,
        ):
            client.predict(ROW)
        assert (len(received), caught.value.status) == (3, 503)

    def test_as_long_as_the_server_asks_for(self):
        with scripted((429, {"retry-after": "1"}, b""), GOOD) as (address, _), Client(address, backoff=0) as client:
            started = time.monotonic()
            client.predict(ROW)
        assert time.monotonic() - started >= 1

    def test_not_what_cannot_succeed(self):
        with (
            scripted((500, {}, b"broken")) as (address, received),
            Client(address, backoff=0.01) as client,
            pytest.raises(ServerError, match="500: broken"),
        ):
            client.predict(ROW)
        assert len(received) == 1

    def test_not_after_a_timeout(self):
        with (
            scripted(GOOD, silent=True) as (address, received),
            Client(address, timeout=1) as client,
            pytest.raises(ServerTimeoutError, match="no answer in time .ReadTimeout.*raise timeout="),
        ):
            client.predict(ROW)
        assert len(received) == 1

    def test_no_server(self):
        with Client(f"http://127.0.0.1:{free_port()}", retries=1, backoff=0.01) as client:
            assert not client.ping()
            with pytest.raises(ServerUnavailableError, match="no server answers after 2 attempts .ConnectError"):
                client.predict(ROW)
            with pytest.raises(ConnectionError):
                client.predict(ROW)

    def test_asynchronously(self):
        async def predict(address):
            async with AsyncClient(address, backoff=0.01, retries=1) as client:
                return await client.predict(ROW)

        with scripted(BUSY, GOOD) as (address, received):
            assert asyncio.run(predict(address))["y"].tolist() == [[1.5, 2.5]]
            assert len(received) == 2
        with scripted(BUSY) as (address, _), pytest.raises(ServerError, match="503"):
            asyncio.run(predict(address))
        with pytest.raises(ServerUnavailableError):
            asyncio.run(predict(f"http://127.0.0.1:{free_port()}"))


class TestFallingBack:
    def test_a_server_too_old_for_parquet_gets_json_from_then_on(self):
        too_old = (415, {}, b"This predictor only supports ...")
        with scripted(too_old, GOOD) as (address, received), Client(address) as client:
            client.predict(ROW)
            client.predict(ROW)
        assert [content_type for content_type, _ in received] == [wire.PARQUET, wire.JSON, wire.JSON]
        assert json.loads(received[1][1]) == {"inputs": {"x": [[1, 1]]}}

    def test_insisting(self):
        with scripted((415, {}, b"no parquet"), GOOD) as (address, received):
            with Client(address, wire_format="parquet") as client, pytest.raises(ServerError, match="415: no parquet"):
                client.predict(ROW)
            with Client(address, wire_format="json") as client:
                client.predict(ROW)
        assert [content_type for content_type, _ in received] == [wire.PARQUET, wire.JSON]

    @pytest.mark.parametrize(
        "options",
        [{"wire_format": "arrow"}, {"retries": -1}, {"backoff": -0.5}, {"timeout": -1}, {"address": "127.0.0.1:1"}],
    )
    def test_options_that_make_no_sense(self, options):
        with pytest.raises(OptionError, match=f"{next(iter(options))} is .*; expected"):
            Client(**{"address": "http://127.0.0.1:1", **options})

    @pytest.mark.parametrize("inputs", [{}, np.ones(3)])
    def test_inputs_have_names(self, inputs):
        with Client("http://127.0.0.1:1") as client, pytest.raises(InputError, match="expected a mapping"):
            client.predict(inputs)


def signature(*columns):
    text = f"Failed to enforce schema of data '{{}}' with schema '{Schema([*columns])}'. Error: Model is missing inputs"
    return json.dumps({"message": text}).encode()


def tensor(name, *shape):
    return TensorSpec(np.dtype("float32"), shape, name)


class TestShapes:
    def test_those_of_a_signature(self):
        columns = (tensor("x", -1, 3, 8), tensor("it's", -1), tensor('a"b', -1, -1))
        assert wire.signature_in(signature(*columns)) == {
            "x": ("float32", (-1, 3, 8)), "it's": ("float32", (-1,)), 'a"b': ("float32", (-1, -1)),
        }  # fmt: skip

    @pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"message": "Please check your input data."}',
                                      signature(ColSpec("binary", "x")), signature(tensor(None, -1, 3))])  # fmt: skip
    def test_a_server_that_tells_none(self, body):
        assert wire.signature_in(body) == {}
        with scripted(GOOD, signatures=[body]) as (address, received), Client(address) as client:
            client.predict(ROW)
        assert len(received) == 1

    @pytest.mark.parametrize("wire_format", ["auto", "parquet"])
    def test_rows_of_the_right_size_and_another_shape_are_not_sent(self, wire_format):
        with (
            scripted(GOOD, signatures=[signature(tensor("x", -1, 3, 8))]) as (address, received),
            Client(address, wire_format=wire_format) as client,
        ):
            client.predict({"x": np.ones((5, 3, 8), np.float32)})
            for shape in ((5, 8, 3), (5, 24), (120,)):
                with pytest.raises(InputShapeError, match=r"input 'x' has the shape .*wants \(-1, 3, 8\)"):
                    client.predict({"x": np.ones(shape, np.float32)})
        assert len(received) == 1

    def test_a_server_that_has_another_model_by_now(self):
        signatures = [signature(tensor("x", -1, 3, 8)), signature(tensor("x", -1, 8, 3))]
        with scripted(GOOD, signatures=signatures) as (address, received), Client(address) as client:
            client.predict({"x": np.ones((5, 3, 8), np.float32)})
            client.predict({"x": np.ones((5, 8, 3), np.float32)})
        assert len(received) == 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    mlflow_trt.save_model(networks.ranks(), folder / "ranks", batch=(1, 4, 8), verify=False)
    shapes = {"x": ((1, 1), (4, 4), (8, 8))}
    mlflow_trt.save_model(networks.scaled_by_a_scalar(), folder / "scalar", shapes=shapes, verify=False)
    signature = ModelSignature(inputs=Schema([ColSpec("binary", "image")]))
    mlflow_trt.save_model(networks.pixels(), folder / "bytes", batch=(1, 4, 8), verify=False, signature=signature)
    return folder


@pytest.fixture(scope="module")
def ranks_server(folders, module_store):
    with served(str(folders / "ranks"), module_store.uri, CPU) as address:
        yield address


@pytest.fixture(scope="module")
def packing_server(folders, module_store):
    with served(str(folders / "bytes"), module_store.uri, {**CPU, "answers": "base64"}) as address:
        yield address


def same(outputs, expected, dtypes=None):
    assert outputs.keys() == expected.keys()
    for name, array in expected.items():
        assert outputs[name].shape == array.shape
        assert outputs[name].dtype == (dtypes or {}).get(name, array.dtype)
        assert np.array_equal(outputs[name], array)


def run_here(folder, feeds):
    with mlflow_trt.load_model(str(folder), runtime="onnxruntime") as session:
        return session.run(feeds)


class TestAgainstMlflow:
    @pytest.mark.parametrize("count", [1, 7])
    @pytest.mark.parametrize("wire_format", ["parquet", "json"])
    def test_several_inputs_of_several_ranks(self, wire_format, count, ranks_server, folders):
        feeds = networks.ranks_feeds(count)
        expected = run_here(folders / "ranks", feeds)
        with Client(ranks_server, wire_format=wire_format, output_dtypes=RANKS_DTYPES) as client:
            assert client.ping()
            same(client.predict(feeds), expected)
        with Client(ranks_server, wire_format=wire_format) as client:
            same(client.predict(feeds), expected, dict.fromkeys(("scaled", "sums", "total"), np.float64))

    def test_lists(self, ranks_server, folders):
        feeds = networks.ranks_feeds(2)
        with Client(ranks_server, output_dtypes=RANKS_DTYPES) as client:
            outputs = client.predict({name: array.tolist() for name, array in feeds.items()})
        same(outputs, run_here(folders / "ranks", feeds))

    def test_asynchronously(self, ranks_server, folders):
        batches = [networks.ranks_feeds(count) for count in range(1, 9)]

        async def predict():
            async with AsyncClient(ranks_server, output_dtypes=RANKS_DTYPES) as client:
                assert await client.ping()
                return await asyncio.gather(*(client.predict(feeds) for feeds in batches))

        for feeds, outputs in zip(batches, asyncio.run(predict()), strict=True):
            same(outputs, run_here(folders / "ranks", feeds))

    def test_arrays_of_one_dimension_and_another_dtype(self, ranks_server, folders):
        """MLflow would cast numbers to the signature's dtype: 1.5 to 1, and NaN to whatever it becomes."""
        feeds = networks.ranks_feeds(3)
        with Client(ranks_server, output_dtypes=RANKS_DTYPES) as client:
            for count in (np.array([1.5, 2, 3]), np.array([1, np.nan, 3])):
                with pytest.raises(InputError, match="column .count., row [01]: the value is (missing|no whole)"):
                    client.predict({**feeds, "count": count})
            expected = run_here(folders / "ranks", feeds)
            same(client.predict({**feeds, "count": feeds["count"].astype(np.int8)}), expected)
            same(
                client.predict({name: array[:1] for name, array in feeds.items()}),
                run_here(folders / "ranks", {name: array[:1] for name, array in feeds.items()}),
            )

    @pytest.mark.parametrize("wire_format", ["parquet", "json"])
    def test_what_the_model_does_not_want(self, wire_format, ranks_server):
        feeds = networks.ranks_feeds(2)
        with Client(ranks_server, wire_format=wire_format) as client:
            with pytest.raises(InputError, match="input 'gain' is missing|has no column 'gain'"):
                client.predict({"image": feeds["image"], "count": feeds["count"]})
            for image in (feeds["image"][:, :, :2], feeds["image"].swapaxes(1, 2), feeds["image"].reshape(2, 6)):
                with pytest.raises(InputError, match=r"expected .*image: float32\[batch, 2, 3\]"):
                    client.predict({**feeds, "image": image})

    def test_images_of_uint8_without_a_server(self, tmp_path):
        """What the server does with the request: pandas reads it, and the model the shapes that came along."""
        mlflow_trt.save_model(networks.pixels(), tmp_path / "model", batch=(1, 4, 8), verify=False)
        model = mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config=CPU)
        images = np.random.default_rng(4).integers(0, 256, (5, 8, 6, 3), np.uint8)
        frame = pd.read_parquet(io.BytesIO(wire.parquet_request({"image": images}).content))
        assert np.allclose(model.predict(frame)["means"], images.mean((1, 2)), rtol=1e-6)

    def test_a_signature_of_tensors_that_fit_no_table(self, tmp_path):
        """What the server does with parquet where more than the first dimension varies, and MLflow enforces it."""
        shapes = {"x": ((1, 1), (4, 4), (8, 8))}
        mlflow_trt.save_model(
            networks.scaled_by_a_scalar(), tmp_path / "model", shapes=shapes, verify=False, signature=True
        )
        model = mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config=CPU)
        request = wire.parquet_request({"x": networks.rows(3, 5), "k": np.ones(3, np.float32)})
        with pytest.raises(mlflow.MlflowException) as caught:
            model.predict(pd.read_parquet(io.BytesIO(request.content)))
        answer = (400, {}, str(caught.value).encode())
        with scripted(answer, GOOD) as (address, received), Client(address) as client:
            client.predict(ROW)
        assert [content_type for content_type, _ in received] == [wire.PARQUET, wire.JSON]

    @pytest.mark.exhaustive
    def test_inputs_without_rows_in_common(self, folders, module_store):
        x = networks.rows(3, 5)
        settings = {**CPU, "answers": "base64"}
        with served(str(folders / "scalar"), module_store.uri, settings) as address, Client(address) as client:
            same(client.predict({"x": x, "k": np.float32(2.5)}), {"y": x * np.float32(2.5)})
            with pytest.raises(InputError, match="input 'k' has 1 dimensions, .*expected 0"):
                client.predict({"x": x, "k": np.ones(3, np.float32)})

    @pytest.mark.exhaustive
    def test_images_as_bytes_and_packed_answers(self, packing_server, folders):
        images = np.random.default_rng(3).integers(0, 256, (5, 8, 6, 3), np.uint8)
        expected = images.mean((1, 2)).astype(np.float32)
        with Client(packing_server) as client:
            answers = [
                client.predict({"image": [image.tobytes() for image in images]}),
            ]
            with Client(packing_server, wire_format="json") as other:
                answers.append(other.predict({"image": [image.tobytes() for image in images]}))
            with pytest.raises(InputError, match=r"column 'image' have the shape \(5,\), .*; expected \(8, 6, 3\)"):
                client.predict({"image": [b"short"] * 2})
        for outputs in answers:
            assert outputs["means"].dtype == np.float32
            assert np.allclose(outputs["means"], expected, rtol=1e-6)
