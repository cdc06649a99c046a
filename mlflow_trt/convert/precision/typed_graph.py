"""What precision passes are, and what they give back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from onnx import ModelProto

from mlflow_trt.convert.onnx.graph import FlatModel
from mlflow_trt.convert.precision.ranges import Evidence
from mlflow_trt.core.types import PrecisionReport


@dataclass(frozen=True, kw_only=True)
class TypedGraph:
    """What a pass made of a model.

    `emulation` computes the same in float32, with every value rounded as in `proto`: ONNX Runtime lacks kernels for
    bfloat16, and runs neighbouring float16 nodes in float32, where nothing overflows. `changed` are the nodes of the
    model that was passed in which run in the precision that was asked for.
    """

    proto: ModelProto
    emulation: ModelProto
    report: PrecisionReport
    changed: frozenset[str]


class PrecisionPass(Protocol):
    """Makes typed graphs of one precision.

    `on` takes what is known of a model, and returns what makes a typed graph of it, given nodes that must stay in
    float32 with the reason for each. Requires a model that onnx.checker accepts. Ensures that the result is one too,
    that inputs and outputs keep their names, types and shapes, and that the model that was passed in is unchanged.
    """

    def opsets(self, *, has_float16: bool) -> tuple[int, ...]:
        """The oldest opsets whose operators allow the types of this precision, the best first.

        `has_float16` tells that some of the model's own tensors are float16.
        """

    def prepare(self, model: FlatModel, evidence: Evidence) -> Callable[[Mapping[str, str]], TypedGraph]: ...
