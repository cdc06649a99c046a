"""Spark DataFrames, scored by a real local Spark. `make test-spark` installs it; it needs Java."""

from __future__ import annotations

import os
import shutil
import sys
from decimal import Decimal

import mlflow
import networks
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from onnx import helper
from repository import SUPPORT

import mlflow_trt
from mlflow_trt import InputError, InputShapeError, OptionError, UnsupportedModelError
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.types import TensorSpec
from mlflow_trt.deploy.spark_rows import SparkRows, columns_of_outputs
from mlflow_trt.store.folder import read_folder
from mlflow_trt.store.load import open_session

# What is used of pandas here works with 3, which the tests show.
pytestmark = pytest.mark.filterwarnings("ignore:PySpark does not yet fully support pandas:FutureWarning")

CPU = {"runtime": "onnxruntime"}
COUNT = 103  # leaves tails everywhere


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks") / "model"
    mlflow_trt.save_model(networks.ranks(), folder, batch=(1, 4, 8), verify=False)
    return folder


@pytest.fixture(scope="module")
def feeds():
    return networks.ranks_feeds(COUNT)


@pytest.fixture(scope="module")
def expected(folder, feeds):
    with mlflow_trt.load_model(str(folder), runtime="onnxruntime") as session:
        return session.run(feeds)


def series(feeds, start=0, stop=None):
    """As Spark hands rows over."""
    rows = slice(start, stop)
    return {
        "image": pd.Series([image.reshape(-1) for image in feeds["image"][rows]]),
        "count": pd.Series(feeds["count"][rows]),
        "gain": pd.Series(list(feeds["gain"][rows])),
    }


def close(found, array):
    """ONNX Runtime adds in another order where batches are of another size."""
    return np.allclose(found, array, rtol=1e-5, atol=1e-5)


class TestRows:
    @pytest.fixture
    def rows(self, folder):
        with open_session(read_folder(folder), LoadSettings.of(CPU)) as session:
            yield SparkRows(session, partition=3)

    def test_in_pieces(self, rows, feeds, expected):
        for start, stop in ((0, 100), (100, 100), (100, COUNT)):
            outputs = rows.run(series(feeds, start, stop), 32)
            for name, array in expected.items():
                assert outputs[name].dtype == array.dtype
                assert close(outputs[name], array[start:stop])

    def test_cells_of_every_form(self, rows, feeds, expected):
        nested = np.empty(COUNT, object)
        for index, image in enumerate(feeds["image"]):
            nested[index] = np.array([*image, None], object)[:-1]
        for images in (nested, [image.tobytes() for image in feeds["image"]], [i.tolist() for i in feeds["image"]]):
            columns = {**series(feeds), "image": pd.Series(list(images)), "gain": pd.Series(feeds["gain"][:, 0])}
            assert np.array_equal(rows.run(columns, 1000)["scaled"], expected["scaled"])

    @pytest.mark.parametrize(
        ("column", "cell", "message"),
        [
            ("count", None, "row 57: column 'count' is null, or NaN.*dropna"),
            ("image", None, "row 57: column 'image' is null"),
            ("image", np.ones(5, np.float32), r"row 57: image: float32\[batch, 2, 3\] does not take this row: cannot"),
            ("image", np.array([1, None] * 3, object), "row 57: .*: it has nulls"),
            ("image", np.array([Decimal(1)] * 6, object), "row 57: .*: it has Decimal: cast the column to numbers"),
            ("image", b"12345", "row 57: .*: buffer size must be a multiple"),
            ("image", np.full(6, 1e300), "row 57: input 'image', row 0: the value at .* is too large for float32"),
        ],
    )
    def test_a_bad_row_is_named(self, column, cell, message, rows, feeds):
        columns = series(feeds)
        cells = list(columns[column])
        cells[57] = cell
        columns[column] = pd.Series(cells)
        with pytest.raises(InputError, match=f"partition 3, {message}"):
            rows.run(columns, 32)

    def test_bytes_that_are_no_bools(self, tmp_path):
        mlflow_trt.save_model(networks.flags(), tmp_path / "model", batch=(1, 4, 8), verify=False)
        with open_session(read_folder(tmp_path / "model"), LoadSettings.of(CPU)) as session:
            rows = SparkRows(session, partition=3)
            assert rows.run({"x": pd.Series([b"\1\0", b"\0\0"])}, 8)["y"].tolist() == [[False, True], [True, True]]
            with pytest.raises(InputError, match=r"row 3: column 'x': the value at \[1\] .* neither 0 nor 1"):
                rows.run({"x": pd.Series([b"\1\0", b"\0\2"])}, 8)

    def test_rows_are_counted_over_batches(self, rows, feeds):
        rows.run(series(feeds, 0, 10), 32)
        columns = series(feeds, 10, 20)
        columns["image"].iloc[4] = np.ones(7, np.float32)
        with pytest.raises(InputShapeError, match="partition 3, row 14"):
            rows.run(columns, 32)

    def test_types_that_spark_lacks(self):
        outputs: dict[str, np.ndarray] = {
            "half": np.ones((2, 3), np.float16), "byte": np.ones(2, np.uint8), "deep": np.ones((2, 1, 2, 3), np.uint32),
        }  # fmt: skip
        specs = [TensorSpec(name=name, dtype=array.dtype.name, shape=array.shape) for name, array in outputs.items()]
        frame = columns_of_outputs(outputs, specs)
        assert frame["byte"].dtype == np.int16
        assert frame["half"][0].dtype == np.float32
        assert np.asarray(frame["deep"][1]).shape == (1, 2, 3)


