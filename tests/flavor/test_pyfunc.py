"""Every form in which MLflow users pass data in, and what they get back."""

from __future__ import annotations

import inspect

import mlflow
import networks
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from compare import relative_error
from mlflow.exceptions import MlflowException

import mlflow_trt
from mlflow_trt import InputDtypeError, InputError, InputShapeError, OutOfMemoryError
from mlflow_trt.core.frames import feeds_from_frame, frame_from_outputs
from mlflow_trt.core.inputs import prepare_feeds
from mlflow_trt.core.types import TensorSpec
from mlflow_trt.core.wire import SHAPES_KEY

CPU = {"runtime": "onnxruntime"}
X = networks.rows(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("product") / "model"
    mlflow_trt.save_model(networks.product(), folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return mlflow.pyfunc.load_model(str(folder), model_config=CPU)


@pytest.fixture(scope="module")
def unsigned(tmp_path_factory):
    """Without a signature, so that MLflow passes on what it is given."""
    folder = tmp_path_factory.mktemp("unsigned") / "model"
    mlflow_trt.save_model(networks.product(), folder, signature=False)
    return mlflow.pyfunc.load_model(str(folder), model_config=CPU)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformer") / "model"
    shapes = {"input_ids": ((-1, 12),) * 3}
    mlflow_trt.save_model(networks.transformer(), folder, batch=(1, 4, 8), shapes=shapes)
    return mlflow.pyfunc.load_model(str(folder), model_config=CPU)


@pytest.fixture(scope="module")
def expected(model):
    return model.predict({"x": X})


def stacked(frame):
    return {name: np.stack(frame[name]) for name in frame}


class TestAsLogged:
    def test_an_array_or_a_dict(self, model, expected):
        weights = networks.onnx.numpy_helper.to_array(networks.product().graph.initializer[0])
        assert relative_error(expected, {"y": (X @ weights).astype(np.float32)}) < 1e-6
        assert relative_error(model.predict(X), expected) == 0

    @pytest.mark.parametrize(
        "cells",
        [
            [row.tolist() for row in X],
            list(X),
            [row.astype(np.float64) for row in X],
        ],
        ids=["lists", "arrays", "arrays of float64"],
    )
    def test_a_frame(self, cells, model, expected):
        frame = pd.DataFrame({"x": cells}, index=[10, 20, 30, 40])
        answer = model.predict(frame)
        assert relative_error(stacked(answer), expected) == 0
        assert answer.index.equals(frame.index)
        series = model.predict(frame["x"])
        assert relative_error(stacked(series), expected) == 0
        assert series.index.equals(frame.index)

    def test_rows_of_a_frame_that_was_filtered(self, model, expected):
        everything = pd.DataFrame(X, columns=[f"feature{number}" for number in range(16)])
        kept = everything[everything.index % 2 == 1]
        answer = model.predict(kept)
        assert list(answer.index) == [1, 3]
        assert relative_error(stacked(answer), {"y": expected["y"][1::2]}) < 1e-6

    def test_columns_of_several_dtypes(self, model):
        whole = np.round(X * 10)
        frame = pd.DataFrame(whole).astype({0: "int8", 1: "Int64", 2: "float16", 3: "Float32", 4: object, 5: "int64"})
        frame[6] = pd.Series(whole[:, 6]).astype(pd.ArrowDtype(pa.float64()))
        assert relative_error(stacked(model.predict(frame)), model.predict(whole)) == 0
        frame.loc[2, 1] = pd.NA
        with pytest.raises(InputDtypeError, match="column 1, row 2 is missing"):
            model.predict(frame)

    def test_several_inputs(self, transformer):
        feeds = networks.sentences(5, 12)
        outputs = transformer.predict(feeds)
        assert outputs["hidden"].shape == (5, 12, networks.WIDTH)
        frame = pd.DataFrame({name: list(array) for name, array in feeds.items()})
        assert relative_error(stacked(transformer.predict(frame)), outputs) == 0
        numbered = frame.set_axis(["0", "1"], axis="columns")  # as Spark calls columns that were given without names
        assert relative_error(stacked(transformer.predict(numbered)), outputs) == 0

    @pytest.mark.parametrize("data", [{"z": X}, {"x": X[:, :3]}, X[0], "text"])
    def test_bad_input_is_a_bad_request(self, data, model):
        with pytest.raises(MlflowException) as caught:
            model.predict(data)
        assert caught.value.get_http_status_code() == 400

    def test_params_are_ignored_with_a_warning(self, model, expected, messages):
        assert relative_error(model.predict(X, params={"temperature": 1}), expected) == 0  # MLflow's own warning
        assert relative_error(model._model_impl.predict(X, params={"temperature": 1}), expected) == 0
        assert "takes no params, and ignores temperature" in messages.text

    def test_mlflow_finds_the_signature_of_predict_at_hand(self, model):
        predict = model._model_impl.predict
        assert list(inspect.signature(predict).parameters) == ["data", "params"]
        assert inspect.signature(predict) is inspect.signature(predict)


@pytest.fixture(scope="module")
def enforced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("enforced") / "model"
    mlflow_trt.save_model(networks.product(), folder, signature=True, verify=False)
    return mlflow.pyfunc.load_model(str(folder), model_config=CPU)


class TestWithAnEnforcedSignature:
    """What MLflow makes of data by a signature of tensors reaches the model as arrays."""

    def test_frames_become_arrays(self, enforced, expected):
        frame = pd.DataFrame({"x": list(X)})
        assert relative_error(enforced.predict(frame), expected) == 0

    def test_mlflow_refuses_other_dtypes_in_arrays(self, enforced):
        with pytest.raises(MlflowException, match="float64 does not match expected dtype float32"):
            enforced.predict(X.astype(np.float64))


class TestWithoutASignature:
    def test_dtypes_are_converted_where_nothing_is_lost(self, unsigned, expected):
        wide = X.astype(np.float64)
        assert relative_error(unsigned.predict(wide), expected) == 0
        assert relative_error(unsigned.predict({"x": wide}), expected) == 0
        assert relative_error(unsigned.predict(wide.tolist()), expected) == 0

    def test_or_refused(self, unsigned):
        with pytest.raises(InputDtypeError, match="too large for float32"):
            unsigned.predict(np.full((1, 16), 1e300))

    def test_a_frame_in_is_a_frame_out(self, unsigned, expected):
        index = pd.Index([10, 20, 30, 40], name="id")
        columns = {f"feature{i}": X[:, i] for i in range(16)}
        for frame in (
            pd.DataFrame({"x": list(X)}, index=index),
            pd.DataFrame({"x": [row.tolist() for row in X]}, index=index),
            pd.DataFrame(columns, index=index),
        ):
            result = unsigned.predict(frame)
            assert isinstance(result, pd.DataFrame)
            assert result.index.equals(index)
            assert list(result.columns) == ["y"]
            assert relative_error({"y": np.stack(result["y"])}, expected) == 0

    @pytest.mark.parametrize(
        ("data", "error", "message"),
        [
            ("text", InputError, "expected a dict of arrays, an array or a DataFrame, got str"),
            ({"z": X}, InputError, "input 'x' is missing"),
            (pd.DataFrame({"x": [[1.0, 2.0], [1.0]]}), InputShapeError, "the cells of column 'x' differ in shape"),
            (
                pd.DataFrame({"a": [1.0], "b": [2.0]}),
                InputShapeError,
                "no column 'x', and its 2 columns .a, b. together are no",
            ),
            (pd.DataFrame({"x": [1.0]}), InputShapeError, "the cells of column 'x' are numbers, as in row 0; expected"),
        ],
    )
    def test_bad_input(self, data, error, message, unsigned):
        with pytest.raises(error, match=message) as caught:
            unsigned.predict(data)
        assert caught.value.get_http_status_code() == 400

    def test_what_does_not_fit_into_the_memory_of_the_host(self, unsigned):
        endless = np.broadcast_to(np.float32(1), (1 << 40, 16))
        with pytest.raises(OutOfMemoryError, match="the host lacks memory: .*; pass fewer rows at once") as caught:
            unsigned.predict({"x": endless})
        assert caught.value.get_http_status_code() == 429

    def test_an_array_for_several_inputs(self, transformer):
        with pytest.raises(InputError, match="several, input_ids, attention_mask"):
            transformer._model_impl.predict(X)


IMAGE = TensorSpec(name="image", dtype="float32", shape=("n", 2, 3))
SCORE = TensorSpec(name="score", dtype="float32", shape=("n", 1))
COUNT = TensorSpec(name="count", dtype="int64", shape=("n",))


class TestFrames:
    def test_cells_of_every_kind(self):
        images = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
        frame = pd.DataFrame(
            {"image": [image.reshape(-1).tolist() for image in images], "score": [0.5, 0.25], "count": [1, 2]}
        )
        feeds = feeds_from_frame(frame, (IMAGE, SCORE, COUNT))
        assert np.array_equal(feeds["image"], images)
        assert feeds["score"].tolist() == [[0.5], [0.25]]
        assert feeds["count"].tolist() == [1, 2]
        nested = pd.DataFrame({"image": list(images), "score": [[0.5], [0.25]], "count": [1, 2]})
        assert np.array_equal(feeds_from_frame(nested, (IMAGE, SCORE, COUNT))["image"], images)

    def test_cells_that_do_not_fit(self):
        frame = pd.DataFrame({"image": [[1.0] * 5], "score": [0.5], "count": [1]})
        with pytest.raises(
            InputShapeError, match=r"cells of column 'image' have the shape \(5,\), as in row 0; expected \(2, 3\)"
        ):
            feeds_from_frame(frame, (IMAGE, SCORE, COUNT))
        with pytest.raises(InputError, match="has no column 'count'; it has image, score"):
            feeds_from_frame(frame[["image", "score"]], (IMAGE, SCORE, COUNT))

    @pytest.mark.parametrize(
        ("cells", "error", "message"),
        [
            ([b"1234" * 12, None], InputDtypeError, "are bytes and, in row 1, NoneType"),
            ([None, b"1234" * 12], InputDtypeError, None),
            ([np.zeros(12), np.zeros(12, "datetime64[s]")], InputDtypeError, "row 1 holds a time; expected float32"),
            ([[1.0, 2.0], [[1.0], [2.0, 3.0]]], InputShapeError, "row 1: the lists in the cell differ in length"),
            ([{"a": 1}, {"a": 2}], InputDtypeError, None),
        ],
    )
    def test_cells_of_many_kinds(self, cells, error, message):
        frame = pd.DataFrame({"image": pd.Series(cells, dtype=object), "score": [0.5, 0.25], "count": [1, 2]})
        with pytest.raises((error, InputShapeError), match=message):
            prepare_feeds(feeds_from_frame(frame, (IMAGE, SCORE, COUNT)), (IMAGE, SCORE, COUNT))

    def test_cells_of_bytes(self):
        images = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
        frame = pd.DataFrame({"image": [image.tobytes() for image in images], "score": [0.5, 0.25], "count": [1, 2]})
        assert np.array_equal(feeds_from_frame(frame, (IMAGE, SCORE, COUNT))["image"], images)
        for cell, message in (
            (b"12345", "column 'image', row 1 has 5 bytes, which are no whole number of float32"),
            (1.5, "bytes and, in row 1, float"),
        ):
            frame["image"] = pd.Series([images[0].tobytes(), cell], dtype=object)
            with pytest.raises(InputDtypeError, match=message):
                feeds_from_frame(frame, (IMAGE, SCORE, COUNT))

    def test_cells_of_bytes_that_are_no_bools(self):
        flags = TensorSpec(name="flags", dtype="bool", shape=("n", 2))
        frame = pd.DataFrame({"flags": [b"\x01\x00", b"\x00\x01"]})
        assert feeds_from_frame(frame, (flags,))["flags"].tolist() == [[True, False], [False, True]]
        frame["flags"] = [b"\x01\x00", b"\x00\xff"]
        with pytest.raises(InputDtypeError, match=r"'flags', row 1: the value at \[1\] of the cell is neither 0 nor 1"):
            feeds_from_frame(frame, (flags,))

    @pytest.mark.parametrize("shape", [[1, 0, 2**62], [1, 0, 10**400]])
    def test_a_shape_that_no_array_has(self, shape):
        frame = pd.DataFrame({"x": [[]]})
        frame.attrs[SHAPES_KEY] = {"x": shape}
        with pytest.raises(InputShapeError, match="the sender of column 'x' told a shape that is too large"):
            feeds_from_frame(frame, (TensorSpec(name="x", dtype="float32", shape=("n", "height", "width")),))

    def test_cells_that_arrow_keeps(self):
        column = pd.Series([[1.0, 2.0], [3.0, 4.0]], dtype=pd.ArrowDtype(pa.list_(pa.float32())))
        pair = TensorSpec(name="pair", dtype="float32", shape=("n", 2))
        assert feeds_from_frame(pd.DataFrame({"pair": column}), (pair,))["pair"].tolist() == [[1, 2], [3, 4]]

    def test_a_frame_without_rows(self):
        frame = pd.DataFrame({"image": [], "score": [], "count": []}, dtype=object)
        feeds = feeds_from_frame(frame, (IMAGE, SCORE, COUNT))
        assert feeds["image"].shape == (0, 2, 3)
        assert feeds["count"].dtype == np.int64

    def test_columns_of_one_name(self):
        frame = pd.DataFrame([[1.0, 2.0]], columns=["score", "score"])
        with pytest.raises(InputError, match="several columns of one name: score, score"):
            feeds_from_frame(frame, (SCORE,))

    def test_one_row_for_each_row(self):
        outputs = {"label": np.array([3, 1]), "scores": np.arange(8.0).reshape(2, 4)}
        frame = frame_from_outputs(outputs, pd.Index(["a", "b"]))
        assert frame.loc["b", "label"] == 1
        assert frame.loc["b", "scores"].tolist() == [4, 5, 6, 7]

    def test_a_number_for_each_row_is_a_column_of_numbers(self):
        frame = frame_from_outputs({"score": np.array([[0.5], [0.25]], np.float32)}, pd.Index(["a", "b"]))
        assert frame["score"].dtype == np.float32
        assert frame["score"].tolist() == [0.5, 0.25]

    @pytest.mark.parametrize(
        ("column", "message"),
        [
            (pd.Series([1, None], dtype="Int64"), "row 1 is missing"),
            (pd.Series([0.5, None], dtype="Float64"), "row 1 is missing"),
            (pd.Series([True, None], dtype="boolean"), "row 1 is missing"),
            (pd.Series([1, None], dtype=pd.ArrowDtype(pa.int64())), "row 1 is missing"),
            (pd.Series([1, None], dtype=object), "row 1 is missing"),
            (pd.Series([1, pd.NA], dtype=object), "row 1 is missing"),
            (pd.Series([1.0, np.nan]), "row 1: the value is missing or infinite"),
            (pd.Series(["1", "2"]), "row 0(: the value is of type str| holds text)"),
            (pd.Series([1, 2], dtype="category"), "holds categories"),
            (pd.Series(pd.to_datetime(["2020-01-01"])), "datetime64"),
            (pd.Series([[1], [None]]), r"row 1: the value at \[0\] of the cell is missing"),
            (pd.Series([{"a": 1}]), "row 0: the value is of type dict"),
            (pd.Series([np.ma.masked_array([1], [False]), np.ma.masked_array([1], [True])]), "row 1 is missing"),
        ],
    )
    def test_what_is_no_number(self, column, message):
        with pytest.raises(InputDtypeError, match=message):
            feeds_from_frame(pd.DataFrame({"count": column}), (COUNT,))

    def test_numbers_that_numpy_would_make_floats_of(self):
        big = 2**53 + 1
        for cells in ([big, 1.0], [[big], [1.0]]):
            assert (
                feeds_from_frame(pd.DataFrame({"count": pd.Series(cells, dtype=object)}), (COUNT,))["count"][0] == big
            )

    def test_a_column_that_has_the_name_of_the_only_input_by_chance(self):
        pair = TensorSpec(name="x", dtype="float32", shape=("n", 2))
        assert feeds_from_frame(pd.DataFrame({"x": [1, 2], "y": [3, 4]}), (pair,))["x"].tolist() == [[1, 3], [2, 4]]
        cells = pd.DataFrame({"x": [[1, 2], [3, 4]], "y": [3, 4]})
        assert feeds_from_frame(cells, (pair,))["x"].tolist() == [[1, 2], [3, 4]]

    def test_rows_of_any_length_with_a_column_that_has_the_name_of_the_only_input(self):
        row = TensorSpec(name="x", dtype="float32", shape=("n", "length"))
        numbers = pd.DataFrame({"x": [1, 2], "y": [3, 4], "z": [5, 6]})
        assert feeds_from_frame(numbers, (row,))["x"].tolist() == [[1, 3, 5], [2, 4, 6]]
        assert feeds_from_frame(numbers[["x"]], (row,))["x"].tolist() == [[1], [2]]
        cells = pd.DataFrame({"x": [[1, 2], [3, 4]], "y": [3, 4]})
        assert feeds_from_frame(cells, (row,))["x"].tolist() == [[1, 2], [3, 4]]
        told = numbers[["x"]]
        told.attrs[SHAPES_KEY] = {"x": [2]}  # by the client, of an array of one dimension
        assert feeds_from_frame(told, (row,))["x"].shape == (2,)

    def test_columns_with_names_of_several_levels(self):
        frame = pd.DataFrame([[1.0, 2]], columns=pd.MultiIndex.from_tuples([("score", 0), ("count", 0)]))
        with pytest.raises(InputError, match="2 levels of names; expected one: score, count"):
            feeds_from_frame(frame, (SCORE, COUNT))

    @pytest.mark.parametrize("output", [np.zeros(()), np.zeros((3, 2))])
    def test_outputs_without_rows_do_not_fit(self, output):
        with pytest.raises(InputError, match="output 'state' has the shape .* for 2 rows of input"):
            frame_from_outputs({"state": output}, pd.RangeIndex(2))
