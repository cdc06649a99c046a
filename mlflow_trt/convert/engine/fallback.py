"""Build an engine of a precision, and retreat to float32 where TensorRT resists.

A graph that TensorRT builds in float32 may fail in another precision: there is no kernel for some operator in
bfloat16, say. Then the nodes that resist stay in float32, and the report says so.
"""

from __future__ import annotations

import collections
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import onnx

from mlflow_trt.convert.engine.builder import Built
from mlflow_trt.convert.typed_model.maker import TypedModelMaker
from mlflow_trt.convert.typed_model.model import TypedModel
from mlflow_trt.core.log import get_logger
from mlflow_trt.errors import BuildError

_log = get_logger(__name__)
_NAMED_RETRIES = 4
_GROUPS_TRIED = 12
_COSTLY = ("Conv", "MatMul", "Gemm")
"""Operators that a model spends its time in: of these, what was not named is worth another build."""

Build = Callable[[TypedModel], Built]


def build_with_retreat(maker: TypedModelMaker, build: Build, plan: Path) -> tuple[TypedModel, Built]:
    """The typed model with few nodes in float32 that TensorRT builds an engine of, and that engine, at `plan`.

    1. Where the error names a node, all nodes of its operator go back to float32: where one lacks a kernel, the others
       mostly lack it too, and each build that fails takes as long as one that does not. Then those of the operators
       that cost most return to the precision, but for what was named, if an engine can be built with them.
    2. Where it names none that helps, all nodes do; if that fails too, the model is to blame, and its error is raised.
    3. Then the operators return to the precision one after the other, those with the most nodes first, as long as an
       engine can be built. Of those that return to it late, some may have to stay out only because tries are limited.

    Raises BuildError: nothing can be built of this model, in whatever precision.
    """
    kept: dict[str, str] = {}
    beside: set[str] = set()
    typed = maker.make(kept)
    for _ in range(_NAMED_RETRIES):
        try:
            built = build(typed)
        except BuildError as error:
            if not typed.changed:
                raise
            named = _named(error, typed.changed)
            if not named:
                break
            _log.info("TensorRT resists %s in %s: %s", ", ".join(named), typed.report.precision, error.message)
            reason, alike = _reason(typed, error), _alike(named, typed)
            kept.update(dict.fromkeys(alike, f"{reason} (said of {named[0]})"))
            kept.update(dict.fromkeys(named, reason))
            beside = (beside | {name for name, operator in alike.items() if operator in _COSTLY}) - {*named}
            typed = maker.make(kept)
        else:
            if not beside:
                return typed, built
            best = _Best(plan, typed, built)
            best.try_instead(maker, build, {name: why for name, why in kept.items() if name not in beside})
            return best.restored()
    return _released(maker, build, plan, typed, kept)


def _released(
    maker: TypedModelMaker, build: Build, plan: Path, resisting: TypedModel, kept: dict[str, str]
) -> tuple[TypedModel, Built]:
    """Steps 2 and 3."""
    operators = _operators(resisting)
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for name in sorted(resisting.changed):
        groups[operators.get(name, name)].append(name)
    ordered = sorted(groups, key=lambda operator: -len(groups[operator]))
    reason = f"TensorRT builds no engine with it in {resisting.report.precision}"
    out = kept | {name: reason for names in groups.values() for name in names}
    typed = maker.make(out)
    best = _Best(plan, typed, build(typed))
    for operator in ordered[:_GROUPS_TRIED]:
        fewer = {name: why for name, why in out.items() if name not in groups[operator]}
        if best.try_instead(maker, build, fewer):
            out = fewer
    return best.restored()


class _Best:
    """The best engine so far. Its files, and those of its typed model, are put aside while another one is tried."""

    def __init__(self, plan: Path, typed: TypedModel, built: Built) -> None:
        self._plan = plan
        self._typed, self._built = typed, built
        self._is_aside = False

    def try_instead(self, maker: TypedModelMaker, build: Build, kept: Mapping[str, str]) -> bool:
        """Whether an engine was built with these nodes in float32, which then is the best."""
        self._save_best()
        typed = maker.make(kept)
        try:
            built = build(typed)
        except BuildError as error:
            _log.info("TensorRT resists more nodes in %s: %s", typed.report.precision, error.message)
            return False
        self._typed, self._built, self._is_aside = typed, built, False
        return True

    def restored(self) -> tuple[TypedModel, Built]:
        """It, with its files where they were."""
        if self._is_aside:
            self._saved_plan.replace(self._plan)
            if not self._typed.is_source:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._saved_folder.rename(self._folder)
            self._is_aside = False
        return self._typed, self._built

    def _save_best(self) -> None:
        if self._is_aside:
            return
        self._plan.replace(self._saved_plan)
        if not self._typed.is_source:
            shutil.rmtree(self._saved_folder, ignore_errors=True)
            self._folder.rename(self._saved_folder)
        self._is_aside = True

    @property
    def _saved_plan(self) -> Path:
        return self._plan.with_name(f"{self._plan.name}.best")

    @property
    def _folder(self) -> Path:
        return self._typed.path.parent

    @property
    def _saved_folder(self) -> Path:
        return self._folder.with_name(f"{self._folder.name}.best")


def _operators(typed: TypedModel) -> dict[str, str]:
    nodes = onnx.load(typed.path, load_external_data=False).graph.node
    return {node.name: node.op_type for node in nodes}


def _alike(named: Iterable[str], typed: TypedModel) -> dict[str, str]:
    """The nodes in the precision that are of the operators of these, and their operators."""
    operators = _operators(typed)
    meant = {operators[name] for name in named if name in operators}
    return {name: operators[name] for name in sorted(typed.changed) if operators.get(name) in meant}


def _named(error: BuildError, changed: Iterable[str]) -> list[str]:
    """The nodes that the error's text names, whole: TensorRT derives the names of its layers from them."""
    text = " ".join((error.message, *error.log))
    return [name for name in changed if re.search(rf"(?<![\w.]){re.escape(name)}(?!\w*[.\d]\d|[\w.]*\d)", text)]


def _reason(typed: TypedModel, error: BuildError) -> str:
    said = error.log[-1] if error.log else error.message
    return f"TensorRT builds no engine with it in {typed.report.precision}: {said[:200]}"
