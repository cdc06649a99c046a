"""ONNX graphs: read, checked and described. Knows nothing of precisions and of TensorRT."""
