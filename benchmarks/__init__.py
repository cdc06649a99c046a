"""Measurements that stand behind what the documentation says about speed: `python -m benchmarks.<name>`."""
