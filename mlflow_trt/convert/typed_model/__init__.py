"""Source model and recipe in, typed model out: the graph that TensorRT parses."""
