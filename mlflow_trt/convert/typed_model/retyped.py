"""A typed model that a precision pass makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx
import onnx.shape_inference
from onnx import ModelProto, TensorProto

from mlflow_trt.convert.onnx.graph import FlatModel, flatten, label_of
from mlflow_trt.convert.onnx.model import bodies_of, tensors_of
from mlflow_trt.convert.onnx.opset import OpsetNotRaisedError, opset_of
from mlflow_trt.convert.onnx.reference import brings_quantization
from mlflow_trt.convert.precision.calibration import CALIBRATED, calibrate
from mlflow_trt.convert.precision.calibration_cache import CalibrationCache
from mlflow_trt.convert.precision.masks import clamp_masks
from mlflow_trt.convert.precision.ranges import Evidence, gather_evidence
from mlflow_trt.convert.precision.refinement import refine
from mlflow_trt.convert.precision.sensitivity import FLOAT16, headroom_of
from mlflow_trt.convert.precision.typed_graph import PrecisionPass, TypedGraph
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.convert.typed_model.model import TypedModel, TypedModelTask
from mlflow_trt.convert.typed_model.reference import Reference
from mlflow_trt.core.accuracy import Comparison, Tolerance
from mlflow_trt.core.types import BatchAxis, Precision
from mlflow_trt.errors import ExecutionError, InputError, OutOfMemoryError, RecipeError, UnsupportedModelError

_QUICK_FEEDS = 2
_USUAL_ROWS = 128
"""With so many rows to calibrate on, what they lack is rare."""
_SAME_RESULTS = Tolerance(relative_error=1e-6)
"""Of a model with smaller masks."""
_SAME = Tolerance(relative_error=1e-3)
"""What two ways to compute the same in float32 may be apart."""


class RetypedModelMaker:
    """Makes it. What does not depend on the nodes that stay in float32 is done once, here.

    Raises RecipeError where `keep_float32` names nothing, and UnsupportedModelError where ONNX Runtime cannot run the
    model, or no opset has the types that the pass needs.
    """

    def __init__(
        self, task: TypedModelTask, precision_pass: PrecisionPass, cache: CalibrationCache | None = None
    ) -> None:
        self._task = task
        self._pass = precision_pass
        self._precision = task.recipe.precision
        with self._explaining_ignorance():
            self._reference = Reference.of(task.source, task.samples)
        self._samples = self._reference.samples
        self._flat, self._remarks = self._flattened()
        self._excluded = _excluded_nodes(self._flat, task.source.proto, task.recipe)
        with self._explaining_ignorance():
            self._remarks += self._clamp_masks(headroom_of(task.samples))
            evidence = self._evidence(cache)
        self._calibrates = self._precision in CALIBRATED and evidence.seen_on is None
        self._make = precision_pass.prepare(self._flat, evidence)

    def make(self, kept: Mapping[str, str]) -> TypedModel:
        stays = self._excluded | dict(kept)
        if self._task.tolerance is None:
            graph = self._make(stays)
            comparison = self._judge(graph)
        else:
            graph, comparison = refine(self._flat, self._make, self._judge, self._judge_quickly, stays)
        report = replace(graph.report, remarks=(*self._remarks, *graph.report.remarks))
        typed = TypedModel.write(graph.proto, self._flat.folder, self._task, report)
        self._check_types(typed.path)
        return replace(
            typed,
            comparison=comparison,
            reference=self._reference.outputs,
            changed=graph.changed,
            unseen=self._unseen(graph),
        )

    def _flattened(self) -> tuple[FlatModel, tuple[str, ...]]:
        """In the first of the pass's opsets that the model can be raised to, and computes the same in."""
        rewritten, precision = self._task.rewritten, self._precision
        before = opset_of(rewritten.proto)
        comes_in_half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in tensors_of(rewritten.proto))
        reasons: list[str] = []
        for opset in self._pass.opsets(has_float16=comes_in_half):
            try:
                flat = flatten(
                    rewritten,
                    self._task.workdir,
                    opset,
                    keep=self._task.recipe.keep_float32,
                    widen=precision is Precision.BF16 and comes_in_half,
                    folds_dequantized=precision in CALIBRATED,
                )
                if before < opset:
                    self._check_raised(flat)
            except OpsetNotRaisedError as error:
                reasons.append(f"opset {before} cannot be raised to {opset}: {error}")
            else:
                return flat, (*rewritten.remarks, *reasons)
        raise UnsupportedModelError(
            f"{precision} needs types that the operators of this model do not have: {'; '.join(reasons)}. Export the "
            "model with that opset, or take another precision"
        )

    def _check_raised(self, flat: FlatModel) -> None:
        """Raise OpsetNotRaisedError where onnx's converter made another model of it."""
        try:
            comparison = self._compare("the raised model", flat.proto, "raised.onnx", _SAME, most=_QUICK_FEEDS)
        except OutOfMemoryError:
            raise
        except ExecutionError as error:
            raise OpsetNotRaisedError(error.message) from error
        if comparison.problems:
            raise OpsetNotRaisedError(f"the model would compute something else: {'; '.join(comparison.problems)}")

    def _clamp_masks(self, headroom: int) -> tuple[str, ...]:
        """Bring masks into what float16 holds, where the results on all samples are the same; says which."""
        if self._precision is not Precision.FP16:
            return ()
        largest = FLOAT16.largest / headroom / 2  # half of it, since scores are added
        clamped, names = clamp_masks(self._flat, largest)
        if not names:
            return ()
        comparison = self._compare("the model with clamped masks", clamped.proto, "clamped.onnx", _SAME_RESULTS)
        if comparison.problems:
            return (f"masks stay as large as they are ({', '.join(names)}), since smaller ones change the results",)
        self._flat = clamped
        return (f"the masks {', '.join(names)} are {largest:.4g} at most, and the results on {self._samples} the same",)

    def _evidence(self, cache: CalibrationCache | None) -> Evidence:
        if self._precision in CALIBRATED:
            return calibrate(self._flat, self._samples, self._task.recipe.calibration_method, cache)
        return gather_evidence(self._flat, self._samples)

    def _unseen(self, graph: TypedGraph) -> Comparison | None:
        """How far off the same nodes are on half of the samples, with ranges that were seen on the other half.

        All ranges together hold for the samples that they were seen on, and tell nothing of values beyond them, which
        are cut off. The worse of both ways round; None for ranges that come from elsewhere, for a single sample, for
        as many as are usual, with which it would take long, and where nothing is to be compared.
        """
        task = self._task
        if not self._calibrates or task.tolerance is None or self._samples.rows >= _USUAL_ROWS:
            return None
        halves = self._reference.halves(task.batch_axis)
        if halves is None:
            return None
        kept = {node.name: node.reason for node in graph.report.kept}
        comparisons = []
        try:
            for seen, unseen in (halves, halves[::-1]):
                evidence = calibrate(self._flat, seen.samples, task.recipe.calibration_method, None)
                other = self._pass.prepare(self._flat, evidence)(kept)
                comparisons.append(self._judge_on(other, None, optimize=False, on=unseen))
        except (ExecutionError, InputError):  # a model that takes no fewer rows
            return None
        return max(comparisons, key=lambda comparison: comparison.severity)

    @contextmanager
    def _explaining_ignorance(self) -> Iterator[None]:
        try:
            yield
        except OutOfMemoryError:
            raise
        except ExecutionError as error:
            raise UnsupportedModelError(
                f"nothing is known of the values in this model, on which {self._precision} depends: "
                f"{error.message}. Take fp32 or tf32, or a release of ONNX Runtime that can run the model"
            ) from error

    def _judge(self, graph: TypedGraph) -> Comparison:
        # Not optimized, or values might be rounded less often than in the typed model.
        return self._judge_on(graph, None, optimize=False)

    def _judge_quickly(self, graph: TypedGraph) -> Comparison:
        """Good enough to rank graphs."""
        return self._judge_on(graph, _QUICK_FEEDS, optimize=True)

    def _judge_on(
        self, graph: TypedGraph, most: int | None, *, optimize: bool, on: Reference | None = None
    ) -> Comparison:
        return self._compare(
            f"the {self._precision} model, emulated on ONNX Runtime,",
            graph.emulation,
            "emulation.onnx",
            self._task.tolerance or Tolerance(),
            batch_axis=self._task.batch_axis,
            most=most,
            optimize=optimize,
            on=on,
        )

    def _compare(
        self,
        subject: str,
        model: ModelProto,
        file: str,
        tolerance: Tolerance,
        *,
        batch_axis: BatchAxis | None = None,
        most: int | None = None,
        optimize: bool = True,
        on: Reference | None = None,
    ) -> Comparison:
        """Where the model has Q/DQ, it runs node by node, as a source model does, whatever `optimize` says."""
        path = self._task.workdir / file
        onnx.save_model(model, path)
        optimize = optimize and not brings_quantization(model)
        return (on or self._reference).compare(
            subject, path, tolerance, batch_axis=batch_axis, most=most, optimize=optimize
        )

    def _check_types(self, path: Path) -> None:
        """Raise UnsupportedModelError where types do not fit together, of which a pass is the cause."""
        problem = _type_problem(path)
        before = self._task.workdir / "flat.onnx"
        onnx.save_model(self._flat.proto, before)
        if problem is not None and _type_problem(before) is None:
            raise UnsupportedModelError(
                f"the {self._precision} model would be no valid ONNX model: {problem}. Keep the operator in float32 "
                "with keep_float32, or take another precision"
            )


