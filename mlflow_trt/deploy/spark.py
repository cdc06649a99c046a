"""Score Spark DataFrames: one model in each Python worker, on the GPUs that Spark assigned to the task.

from mlflow_trt.spark import predict_udf

predict = predict_udf(spark, "models:/resnet50-trt/2")
scored = df.withColumn("prediction", predict())            # columns named like the inputs
scored = df.withColumn("prediction", predict(image="pixels"))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlflow
import pandas as pd

from mlflow_trt.core.settings import LoadSettings, ModelConfig, read_model_config
from mlflow_trt.core.types import BatchAxis, TensorSpec
from mlflow_trt.deploy.spark_rows import SparkRows, columns_of_outputs
from mlflow_trt.errors import MissingDependencyError, OptionError, UnsupportedModelError
from mlflow_trt.flavor.fetch import read_mlmodel, read_record
from mlflow_trt.registry.sources.open import registered_version
from mlflow_trt.runtime.session import Session

try:
    from pyspark.sql import Column, SparkSession
    from pyspark.sql import functions as spark_functions
    from pyspark.sql import types as spark_types
    from pyspark.taskcontext import TaskContext
except ImportError as error:
    raise MissingDependencyError(
        "pyspark is not installed: `pip install 'mlflow-trt[spark]'`", packages=("pyspark",)
    ) from error

_TYPES = {
    "bool": "BooleanType", "int8": "ByteType", "uint8": "ShortType", "int16": "ShortType", "uint16": "IntegerType",
    "int32": "IntegerType", "uint32": "LongType", "int64": "LongType", "float16": "FloatType",
    "bfloat16": "FloatType", "float32": "FloatType", "float64": "DoubleType",
}  # fmt: skip
_PIECES_AT_ONCE = 4  # of the largest batch: enough to keep a GPU busy, little enough to hold
_ROWS_AT_ONCE = 32  # of a model without profiles

_OF_SERVERS = frozenset({"answers", "max_request_bytes"})
"""Load settings that say something to servers alone."""


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What goes to the workers: how to load the model there.

    `uuid` tells a model from another one that was at the same URI before. `settings` are load settings as JSON: all of
    this is a key, and some of them are lists.
    """

    uri: str
    uuid: str | None
    tracking_uri: str
    registry_uri: str
    settings: str


# A Python worker runs many tasks, and loading takes seconds.
_sessions: dict[tuple[_Model, tuple[int, ...]], Session] = {}


def predict_udf(spark: SparkSession, model_uri: str, *, model_config: ModelConfig = None) -> Callable[..., Column]:
    """A function that makes a column of predictions of columns.

    It takes a column, or its name, for each input: in the order of the model's inputs, by name of input, or none at
    all where the columns are called like the inputs. The cells of a column are numbers, arrays (flat or nested), or
    binary: the numbers themselves, in the input's dtype.

    The column is a struct with a field for each output: a number for an output of one dimension, an array for two, an
    array of arrays for three, and so on.

    Args:
        spark: the session; its tasks need mlflow-trt and what the runtime wants.
        model_uri: any model URI of MLflow that the tasks can read, too. An alias is followed once, now: all tasks run
            the same version, wherever it points later.
        model_config: load settings. What Spark assigns to a task comes before `device`.

    Raises:
        UnsupportedModelError: rows of the model's batch are not independent, Spark lacks the type of an output, or it
            is a whole model.
        OptionError: unknown load settings; when the function is called, columns that do not fit the inputs.

        In the tasks: InputError, which names the partition and the row, and what loading raises.
    """
    if (version := registered_version(model_uri)) is not None:
        model_uri = f"models:/{version.name}/{version.version}"
    record = read_record(model_uri)
    settings = LoadSettings.of(model_config).to_dict()
    given = {name: settings[name] for name in read_model_config(model_config) or {} if name not in _OF_SERVERS}
    if record.whole is not None:
        raise UnsupportedModelError(
            f"{model_uri} is a whole model, which takes what its source takes and not the arrays of its network: use "
            "mlflow.pyfunc.spark_udf"
        )
    axis = record.batch_axis
    _check_rows(axis, record.inputs, model_uri)
    model = _Model(
        uri=model_uri,
        uuid=read_mlmodel(model_uri).model_uuid,
        tracking_uri=mlflow.get_tracking_uri(),
        registry_uri=mlflow.get_registry_uri(),
        settings=json.dumps(given, sort_keys=True),
    )
    sizes = [limits.max[0] for profile in record.profiles for limits in profile.ranges.values() if limits.max]
    rows_at_once = _PIECES_AT_ONCE * max(sizes) if sizes else _ROWS_AT_ONCE
    names = [spec.name for spec in record.inputs]

    def predict(batches: Iterator[Any]) -> Iterator[pd.DataFrame]:
        context = TaskContext.get()
        session = _session(model, _devices(context))
        rows = SparkRows(session, partition=context.partitionId() if context is not None else 0)
        for batch in batches:
            # A single column comes by itself, whatever the annotations say.
            columns = dict(zip(names, batch if isinstance(batch, tuple) else (batch,), strict=True))
            yield columns_of_outputs(rows.run(columns, rows_at_once), session.outputs)

    # pandas_udf reads what kind of function this is from its annotations, which must not be strings.
    predict.__annotations__ = {
        "batches": Iterator[tuple[pd.Series, ...]],
        "return": Iterator[pd.DataFrame],
    }
    udf = spark_functions.pandas_udf(predict, returnType=_result_type(record.outputs))
    del spark  # an active one is what functions need

    def column(*columns: Column | str, **named: Column | str) -> Column:
        return udf(*_columns(names, columns, named))

    return column


