"""A small body of parquet can stand for gigabytes: it is refused before it is unpacked."""

from __future__ import annotations

import io

import networks
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import read, reference

from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.wire import parquet_request
from mlflow_trt.deploy.serve.parquet_size import check_unpacked
from mlflow_trt.deploy.serve.problems import HttpError, http_error_of
from mlflow_trt.errors import InputTooLargeError, OptionError
from mlflow_trt.flavor.pyfunc import PyfuncModel

LIMIT = 1 << 20


def written(table: pa.Table, **options) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def bombs() -> dict[str, bytes]:
    rows = 1 << 20
    texts = pa.array([b"x" * 1000] * 10_000).dictionary_encode()
    return {
        "zeros, compressed": written(pa.table({"x": np.zeros(rows)}), compression="zstd", use_dictionary=False),
        "one number, from a dictionary": written(pa.table({"x": np.full(rows, 2.5)}), compression="none"),
        "lists of one number": written(pa.table({"x": pa.array(list(np.ones((1024, 1024), np.float32)))})),
        "nothing but nulls": written(pa.table({"x": pa.nulls(rows, pa.float64())})),
        "one text, from a dictionary": written(pa.table({"x": texts})),
        "lists of one text": written(pa.table({"x": pa.array([[b"y" * 1000] * 100] * 100)})),
        "texts in structs": written(pa.table({"x": pa.array([{"a": [b"y" * 1000] * 100}] * 100)})),
        "bytes of one length": written(pa.table({"x": pa.array([b"z" * 500] * 10_000, pa.binary(500))})),
    }


@pytest.mark.parametrize("body", bombs().values(), ids=bombs())
def test_what_unpacks_to_more_than_the_limit_is_refused(body):
    assert len(body) < 100_000
    with pytest.raises(HttpError, match=f"the server takes {LIMIT} at most") as caught:
        check_unpacked(memoryview(body), LIMIT)
    assert caught.value.status == 413


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_what_fits_passes(compression):
    random = np.random.default_rng(0)
    images = [random.bytes(1000) for _ in range(300)]
    frame = pd.DataFrame({"x": list(random.random((300, 100))), "n": random.random(300), "image": images})
    sink = io.BytesIO()
    frame.to_parquet(sink, compression=compression)
    check_unpacked(memoryview(sink.getvalue()), LIMIT)
    check_unpacked(memoryview(parquet_request({"x": random.random((300, 100))}).content), LIMIT)


def test_texts_of_a_dictionary_are_counted_as_often_as_they_stand_there():
    body = memoryview(written(pa.table({"x": pa.array([b"x" * 1000] * 500).dictionary_encode()})))
    check_unpacked(body, 600_000)
    with pytest.raises(HttpError, match="413|takes 50"):
        check_unpacked(body, 400_000)


@pytest.mark.parametrize("cut", [0, 3, 50, -1, -20])
def test_what_is_no_parquet_is_refused(cut):
    body = written(pa.table({"x": np.arange(100.0)}))[:cut]
    with pytest.raises(HttpError, match="no parquet that can be read") as caught:
        check_unpacked(memoryview(body), LIMIT)
    assert caught.value.status == 400


def test_the_limit_of_the_load_settings_holds_under_a_server(tmp_path, monkeypatch):
    settings = LoadSettings(max_request_bytes=16 * 4 * 10)
    x = networks.rows(11)
    with reference(read(networks.product(), tmp_path)) as session:
        model = PyfuncModel(session, settings=settings)
        assert len(model.predict({"x": x})["y"]) == 11  # a batch job has what memory it has
        monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
        frames = [pd.DataFrame({"x": list(x)}), pd.DataFrame({"x": [row.tobytes() for row in x]}), pd.DataFrame(x)]
        for data in (x, {"x": x}, *frames):
            with pytest.raises(
                InputTooLargeError, match=r"takes 704 bytes, .* 640 at most .max_request_bytes."
            ) as caught:
                model.predict(data)
            assert caught.value.get_http_status_code() == http_error_of(caught.value).status == 413
        assert len(model.predict({"x": x[:10]})["y"]) == 10


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1"])
def test_limits_that_make_no_sense(value):
    with pytest.raises(OptionError, match="expected a number of bytes, 1 or more"):
        LoadSettings(max_request_bytes=value)


def test_a_damaged_footer_does_not_end_the_process():
    """As pyarrow's reading of it does, for a histogram of another length than the levels of a column have."""
    sink = io.BytesIO()
    pd.DataFrame({"x": [[0.5] * 16] * 2, "t": ["a", "b"]}).to_parquet(sink)
    body = bytearray(sink.getvalue())
    begin = len(body) - 8 - int.from_bytes(body[-8:-4], "little")
    statuses: list[int] = []
    for at in range(begin, len(body)):
        kept = body[at]
        for value in (0, 1, kept ^ 1, kept ^ 16, 127, 255):
            body[at] = value
            try:
                check_unpacked(memoryview(body), LIMIT)
            except HttpError as error:
                statuses.append(error.status)
        body[at] = kept
    assert {400} <= set(statuses) <= {400, 413}
    check_unpacked(memoryview(body), LIMIT)
