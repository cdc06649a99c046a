"""Whole models: MLflow's own pyfunc around a network whose place an engine takes."""
