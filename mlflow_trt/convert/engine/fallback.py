"""Build an engine of a precision, and retreat to float32 where TensorRT resists.

A graph that TensorRT builds in float32 may fail in another precision: there is no kernel for some operator in
bfloat16, say. Then the nodes that resist stay in float32, and the report says so.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable

from mlflow_trt.convert.engine.builder import Built
from mlflow_trt.convert.onnx.model import OnnxModel
from mlflow_trt.convert.typed_model import TypedModel, TypedModelMaker
from mlflow_trt.core.log import get_logger
from mlflow_trt.errors import BuildError

_log = get_logger(__name__)
_NAMED_RETRIES = 4
_GROUPS_TRIED = 12

Build = Callable[[TypedModel], Built]


def build_with_retreat(maker: TypedModelMaker, build: Build, source: OnnxModel) -> tuple[TypedModel, Built]:
    """The typed model with the fewest nodes in float32 that TensorRT builds an engine of, and that engine.

    1. Nodes that the error names go back to float32, a few times over.
    2. Where it names none that helps, all nodes do; if that fails too, the model is to blame, and its error is raised.
    3. Then the operators return to the precision one after the other, those with the most nodes first, as long as an
       engine can be built. Of those that return to it late, some may have to stay out only because tries are limited.

    Raises BuildError: nothing can be built of this model, in whatever precision.
    """
    kept: dict[str, str] = {}
    typed = maker.make(kept)
    for _ in range(_NAMED_RETRIES):
        try:
            return typed, build(typed)
        except BuildError as error:
            named = _named(error, typed.changed)
            if not typed.changed:
                raise
            if not named:
                break
            _log.info("TensorRT resists %s in %s: %s", ", ".join(named), typed.report.precision, error.message)
            kept.update(dict.fromkeys(named, _reason(typed, error)))
            typed = maker.make(kept)
    return _released(maker, build, source, typed, kept)


def _released(
    maker: TypedModelMaker, build: Build, source: OnnxModel, resisting: TypedModel, kept: dict[str, str]
) -> tuple[TypedModel, Built]:
    """Steps 2 and 3."""
    operators = {node.name: node.op_type for node in source.proto.graph.node}
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for name in sorted(resisting.changed):
        groups[operators.get(name, name)].append(name)
    ordered = sorted(groups, key=lambda operator: -len(groups[operator]))
    reason = f"TensorRT builds no engine with it in {resisting.report.precision}"
    out = kept | {name: reason for names in groups.values() for name in names}
    build(maker.make(out))
    for operator in ordered[:_GROUPS_TRIED]:
        fewer = {name: why for name, why in out.items() if name not in groups[operator]}
        try:
            build(maker.make(fewer))
        except BuildError as error:
            _log.info("TensorRT resists %s in %s: %s", operator, resisting.report.precision, error.message)
        else:
            out = fewer
    # What was tried last may have failed, and the files of the typed model and the plan are those of the last try.
    best = maker.make(out)
    return best, build(best)


def _named(error: BuildError, changed: Iterable[str]) -> list[str]:
    """The nodes that the error's text names, whole: TensorRT derives the names of its layers from them."""
    text = " ".join((error.message, *error.log))
    return [name for name in changed if re.search(rf"(?<![\w.]){re.escape(name)}(?!\w*[.\d]\d|[\w.]*\d)", text)]


def _reason(typed: TypedModel, error: BuildError) -> str:
    said = error.log[-1] if error.log else error.message
    return f"TensorRT builds no engine with it in {typed.report.precision}: {said[:200]}"