class Task:
    """What a task knows of the resources that Spark assigned to it."""

    def __init__(self, **addresses):
        self._addresses = addresses

    def resources(self):
        from pyspark.resource import ResourceInformation

        return {name: ResourceInformation(name, addresses) for name, addresses in self._addresses.items()}


@pytest.mark.parametrize(
    ("task", "devices"), [(Task(gpu=["3"]), (3,)), (Task(gpu=["1", "2"]), (1, 2)), (Task(fpga=["0"]), ()), (None, ())]
)
def test_the_gpus_that_spark_assigned(task, devices):
    pytest.importorskip("pyspark", reason="`make test-spark` installs it")
    from mlflow_trt.deploy import spark

    assert spark._devices(task) == devices


def test_a_gpu_that_spark_knows_by_another_name():
    pytest.importorskip("pyspark", reason="`make test-spark` installs it")
    from mlflow_trt.deploy import spark

    with pytest.raises(OptionError, match="assigned the GPU 'MIG-1a2b' to this task.*discoveryScript"):
        spark._devices(Task(gpu=["MIG-1a2b"]))


@pytest.fixture(scope="module")
def spark(tmp_path_factory):
    pytest.importorskip("pyspark", reason="`make test-spark` installs it")
    from pyspark.sql import SparkSession

    # Workers import what the tests import.
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYSPARK_PYTHON", sys.executable)
        environment.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        environment.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        settings = {
            "spark.ui.enabled": "false",
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.sql.warehouse.dir": str(tmp_path_factory.mktemp("warehouse")),
            "spark.sql.execution.arrow.maxRecordsPerBatch": "10",
            "spark.sql.shuffle.partitions": "2",
        }
        builder = SparkSession.builder.master("local[2]").appName("mlflow-trt")
        for name, value in settings.items():
            builder = builder.config(name, value)
        session = builder.getOrCreate()
        yield session
        session.stop()


@pytest.fixture(scope="module")
def frame(spark, feeds):
    rows = [
        (index, image.tolist(), image.reshape(-1).tolist(), image.tobytes(), int(count), float(gain[0]))
        for index, (image, count, gain) in enumerate(zip(feeds["image"], feeds["count"], feeds["gain"], strict=True))
    ]
    schema = "id int, image array<array<float>>, flat array<float>, raw binary, count long, gain float"
    return spark.createDataFrame(rows, schema).repartition(3).cache()


@pytest.fixture(scope="module")
def predict(spark, folder):
    from mlflow_trt.deploy.spark import predict_udf

    return predict_udf(spark, str(folder), model_config=CPU)


def times(factor):
    return networks.model(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        [networks.value("x", networks.FLOAT, ["batch"])],
        [networks.value("y", networks.FLOAT, ["batch"])],
        [networks.constant("factor", np.float32(factor))],
    )


def log(factor):
    mlflow_trt.log_model(times(factor), name="t", registered_model_name="times", batch=(1, 4, 8), verify=False)


def predictions(spark, uri):
    from mlflow_trt.deploy.spark import predict_udf

    frame = spark.createDataFrame([(1.0,), (2.0,)], "x float").coalesce(1)
    return frame.select(predict_udf(spark, uri, model_config=CPU)().alias("p"))


def collected(frame):
    return sorted(row.p.y for row in frame.collect())


