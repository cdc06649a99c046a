"""One TensorRT engine on one GPU: contexts, buffers, slots."""
