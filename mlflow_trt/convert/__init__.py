"""ONNX in, engine out. Knows nothing of MLflow's stores and nothing of CUDA memory."""
