"""Cutting, padding and joining, on the CPU runtime: the code that the GPU sessions run."""

from __future__ import annotations

import pickle
from typing import Any

import networks
import numpy as np
import pytest
from helpers import read, reference
from real_models import MAGIKA

from mlflow_trt import InputShapeError
from mlflow_trt.core.arrays import numpy_dtype
from mlflow_trt.core.types import BatchAxis, InputRange, ShapeProfile
from mlflow_trt.runtime import native
from mlflow_trt.runtime.batching.host_copy import LEAST_BYTES, STEPS, THREADS, copies, copy_rows
from mlflow_trt.runtime.batching.scheduler import Scheduler
from mlflow_trt.runtime.batching.sizes import START_COST, AnySize, BatchRows, FewSizes, Piece, pieces
from mlflow_trt.runtime.onnxruntime_session import OnnxRuntimeSession

AXIS = BatchAxis(inputs=("x",), splits=True, declared=True)


def test_the_sizes_are_few():
    assert FewSizes(1, 8, 128).all == (1, 2, 4, 8, 16, 32, 64, 128)
    assert FewSizes(3, 20, 50).all == (3, 4, 8, 16, 20, 32, 50)
    assert FewSizes(4, 4, 4).all == (4,)
    assert FewSizes(1, 1, 2).all == (1, 2)


@pytest.mark.parametrize(
    ("rows", "limits", "expected"),
    [
        (5, (1, 4, 8), [Piece(0, 5, 8)]),
        (8, (1, 4, 8), [Piece(0, 8, 8)]),
        (1, (4, 4, 8), [Piece(0, 1, 4)]),
        (17, (2, 4, 8), [Piece(0, 8, 8), Piece(8, 16, 8), Piece(16, 17, 2)]),
        (6, (4, 4, 4), [Piece(0, 4, 4), Piece(4, 6, 4)]),
        (65, (1, 8, 128), [Piece(0, 64, 64), Piece(64, 65, 1)]),
        (100, (1, 8, 128), [Piece(0, 64, 64), Piece(64, 96, 32), Piece(96, 100, 4)]),
        (0, (2, 4, 8), [Piece(0, 0, 2)]),
    ],
)
def test_pieces(rows, limits, expected):
    assert list(pieces(rows, FewSizes(*limits))) == expected


@pytest.mark.parametrize("limits", [(1, 8, 128), (3, 20, 50), (7, 7, 7), (2, 5, 33)])
def test_every_row_is_run_once_and_at_the_least_cost_that_a_search_finds(limits):
    sizes = FewSizes(*limits)
    best = [0.0]
    for rows in range(1, 3 * limits[2]):
        best.append(min(START_COST + size + best[max(0, rows - size)] for size in sizes.all))
        cut = list(pieces(rows, sizes))
        assert [row for piece in cut for row in range(piece.start, piece.stop)] == list(range(rows))
        assert all(piece.size in sizes.all and piece.stop - piece.start <= piece.size for piece in cut)
        assert all(piece.stop - piece.start == piece.size for piece in cut[:-1])
        if rows <= limits[2]:
            assert sum(START_COST + piece.size for piece in cut) <= 1.35 * best[rows]


def test_sizes_get_smaller_until_there_are_none():
    sizes: Any = FewSizes(2, 8, 64)
    met = []
    while sizes is not None:
        met.append(sizes.largest)
        sizes = sizes.smaller()
    assert met == [64, 32, 16, 8, 4, 2]
    assert [AnySize(5).smaller().largest, AnySize(1).smaller()] == [2, None]


@pytest.mark.parametrize("rows", [0, 1, 4, 5, 8, 19])
def test_a_batch_of_any_size_gives_the_same_rows(rows, tmp_path):
    source = read(networks.product(), tmp_path)
    feeds = {"x": networks.rows(rows)}
    with reference(source) as whole, cut(source, 8) as session:
        result = session.run(feeds)
        assert np.allclose(result["y"], whole.run(feeds)["y"], rtol=1e-6)
        assert result["y"].shape == (rows, 8)
        assert all(size <= 8 for size in session.runs)


def cut(source, largest, delay=0.0, axis=AXIS):
    return OnnxRuntimeSession(source.path, source.inputs, source.outputs, batch_axis=axis, largest_batch=largest,
                              max_batch_delay_ms=delay)  # fmt: skip


def filled(rows: BatchRows, name="x"):
    target = np.empty(rows.shapes[name], rows.parts[0][name].dtype)
    list(copy_rows(rows.copies(name), target))
    return target


def test_padding_repeats_valid_rows():
    """magika looks its input up in a table; a padding of zeros would be valid too, but not for every model."""
    assert filled(BatchRows([{"x": np.array([[3], [7]])}], AXIS, 4)).tolist() == [[3], [7], [7], [7]]
    assert filled(BatchRows([{"x": np.empty((0, 1), np.int32)}], AXIS, 2)).tolist() == [[0], [0]]


def test_parts_of_several_batches_come_one_after_another():
    parts = [{"x": np.array([[1], [2]])}, {"x": np.empty((0, 1), np.int64)}, {"x": np.array([[3]])}]
    assert filled(BatchRows(parts, AXIS, 5)).tolist() == [[1], [2], [3], [3], [3]]