def _type_problem(path: Path) -> str | None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        return str(error).strip()
    return None


def _check_calls(model: FlatModel, source: ModelProto, recipe: Recipe) -> None:
    """Raise RecipeError where `keep_float32` names a function, or a call of one: only the nodes in it have types."""
    functions = {(function.domain, function.name) for function in source.functions}
    operators = sorted({node.op_type for node in model.proto.graph.node})
    lost = {*recipe.keep_float32}.difference(operators, (node.name for node in model.proto.graph.node))
    for node in (node for body in bodies_of(source) for node in body.node):
        named = [name for name in (node.name, node.op_type) if name in lost]
        if named and (node.domain, node.op_type) in functions:
            raise RecipeError(
                f"keep_float32 names {named[0]!r}, and {label_of(node)} calls a function of the model, which is "
                "written out before nodes get their types; name operators in it, which are kept wherever they are. "
                f"Those of the model are {', '.join(operators)}",
                option="keep_float32",
            )


def _excluded_nodes(model: FlatModel, source: ModelProto, recipe: Recipe) -> dict[str, str]:
    """The nodes that the user keeps in float32."""
    kept = {}
    _check_calls(model, source, recipe)
    present = {name for node in source.graph.node for name in (node.name, node.op_type) if name}
    for node in model.proto.graph.node:
        present.update((node.name, node.op_type))
        for name in (node.name, node.op_type):
            if name in recipe.keep_float32:
                kept[node.name] = "keep_float32 names it" if name == node.name else f"keep_float32 names {name}"
    unknown = [name for name in recipe.keep_float32 if name not in present]
    if unknown:
        raise RecipeError(
            f"keep_float32 names {unknown[0]!r}, which is neither a node nor an operator of the model; "
            f"its operators are {', '.join(sorted({node.op_type for node in model.proto.graph.node}))}",
            option="keep_float32",
        )
    return kept
