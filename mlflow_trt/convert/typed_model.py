"""Source model and recipe in, typed model out: the graph that TensorRT parses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import onnx
import onnx.shape_inference
from onnx import ModelProto, TensorProto

from mlflow_trt.backends.onnxruntime_process import IsolatedModel, calibrated_magnitudes
from mlflow_trt.convert.onnx.byte_inputs import cast_bytes_first
from mlflow_trt.convert.onnx.dimension_names import name_dimensions_apart
from mlflow_trt.convert.onnx.graph import FlatModel, flatten
from mlflow_trt.convert.onnx.model import OnnxModel, describe, sha256_of, tensors_of
from mlflow_trt.convert.onnx.opset import OpsetNotRaisedError, opset_of
from mlflow_trt.convert.onnx.reference import reference_outputs
from mlflow_trt.convert.onnx.rewrite import RewrittenModel, rewrite
from mlflow_trt.convert.onnx.weights import write_model
from mlflow_trt.convert.precision import pass_for
from mlflow_trt.convert.precision.calibration_cache import CalibrationCache, SavedRanges
from mlflow_trt.convert.precision.masks import clamp_masks
from mlflow_trt.convert.precision.quantized import QUANTIZABLE, is_quantized
from mlflow_trt.convert.precision.ranges import Evidence, gather_evidence, measured_tensors
from mlflow_trt.convert.precision.refinement import refine
from mlflow_trt.convert.precision.sensitivity import FLOAT16, headroom_of
from mlflow_trt.convert.precision.share import quantized_nodes, share_of
from mlflow_trt.convert.precision.typed_graph import PrecisionPass, TypedGraph
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.convert.resolve_profiles import Profiles
from mlflow_trt.convert.samples import Samples
from mlflow_trt.core.accuracy import Comparison, Tolerance
from mlflow_trt.core.arrays import Outputs
from mlflow_trt.core.comparing import compare
from mlflow_trt.core.types import BatchAxis, CalibrationMethod, Precision, PrecisionReport, TensorSpec
from mlflow_trt.errors import (
    ExecutionError,
    InputError,
    OutOfMemoryError,
    RecipeError,
    RuntimeUnavailableError,
    UnsupportedModelError,
)

_QUANTIZED = (Precision.INT8, Precision.FP8)
_FEWEST_ROWS = 8
"""What a range for quantization has to be seen on. A hundred and more are usual."""
_QUICK_FEEDS = 2
_SAME_RESULTS = 1e-6
"""Relative error of results that smaller masks do not change."""
_SAME = Tolerance(relative_error=1e-3)
"""What two ways to compute the same in float32 may be apart."""


@dataclass(frozen=True, kw_only=True)
class TypedModel:
    """The ONNX that TensorRT parses. `path` is the source model's own where nothing was changed.

    `inputs` and `outputs` are the source model's, but for dimension names that were told apart; where they are float64,
    the file has float32. `external_files` lie beside `path` and are part of the model. `comparison` is that with the
    source model, where there was one, and `reference` what the source model computed for it. `changed` are the nodes
    that run in the precision asked for.
    """

    path: Path
    files: Mapping[str, str]
    is_source: bool
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    report: PrecisionReport
    comparison: Comparison | None = None
    reference: tuple[Outputs, ...] = ()
    changed: frozenset[str] = frozenset()


class TypedModelMaker(Protocol):
    """Makes the typed model of one source model, again and again where more nodes must stay in float32."""

    def make(self, kept: Mapping[str, str]) -> TypedModel:
        """`kept` has nodes that stay in float32, with the reason for each."""
        ...


def maker_for(
    source: OnnxModel,
    recipe: Recipe,
    profiles: Profiles,
    workdir: Path,
    *,
    samples: Samples,
    tolerance: Tolerance | None,
    weight_only: Mapping[str, str],
    calibration_cache: Path | None = None,
) -> TypedModelMaker:
    """What makes the typed model of `recipe`.

    Args:
        samples: what ranges are seen on, and results compared on.
        tolerance: nodes are kept in float32 until this is met; None accepts the first result.
        calibration_cache: for int8 and fp8, a file that ranges are read from, or written to where it has none.
        weight_only: operators of which no more than the weights can be quantized, with the reason for each.

    Raises:
        RecipeError: the precision needs calibration data and there is too little; `keep_float32` names nothing.
        UnsupportedModelError: the precision follows from the model's values, and ONNX Runtime cannot run it.
        MissingDependencyError: the precision needs ONNX Runtime, and it is not installed.
    """
    rewritten = rewrite(source.proto, source.path.parent, workdir)
    told_apart = name_dimensions_apart(rewritten.proto, profiles.profiles)
    rewritten = replace(rewritten, proto=cast_bytes_first(told_apart))
    precision_pass = pass_for(recipe.precision, recipe.calibration_method, weight_only)
    if recipe.precision in _QUANTIZED and is_quantized(rewritten.proto):
        precision_pass = None
    if precision_pass is None:
        return _Unchanged(source, rewritten, recipe, workdir, samples, tolerance, profiles.batch_axis)
    cache = open_calibration_cache(calibration_cache, source, recipe)
    check_calibration(rewritten.proto, recipe, samples, cache)
    return _Retyped(source, rewritten, recipe, workdir, precision_pass, samples, tolerance, profiles.batch_axis, cache)


def open_calibration_cache(path: Path | None, source: OnnxModel, recipe: Recipe) -> CalibrationCache | None:
    """The file of ranges, for a precision that has some. Raises RecipeError for a file of something else."""
    if path is None or recipe.precision not in _QUANTIZED:
        return None
    return CalibrationCache(path, source.digest)


def check_calibration(
    model: ModelProto, recipe: Recipe, samples: Samples, cache: CalibrationCache | None = None
) -> None:
    """Raise RecipeError where the precision is calibrated on the samples, and they are too few or noise."""
    if recipe.precision not in _QUANTIZED or is_quantized(model):
        return
    if cache is not None and cache.saved is not None and not samples.is_evidence:
        return
    if not samples.is_evidence or samples.rows < _FEWEST_ROWS:
        raise RecipeError(
            f"{recipe.precision} is calibrated on real inputs: pass calibration_data with at least {_FEWEST_ROWS} rows "
            f"(a hundred and more are usual); given is {samples}",
            option="calibration_data",
        )


class _Unchanged:
    """The graph in the types that it has: as it is, or as it was rewritten for TensorRT."""

    def __init__(
        self,
        source: OnnxModel,
        rewritten: RewrittenModel,
        recipe: Recipe,
        workdir: Path,
        samples: Samples,
        tolerance: Tolerance | None,
        batch_axis: BatchAxis | None,
    ) -> None:
        self._source = source
        self._rewritten = rewritten
        self._recipe = recipe
        self._workdir = workdir
        self._samples = samples
        self._tolerance = tolerance
        self._batch_axis = batch_axis

    def make(self, kept: Mapping[str, str]) -> TypedModel:
        del kept  # everything is in the types that it had
        source, rewritten = self._source, self._rewritten
        report = self._report()
        if rewritten.proto is source.proto:
            return TypedModel(
                path=source.path,
                files=source.files,
                is_source=True,
                inputs=source.inputs,
                outputs=source.outputs,
                report=report,
            )
        path = _typed_path(self._workdir, self._recipe.precision)
        write_model(rewritten.proto, rewritten.folder, path)
        written = _written(path, report, source)
        return written if self._tolerance is None else self._compared(written, self._tolerance)

    def _compared(self, typed: TypedModel, tolerance: Tolerance) -> TypedModel:
        """With how far it is off; as it is where ONNX Runtime cannot tell, which whoever verifies it says."""
        names, samples = [spec.name for spec in self._source.outputs], self._samples
        try:
            reference = reference_outputs(self._source, samples.feeds)
        except (RuntimeUnavailableError, ExecutionError, InputError):
            return typed
        try:
            runner = IsolatedModel(typed.path, optimize=False)
            comparison = compare(
                f"the {self._recipe.precision} model, on ONNX Runtime,",
                str(samples),
                (
                    (runner.run(names, feeds), expected)
                    for feeds, expected in zip(samples.narrowed().feeds, reference, strict=False)
                ),
                tolerance,
                batch_axis=self._batch_axis,
            )
        except OutOfMemoryError:
            raise
        except ExecutionError as error:
            if self._rewritten.is_narrowed:
                raise UnsupportedModelError(
                    "the model computes with float64, which TensorRT has not, and with float32 in its place it does "
                    f"not run on ONNX Runtime: {error.message}. Export the model in float32, or log it with "
                    "mlflow.onnx, which runs it on ONNX Runtime"
                ) from error
            return replace(typed, reference=reference)
        return replace(typed, comparison=comparison, reference=reference)

    def _report(self) -> PrecisionReport:
        remarks = self._rewritten.remarks
        report = PrecisionReport(
            precision=self._recipe.precision, nodes=len(self._source.proto.graph.node), remarks=remarks
        )
        if self._recipe.precision not in _QUANTIZED:
            return report
        flat = flatten(self._rewritten, self._workdir)
        quantized = quantized_nodes(flat)
        remark = "the model brings its own QuantizeLinear nodes and is taken as it is"
        return replace(
            report,
            changed_nodes=len(quantized),
            share=share_of(flat, self._samples.narrowed().feeds[0])(quantized),
            remarks=(remark, *remarks),
        )


class _Retyped:
    """The graph that a precision pass makes."""

    def __init__(
        self,
        source: OnnxModel,
        rewritten: RewrittenModel,
        recipe: Recipe,
        workdir: Path,
        precision_pass: PrecisionPass,
        samples: Samples,
        tolerance: Tolerance | None,
        batch_axis: BatchAxis | None,
        cache: CalibrationCache | None = None,
    ) -> None:
        self._source = source
        self._recipe = recipe
        self._batch_axis = batch_axis
        self._workdir = workdir
        self._samples = samples.narrowed()
        self._source_digest = source.digest
        self._tolerance = tolerance or Tolerance()
        self._refines = tolerance is not None
        self._names = [spec.name for spec in source.outputs]
        with self._explaining_ignorance():
            self._reference = reference_outputs(source, samples.feeds)
        self._flat, self._remarks = self._flattened(rewritten, precision_pass)
        self._excluded = _excluded_nodes(self._flat, source.proto, recipe)
        with self._explaining_ignorance():
            self._remarks += self._clamp_masks(headroom_of(samples))
            evidence = self._evidence(cache)
        self._make = precision_pass.prepare(self._flat, evidence)

    def _evidence(self, cache: CalibrationCache | None) -> Evidence:
        """The ranges: seen on the samples, or those that were saved."""
        flat, samples, method = self._flat, self._samples, self._recipe.calibration_method
        if self._recipe.precision not in _QUANTIZED:
            return gather_evidence(flat, samples)
        digest = samples.sha256 if samples.is_evidence else None
        saved = None if cache is None else cache.usable(measured_tensors(flat), method, digest)
        evidence = gather_evidence(flat, samples, saved)
        if saved is not None:
            return replace(evidence, cutoffs=saved.cutoffs.get(str(method), {}))
        evidence = _calibrated(flat, evidence, method, self._workdir)
        if cache is not None:
            seen = {name: evidence.largest[name] for name in evidence.largest if name not in flat.constants}
            cutoffs = {} if method is CalibrationMethod.MINMAX else {str(method): evidence.cutoffs}
            cache.write(
                SavedRanges(
                    source_sha256=self._source_digest,
                    samples=str(samples),
                    samples_sha256=samples.sha256,
                    largest=seen,
                    not_finite={name: count for name, count in evidence.not_finite.items() if name in seen},
                    cutoffs=cutoffs,
                )
            )
        return evidence

    @contextmanager
    def _explaining_ignorance(self) -> Iterator[None]:
        try:
            yield
        except OutOfMemoryError:
            raise
        except ExecutionError as error:
            raise UnsupportedModelError(
                f"nothing is known of the values in this model, on which {self._recipe.precision} depends: "
                f"{error.message}. Take fp32 or tf32, or a release of ONNX Runtime that can run the model"
            ) from error

    def _clamp_masks(self, headroom: int) -> tuple[str, ...]:
        """Bring masks into what float16 holds, where the results on all samples are the same; says which."""
        if self._recipe.precision is not Precision.FP16:
            return ()
        largest = FLOAT16.largest / headroom / 2  # half of it, since scores are added
        clamped, names = clamp_masks(self._flat, largest)
        if not names:
            return ()
        path = self._workdir / "clamped.onnx"
        onnx.save_model(clamped.proto, path)
        runner = IsolatedModel(path)
        same = compare(
            "the model with clamped masks",
            str(self._samples),
            (
                (runner.run(self._names, feeds), reference)
                for feeds, reference in zip(self._samples.feeds, self._reference, strict=False)
            ),
            Tolerance(relative_error=_SAME_RESULTS),
        )
        if same.problems:
            return (f"masks stay as large as they are ({', '.join(names)}), since smaller ones change the results",)
        self._flat = clamped
        return (f"the masks {', '.join(names)} are {largest:.4g} at most, and the results on {self._samples} the same",)

    def _flattened(self, rewritten: RewrittenModel, precision_pass: PrecisionPass) -> tuple[FlatModel, tuple[str, ...]]:
        """In the first of the pass's opsets that the model can be raised to, and computes the same in."""
        precision, before = self._recipe.precision, opset_of(rewritten.proto)
        comes_in_half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in tensors_of(rewritten.proto))
        reasons: list[str] = []
        for opset in precision_pass.opsets(has_float16=comes_in_half):
            try:
                flat = flatten(
                    rewritten,
                    self._workdir,
                    opset,
                    keep=self._recipe.keep_float32,
                    widen=precision is Precision.BF16 and comes_in_half,
                    folds_dequantized=precision in _QUANTIZED,
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
        path = self._workdir / "raised.onnx"
        onnx.save_model(flat.proto, path)
        try:
            runner = IsolatedModel(path)
            pairs = list(zip(self._samples.feeds, self._reference, strict=False))[:_QUICK_FEEDS]
            comparison = compare(
                "the raised model",
                str(self._samples),
                ((runner.run(self._names, feeds), reference) for feeds, reference in pairs),
                _SAME,
            )
        except OutOfMemoryError:
            raise
        except ExecutionError as error:
            raise OpsetNotRaisedError(error.message) from error
        if comparison.problems:
            raise OpsetNotRaisedError(f"the model would compute something else: {'; '.join(comparison.problems)}")

    def make(self, kept: Mapping[str, str]) -> TypedModel:
        stays = self._excluded | dict(kept)
        if self._refines:
            graph, comparison = refine(self._flat, self._make, self._judge, self._judge_quickly, stays)
        else:
            graph = self._make(stays)
            comparison = self._judge(graph)
        report = replace(graph.report, remarks=(*self._remarks, *graph.report.remarks))
        path = _typed_path(self._workdir, self._recipe.precision)
        write_model(graph.proto, self._flat.folder, path)
        self._check_types(path)
        return replace(
            _written(path, report, self._source),
            comparison=comparison,
            reference=self._reference,
            changed=graph.changed,
        )

    def _check_types(self, path: Path) -> None:
        """Raise UnsupportedModelError where types do not fit together, of which a pass is the cause."""
        problem = _type_problem(path)
        before = self._workdir / "flat.onnx"
        onnx.save_model(self._flat.proto, before)
        if problem is not None and _type_problem(before) is None:
            raise UnsupportedModelError(
                f"the {self._recipe.precision} model would be no valid ONNX model: {problem}. Keep the operator in "
                "float32 with keep_float32, or take another precision"
            )

    def _judge(self, graph: TypedGraph) -> Comparison:
        return self._judge_on(graph, len(self._reference))

    def _judge_quickly(self, graph: TypedGraph) -> Comparison:
        """Good enough to rank graphs: optimized, if it is without the 8-bit nodes that ONNX Runtime fuses wrongly."""
        return self._judge_on(graph, _QUICK_FEEDS, optimize=self._recipe.precision not in _QUANTIZED)

    def _judge_on(self, graph: TypedGraph, count: int, *, optimize: bool = False) -> Comparison:
        path = self._workdir / "emulation.onnx"
        onnx.save_model(graph.emulation, path)
        # Not optimized, or values might be rounded less often than in the typed model.
        runner = IsolatedModel(path, optimize=optimize)
        pairs = list(zip(self._samples.feeds, self._reference, strict=False))[:count]
        return compare(
            f"the {self._recipe.precision} model, emulated on ONNX Runtime,",
            str(self._samples),
            ((runner.run(self._names, feeds), reference) for feeds, reference in pairs),
            self._tolerance,
            batch_axis=self._batch_axis,
        )


def _type_problem(path: Path) -> str | None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        return str(error).strip()
    return None


def _excluded_nodes(model: FlatModel, source: ModelProto, recipe: Recipe) -> dict[str, str]:
    """The nodes that the user keeps in float32."""
    kept = {}
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


def _calibrated(model: FlatModel, evidence: Evidence, method: CalibrationMethod, workdir: Path) -> Evidence:
    if method is CalibrationMethod.MINMAX:
        return evidence
    path = workdir / "flat.onnx"
    onnx.save_model(model.proto, path)
    cutoffs = calibrated_magnitudes(path, evidence.samples.feeds, str(method), sorted(QUANTIZABLE), workdir)
    return replace(evidence, cutoffs={name: cutoff for name, cutoff in cutoffs.items() if cutoff > 0})


def _typed_path(workdir: Path, precision: Precision) -> Path:
    folder = workdir / "typed"
    folder.mkdir(exist_ok=True)
    return folder / f"{precision}.onnx"


def _written(path: Path, report: PrecisionReport, source: OnnxModel) -> TypedModel:
    proto = onnx.load(path, load_external_data=False)
    inputs, outputs = (
        tuple(replace(spec, dtype=before.dtype) for spec, before in zip(specs, given, strict=True))
        for specs, given in zip(describe(proto, path), (source.inputs, source.outputs), strict=True)
    )
    files = {file.name: sha256_of(file) for file in (path, path.with_name(f"{path.name}.data")) if file.exists()}
    return TypedModel(path=path, files=files, is_source=False, inputs=inputs, outputs=outputs, report=report)