class TestSpark:
    def test_the_type_of_the_result(self, frame, predict):
        assert frame.select(predict().alias("p")).schema["p"].dataType.simpleString() == (
            "struct<scaled:array<array<float>>,sums:array<float>,total:float,doubled:bigint>"
        )

    @pytest.mark.parametrize("column", ["image", "flat", "raw"])
    def test_several_inputs_and_outputs_of_every_rank(self, column, frame, predict, expected):
        rows = sorted(frame.select("id", predict(image=column, count="count", gain="gain").alias("p")).collect())
        assert len(rows) == COUNT
        for name, array in expected.items():
            found = np.asarray([row.p[name] for row in rows], array.dtype)
            assert found.shape == array.shape
            assert close(found, array)

    def test_columns_in_the_order_of_the_inputs(self, frame, predict, expected):
        rows = sorted(frame.select("id", predict("image", frame["count"], gain="gain").alias("p")).collect())
        assert np.array_equal(np.asarray([row.p.doubled for row in rows]), expected["doubled"])
        with pytest.raises(
            OptionError, match="the model has the inputs image, count, gain, and 1 columns and sum were"
        ):
            predict("image", sum="count")

    def test_no_rows(self, frame, predict):
        assert frame.where("id < 0").select(predict()).collect() == []

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("count", "column 'count' is null, or NaN"),
            ("image", "column 'image' is null, or NaN"),
        ],
    )
    def test_null_rows(self, change, message, frame, predict):
        from pyspark.sql import functions

        column = functions.when(frame["id"] != 57, frame[change])
        changed = frame.coalesce(1).sort("id").withColumn(change, column)
        with pytest.raises(Exception, match=rf"partition 0, row 57: {message}"):
            changed.select(predict()).collect()
        assert changed.dropna(subset=[change]).select(predict()).count() == COUNT - 1

    def test_nulls_in_arrays_of_floats_are_nan(self, frame, predict):
        """As the documentation says: Spark hands them over alike, and takes NaN in a column of numbers as null."""
        from pyspark.sql import functions

        flat = functions.transform("flat", lambda value, index: functions.when(index > 0, value))
        (row,) = frame.where("id = 57").select(predict(flat, "count", "gain").alias("p")).collect()
        assert np.isnan(row.p.scaled).tolist() == [[True, False, False], [False, False, False]]
        assert np.isnan(row.p.sums).tolist() == [True, False]
        assert row.p.total is None

    def test_a_bad_row(self, frame, predict):
        from pyspark.sql import functions

        column = functions.when(frame["id"] != 57, frame["flat"]).otherwise(functions.slice("flat", 1, 4))
        changed = frame.coalesce(1).sort("id").withColumn("flat", column)
        with pytest.raises(Exception, match=r"partition 0, row 57: image: float32\[batch, 2, 3\] does not take this"):
            changed.select(predict("flat", "count", "gain")).collect()

    def test_models_whose_rows_are_not_known_to_be_independent(self, spark, tmp_path):
        from mlflow_trt.deploy.spark import predict_udf

        mlflow_trt.save_model(
            networks.scaled_by_a_scalar(), tmp_path / "scalar", shapes={"x": ((1, 1), (4, 4), (8, 8))}, verify=False
        )
        with pytest.raises(UnsupportedModelError, match="convert it with batch="):
            predict_udf(spark, str(tmp_path / "scalar"))

    def test_a_registered_model_and_its_settings(self, spark, store, frame, expected):
        from mlflow_trt.deploy.spark import predict_udf

        mlflow_trt.log_model(
            networks.ranks(), name="r", registered_model_name="r", batch=(1, 4, 8), verify=False, model_config=CPU
        )
        rows = sorted(frame.select("id", predict_udf(spark, "models:/r/1")().alias("p")).collect())
        assert close(np.asarray([row.p.total for row in rows], np.float32), expected["total"])
        with pytest.raises(OptionError, match="unknown load setting 'runtim'"):
            predict_udf(spark, "models:/r/1", model_config={"runtim": "onnxruntime"})

    def test_a_version_that_an_alias_does_not_point_to_any_more(self, spark, store):
        client = MlflowClient(store.uri)
        log(2)
        log(3)
        client.set_registered_model_alias("times", "champion", "1")
        before = predictions(spark, "models:/times@champion")
        client.set_registered_model_alias("times", "champion", "2")
        after = predictions(spark, "models:/times@champion")
        # The column was made while the alias pointed to version 1.
        assert [collected(column) for column in (before, after, before)] == [[2, 4], [3, 6], [2, 4]]

    def test_a_folder_that_was_written_anew(self, spark, tmp_path):
        """Spark's Python workers keep what they loaded."""
        for factor in (2, 3):
            shutil.rmtree(tmp_path / "model", ignore_errors=True)
            mlflow_trt.save_model(times(factor), tmp_path / "model", batch=(1, 4, 8), verify=False)
            assert collected(predictions(spark, str(tmp_path / "model"))) == [factor, 2 * factor]

    def test_names_with_dots(self, spark, tmp_path):
        from mlflow_trt.deploy.spark import predict_udf

        model = networks.model(
            [helper.make_node("Neg", ["in.x"], ["out.y"])],
            [networks.value("in.x", networks.FLOAT, ["batch"])],
            [networks.value("out.y", networks.FLOAT, ["batch"])],
        )
        mlflow_trt.save_model(model, tmp_path / "dots", batch=(1, 4, 8), verify=False)
        frame = spark.createDataFrame([(1.5,), (-2.0,)], "`in.x` float")
        rows = frame.select(predict_udf(spark, str(tmp_path / "dots"), model_config=CPU)().alias("p")).collect()
        assert sorted(row.p["out.y"] for row in rows) == [-1.5, 2.0]


