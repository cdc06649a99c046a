"""`python -m mlflow_trt`, for where the script `mlflow-trt` is not on the path."""

from mlflow_trt.cli import main

main()
