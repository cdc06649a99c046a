"""Which rows run together, when, and where they are copied: nothing here knows TensorRT or CUDA."""
