"""Score Spark DataFrames: the public name of `mlflow_trt.deploy.spark`."""

from mlflow_trt.deploy.spark import predict_udf

__all__ = ["predict_udf"]