@pytest.mark.parametrize("in_c", [True, False], ids=["in C", "in Python"])
@pytest.mark.parametrize("row_bytes", [8, LEAST_BYTES // 3, 2 * LEAST_BYTES])
@pytest.mark.parametrize("counts", [(1,), (3, 1, 4), (1,) * 17, (40,)])
def test_copies_by_several_threads_are_copies(row_bytes, counts, in_c, monkeypatch):
    if not in_c:
        monkeypatch.setattr(native, "extension", None)
    random = np.random.default_rng(0)
    parts = [{"x": random.integers(0, 255, (count, row_bytes), dtype=np.uint8)} for count in counts]
    rows = BatchRows(parts, AXIS, sum(counts) + 2)
    target = np.empty(rows.shapes["x"], np.uint8)
    arrived = list(copy_rows(rows.copies("x"), target))
    assert arrived == sorted(arrived)
    assert arrived[-1] == len(target)
    assert len(arrived) <= (STEPS if in_c else THREADS) + 1
    expected = np.concatenate([part["x"] for part in parts])
    assert np.array_equal(target, np.concatenate([expected, expected[-1:], expected[-1:]]))


@pytest.mark.parametrize("in_c", [True, False], ids=["in C", "in Python"])
@pytest.mark.parametrize("nbytes", [0, 24, LEAST_BYTES, LEAST_BYTES + 8, 5 * LEAST_BYTES + 16])
@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", "bfloat16"])
def test_copies_are_new_arrays_whatever_their_size(nbytes, dtype, in_c, monkeypatch):
    if not in_c:
        monkeypatch.setattr(native, "extension", None)
    kind = numpy_dtype(dtype)
    whole = np.random.default_rng(0).integers(0, 2, 2 * nbytes, dtype=np.uint8).view(kind).reshape(2, -1)
    sources = [whole[:1], whole[1:], np.empty((0, 3), kind), whole[1:, :0]]
    results = copies(sources)
    for source, result in zip(sources, results, strict=True):
        assert result.dtype == kind
        assert result.shape == source.shape
        assert np.array_equal(result.view(np.uint8), source.view(np.uint8))
        assert result.base is None


EQUAL = [
    np.arange(6, dtype=np.longlong),
    pickle.loads(pickle.dumps(np.arange(6, dtype=np.float32))),
    np.arange(6, dtype=np.dtype("f4", metadata={"from": "elsewhere"})),
    np.frombuffer(bytearray(25), np.uint8)[1:].view(np.float32),
    np.arange(6) > 2,
    np.arange(6).astype(numpy_dtype("bfloat16")),
]


@pytest.mark.parametrize("array", EQUAL, ids=["longlong", "pickled", "metadata", "unaligned", "bool", "bfloat16"])
def test_arrays_of_equal_dtypes_are_copied_whatever_python_calls_them(array):
    x = array.reshape(3, 2)
    target = np.empty((4, 2), np.dtype(array.dtype.name) if array.dtype.kind != "V" else array.dtype)
    list(copy_rows(BatchRows([{"x": x[:1]}, {"x": x[1:]}], AXIS, 4).copies("x"), target))
    assert np.array_equal(target, np.concatenate([x, x[-1:]]))
    assert np.array_equal(copies([x])[0], x)


@pytest.mark.parametrize(("columns", "message"), [(2, "different structures"), (LEAST_BYTES, "broadcast")])
def test_an_error_in_a_copy_reaches_the_caller(columns, message):
    """Where rows differ nothing is copied byte by byte."""
    with pytest.raises(ValueError, match=message):
        list(copy_rows([(np.ones((4, columns), np.uint8), 0, 4)], np.ones((4, columns + 1), np.uint8)))


def test_inputs_without_the_axis_are_passed_whole(tmp_path):
    source = read(networks.transformer(), tmp_path)
    axis = BatchAxis(inputs=("input_ids", "attention_mask"), splits=True, declared=True)
    with reference(source) as whole, cut(source, 4, axis=axis) as session:
        feeds = networks.sentences(11, 16)
        result, expected = session.run(feeds), whole.run(feeds)
        for name, array in expected.items():
            assert np.allclose(result[name], array, rtol=1e-4, atol=1e-5)


def test_a_real_model_in_pieces(tmp_path):
    source = read(MAGIKA, tmp_path)
    axis = BatchAxis(inputs=("bytes",), splits=True, declared=True)
    feeds = MAGIKA.feeds(7)
    with reference(source) as whole, cut(source, 3, axis=axis) as session:
        (result,), (expected,) = session.run(feeds).values(), whole.run(feeds).values()
        assert np.allclose(result, expected, rtol=1e-3, atol=1e-6)
        assert session.runs == {1: 1, 3: 2}


class WholeSlot:
    """A runtime whose output has one number for the whole batch, whatever the model's graph says."""

    def launch(self, rows, profile):
        self.shape = rows.shapes["x"]

    def finish(self):
        return {"y": np.array([self.shape[0]])}

    def abandon(self):
        pass

    def close(self):
        pass


def test_an_output_without_rows_is_found_and_whole_batches_go_on():
    profile = ShapeProfile(ranges={"x": InputRange(min=(2, 1), opt=(4, 1), max=(8, 1))})
    scheduler = Scheduler(WholeSlot, profiles=[profile], axis=AXIS)
    with pytest.raises(InputShapeError, match=r"output 'y' has the shape \(1,\) for 8 rows of input"):
        scheduler.run({"x": np.ones((9, 1))})
    assert scheduler.run({"x": np.ones((5, 1))})["y"].tolist() == [5]
    with pytest.raises(InputShapeError, match="does not carry the batch axis"):
        scheduler.run({"x": np.ones((9, 1))})
