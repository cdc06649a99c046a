"""The GPU's memory, streams and contexts."""
