"""The MLflow face: save, log, load, and what `mlflow.pyfunc` calls. Knows nothing of the registry's rules."""