UDF_ROWS = networks.rows(25, 4)


@pytest.fixture(scope="module")
def rows(spark):
    listed = [(number, row.tolist()) for number, row in enumerate(UDF_ROWS)]
    return spark.createDataFrame(listed, "id int, x array<float>").repartition(3).cache()


class TestMlflowsOwnUdf:
    """`mlflow.pyfunc.spark_udf`, with the types of results that its users write."""

    @pytest.fixture
    def saved(self, tmp_path):
        def save(width, row):
            """x @ w, in the shape of a row of the output."""
            weights = np.random.default_rng(width).standard_normal((4, width)).astype(np.float32)
            model = networks.model(
                [
                    helper.make_node("MatMul", ["x", "w"], ["flat"]),
                    helper.make_node("Reshape", ["flat", "shape"], ["y"]),
                ],
                [networks.value("x", networks.FLOAT, ["batch", 4])],
                [networks.value("y", networks.FLOAT, ["batch", *row])],
                [networks.constant("w", weights), networks.constant("shape", np.array([-1, *row]))],
            )
            mlflow_trt.save_model(model, tmp_path / "udf", batch=(1, 4, 8), verify=False, model_config=CPU)
            return str(tmp_path / "udf"), (UDF_ROWS @ weights).reshape(-1, *row)

        return save

    @pytest.mark.parametrize(
        ("row", "result_type", "read"),
        [
            ((), "float", lambda p: p),
            ((), None, lambda p: p if isinstance(p, float) else p.y),
            ((1,), "float", lambda p: p),
            ((1,), "double", lambda p: p),
            ((1,), None, lambda p: p if isinstance(p, float) else p.y),
            ((1,), "struct<y:float>", lambda p: p.y),
            ((3,), "array<float>", lambda p: p),
            ((3,), None, lambda p: p if isinstance(p, list) else p.y),
            ((3,), "struct<y:array<float>>", lambda p: p.y),
            ((2, 3), "struct<y:array<array<float>>>", lambda p: p.y),
        ],
    )
    def test_types_of_results(self, row, result_type, read, saved, spark, rows):
        uri, expected = saved(int(np.prod(row, dtype=int)), row)
        keywords = {} if result_type is None else {"result_type": result_type}
        udf = mlflow.pyfunc.spark_udf(spark, uri, env_manager="local", **keywords)
        found = sorted(rows.select("id", udf("x").alias("p")).collect())
        answers = np.asarray([read(answer.p) for answer in found], np.float32)
        # A row of one number is a number.
        assert np.allclose(answers, expected.reshape(-1) if row == (1,) else expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # MLflow's and pandas', about models without type hints and examples
def test_a_whole_model_answers_as_its_source(spark, store, tmp_path):
    network = tmp_path / "network.onnx"
    network.write_bytes(networks.transformer().SerializeToString())
    texts = pd.DataFrame({"text": ["warm sun", "cold rain over the river", "a", "nobody slept at all"] * 8})
    mlflow.pyfunc.log_model(
        name="source", registered_model_name="source", python_model=str(SUPPORT / "text_classifier.py"),
        artifacts={"network": str(network)}, input_example=texts[:4], pip_requirements=["onnxruntime", "pandas"],
    )  # fmt: skip
    shapes = {"input_ids": ((-1, 1), (-1, 8), (-1, 64))}
    mlflow_trt.convert_model_version("models:/source/1", "made", batch=(1, 4, 8), shapes=shapes)
    expected = mlflow.pyfunc.load_model("models:/source/1").predict(texts)
    assert expected["label"].nunique() > 1

    udf = mlflow.pyfunc.spark_udf(
        spark, "models:/made/1", env_manager="local", result_type="label string, score double", model_config=CPU
    )
    frame = spark.createDataFrame(texts.reset_index()).repartition(3)
    found = sorted(frame.select("index", udf("text").alias("p")).collect())
    assert [row.p.label for row in found] == list(expected["label"])
    np.testing.assert_allclose([row.p.score for row in found], expected["score"], atol=1e-5)
