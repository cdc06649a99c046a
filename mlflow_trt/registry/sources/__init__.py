"""What can be converted: models that MLflow already has, and ONNX files. Each becomes an ONNX file first."""
