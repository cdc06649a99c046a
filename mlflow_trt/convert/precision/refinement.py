"""Find the parts of a graph that a precision damages most, so that they can be kept in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from mlflow_trt.convert.onnx.graph import FlatModel
from mlflow_trt.convert.precision.typed_graph import TypedGraph
from mlflow_trt.core.accuracy import Comparison

_SEGMENTS = 24
_MARGINS = (0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
"""By how much the expected error must stay below the tolerated one, round after round: errors do not quite add up."""

Make = Callable[[Mapping[str, str]], TypedGraph]
"""Runs a pass, with reasons for further nodes to stay in float32."""

Judge = Callable[[TypedGraph], Comparison]
"""Compares what a typed graph computes with what the source model does."""


def refine(
    model: FlatModel, make: Make, judge: Judge, judge_quickly: Judge, kept: Mapping[str, str]
) -> tuple[TypedGraph, Comparison]:
    """The typed graph, with as many nodes kept in float32 as it takes for `judge` to pass it.

    1. Where all is well, nothing more is kept.
    2. Else the nodes are cut into segments along the graph, and each segment is judged by itself, with all others in
       float32. That shows what it does to the outputs, not to its own results, which may not matter; `judge_quickly`
       is enough to rank them.
    3. The worst segments are kept until the others together, whose errors add up like noise, are expected to pass;
       then the whole is judged again, with more kept each time.
    4. Where all of them would have to be kept, nothing more is: the verdict on the whole graph stands.
    """
    typed = make(kept)
    verdict = judge(typed)
    if not verdict.problems:
        return typed, verdict
    order = [node.name for node in model.proto.graph.node if node.name in typed.changed]
    size = max(1, math.ceil(len(order) / _SEGMENTS))
    segments = [order[start : start + size] for start in range(0, len(order), size)]
    harm = []
    for segment in segments:
        others = {name: "" for name in order if name not in segment}
        harm.append((judge_quickly(make({**kept, **others})).severity, segment))
    harm.sort(key=lambda item: -item[0])
    for margin in _MARGINS:
        allowed = list(harm)
        more = dict(kept)
        while allowed and math.hypot(*(severity for severity, _ in allowed)) > margin:
            severity, segment = allowed.pop(0)
            reason = f"the accuracy needs it: its part of the graph alone has {severity:.2g} of the error tolerated"
            more.update(dict.fromkeys(segment, reason))
        if not allowed:
            break
        candidate = make(more)
        judged = judge(candidate)
        if not judged.problems:
            return candidate, judged
    return typed, verdict
