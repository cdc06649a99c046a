"""The report of a pass: what became of nodes and weights."""

from __future__ import annotations

import collections
import math
from collections.abc import Collection, Mapping, Sequence

from onnx import ModelProto, TensorProto

from mlflow_trt.convert.onnx.graph import FlatModel
from mlflow_trt.convert.onnx.weights import SETTING, weight_bytes
from mlflow_trt.convert.precision.ranges import Evidence
from mlflow_trt.core.types import Calibration, CalibrationMethod, KeptNode, Precision, PrecisionReport

_RANGES_LISTED = 20


def report_of(
    model: FlatModel,
    typed: ModelProto,
    *,
    precision: Precision,
    evidence: Evidence,
    changed: Collection[str],
    type_name: str,
    kept: Mapping[str, str],
    weight_only: Mapping[str, str] | None = None,
    method: CalibrationMethod | None = None,
    remarks: Sequence[str] = (),
) -> PrecisionReport:
    """Count what a pass did.

    `changed` are the nodes that run in `type_name`. `kept`, which stayed in float32, and `weight_only`, of which no
    more than the weights are in `type_name`, have reasons by node.
    """
    weight_only = weight_only or {}
    operators = {node.name: node.op_type for node in model.proto.graph.node}
    samples, sha256 = evidence.seen_on or (str(evidence.samples), evidence.samples.sha256)
    # What is infinite throughout, as masks are, has no largest value; it is among those that are not finite.
    finite = ((name, seen) for name, seen in evidence.largest.items() if seen or name not in evidence.not_finite)
    largest = sorted(finite, key=lambda item: -item[1])[:_RANGES_LISTED]
    node_types = {type_name: len(changed), f"{type_name} weights": len(weight_only), "float32": len(kept)}
    return PrecisionReport(
        precision=precision,
        nodes=len(model.proto.graph.node),
        changed_nodes=len(changed),
        node_types={name: count for name, count in node_types.items() if count},
        weight_types=_weight_types(typed),
        kept=_listed(kept, operators),
        weight_only=_listed(weight_only, operators),
        share=evidence.share(changed),
        largest=dict(largest),
        not_finite=dict(sorted(evidence.not_finite.items(), key=lambda item: -item[1])[:_RANGES_LISTED]),
        calibration=Calibration(samples=samples, sha256=sha256, method=method),
        size_before=weight_bytes(model.proto),
        size_after=weight_bytes(typed),
        remarks=tuple(remarks),
    )


def _listed(reasons: Mapping[str, str], operators: Mapping[str, str]) -> tuple[KeptNode, ...]:
    return tuple(KeptNode(name=name, operator=operators[name], reason=reason) for name, reason in reasons.items())


def _weight_types(model: ModelProto) -> dict[str, int]:
    counts: dict[str, int] = collections.Counter()
    for tensor in model.graph.initializer:
        values = math.prod(tensor.dims)
        if values > SETTING:
            counts[str(TensorProto.DataType.Name(tensor.data_type)).lower()] += values
    return dict(counts)
