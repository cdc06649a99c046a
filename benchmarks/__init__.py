"""Measurements that stand behind what the documentation says about speed.

The commands are `python -m benchmarks.runtime`, `.replicas` and `.serving`; the other modules are parts of these.
"""