def _check_rows(axis: BatchAxis | None, inputs: tuple[TensorSpec, ...], model_uri: str) -> None:
    if axis is None or not axis.splits or {spec.name for spec in inputs} != set(axis.inputs):
        raise UnsupportedModelError(
            f"{model_uri}: DataFrames are scored in pieces, and the inputs of this model have no rows that are known "
            "to be independent; convert it with batch= to say that they are"
        )


def _columns(names: list[str], columns: tuple[Column | str, ...], named: Mapping[str, Column | str]) -> list[Any]:
    if not columns and not named:
        return [spark_functions.col(f"`{name}`") for name in names]
    unknown = [name for name in named if name not in names[len(columns) :]]
    if unknown or len(columns) + len(named) != len(names):
        raise OptionError(
            f"the model has the inputs {', '.join(names)}, and {len(columns)} columns"
            f"{' and ' + ', '.join(named) if named else ''} were given: give one for each, or none",
            option="columns",
        )
    return [*columns, *(named[name] for name in names[len(columns) :])]


def _result_type(outputs: tuple[TensorSpec, ...]) -> Any:
    fields = []
    for spec in outputs:
        if spec.dtype not in _TYPES:
            raise UnsupportedModelError(
                f"output {spec.name!r} is of dtype {spec.dtype}, which Spark does not have; cast it in the model"
            )
        kind = getattr(spark_types, _TYPES[spec.dtype])()
        for _ in spec.shape[1:]:
            kind = spark_types.ArrayType(kind)
        fields.append(spark_types.StructField(spec.name, kind))
    return spark_types.StructType(fields)


def _devices(context: Any) -> tuple[int, ...]:
    """The GPUs that Spark assigned to this task, if it assigns them."""
    gpus = context.resources().get("gpu") if context is not None else None
    addresses = list(gpus.addresses) if gpus is not None else []
    if unknown := [address for address in addresses if not address.isdecimal()]:
        raise OptionError(
            f"Spark assigned the GPU {unknown[0]!r} to this task; expected a number, as Spark's own "
            "getGpusResources.sh gives: set spark.executor.resource.gpu.discoveryScript",
            option="spark.executor.resource.gpu.discoveryScript",
        )
    return tuple(map(int, addresses))


def _session(model: _Model, devices: tuple[int, ...]) -> Session:
    session = _sessions.get((model, devices))
    if session is None:
        mlflow.set_tracking_uri(model.tracking_uri)
        mlflow.set_registry_uri(model.registry_uri)
        settings: dict[str, Any] = json.loads(model.settings)
        if devices:
            settings["device"] = devices[0] if len(devices) == 1 else list(devices)
        loaded = mlflow.pyfunc.load_model(model.uri, model_config=settings)
        session = _sessions[model, devices] = loaded.get_raw_model()
    return session
