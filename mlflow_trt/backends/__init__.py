"""The only doors to TensorRT, ONNX Runtime and the CUDA driver. Knows nothing of recipes and of MLflow."""
