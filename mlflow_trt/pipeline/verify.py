"""Verification: typed model and engine against the source model on ONNX Runtime, on the same inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.convert.conversion import Conversion
from mlflow_trt.convert.engine.output_shapes import check_output_shapes
from mlflow_trt.convert.onnx.reference import reference_outputs
from mlflow_trt.convert.samples import Samples
from mlflow_trt.core.accuracy import Comparison, Tolerance, Verdict
from mlflow_trt.core.arrays import Feeds, Outputs
from mlflow_trt.core.comparing import compare
from mlflow_trt.core.compatibility import why_not
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.types import BatchAxis, Precision, Weights, is_placeholder
from mlflow_trt.errors import AccuracyError, ExecutionError, InputError, OnnxModelError, RuntimeUnavailableError
from mlflow_trt.runtime.cuda.device import open_device
from mlflow_trt.runtime.session import Session
from mlflow_trt.store.golden import Golden, golden_of
from mlflow_trt.store.load import kernel_file, session_on
from mlflow_trt.store.plugins import load_plugins

if TYPE_CHECKING:
    from mlflow_trt.runtime.tensorrt_session import TensorRTSession

_log = get_logger(__name__)

_STRICT_FLOAT32 = 2e-5
"""Relative error that float32 stays below and TF32, with its 10 bits of mantissa, does not."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was compared, what of it is kept for the self-test at load, and what the user should know."""

    tolerance: Tolerance
    comparisons: tuple[Comparison, ...] = ()
    golden: Golden | None = None
    remarks: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict | None:
        """None where nothing was compared."""
        return overall_verdict(self.comparisons)


def overall_verdict(comparisons: Sequence[Comparison]) -> Verdict | None:
    """The worst of several verdicts; None where nothing was compared."""
    verdicts = [comparison.verdict for comparison in comparisons]
    worst = next((verdict for verdict in (Verdict.FAILED, Verdict.INCONCLUSIVE) if verdict in verdicts), None)
    return worst or (Verdict.PASSED if verdicts else None)


def verify_conversion(
    conversion: Conversion, tolerance: Tolerance, settings: LoadSettings, *, demanded: bool
) -> Verification:
    """Compare the typed model, and the engine where this machine can run it, with the source model.

    Args:
        demanded: the user set the tolerance, so that a comparison which proves nothing is not good enough.

    Raises:
        AccuracyError: something is beyond the tolerance, or proves nothing although it was demanded.
        UnsupportedModelError: TensorRT's network has outputs of other shapes than the source model.
    """
    verification = measure_conversion(conversion, tolerance, settings, demanded=demanded)
    judge(verification, demanded=demanded, is_evidence=conversion.samples.is_evidence)
    return verification


def measure_conversion(
    conversion: Conversion, tolerance: Tolerance, settings: LoadSettings, *, demanded: bool
) -> Verification:
    """The numbers of `verify_conversion`, without its judgement."""
    remarks: list[str] = []
    comparisons = [] if conversion.typed.comparison is None else [conversion.typed.comparison]
    try:
        reference = conversion.typed.reference or reference_outputs(conversion.source, conversion.samples.feeds)
    except (RuntimeUnavailableError, ExecutionError, InputError) as error:
        if demanded:
            raise
        _log.warning("The model is not verified: %s", error.message)
        return Verification(tolerance=tolerance, remarks=(f"not verified: {error.message}",))
    _check_rows(conversion, reference)
    samples = zip(conversion.samples.feeds, reference, strict=False)
    check_output_shapes(conversion.engine, conversion.shapes, samples, conversion.profiles.batch_axis)
    golden = golden_of(conversion, reference[0])
    if golden is None:
        remarks.append("there is no golden sample for a self-test, since a single row is too large to be stored")
    reason = why_not_here(conversion, settings)
    if reason is not None:
        remarks += _remark_on_engine(reason, conversion)
    else:
        engine = _compare_engine(conversion, reference, tolerance, settings)
        comparisons.append(engine)
        remarks += _remark_on_tf32(conversion, engine)
    return Verification(tolerance=tolerance, comparisons=tuple(comparisons), golden=golden, remarks=tuple(remarks))


def _check_rows(conversion: Conversion, reference: Sequence[Outputs]) -> None:
    """Raise OnnxModelError where the model declares that an output has a row for each row of input, and it has not."""
    axis = conversion.profiles.batch_axis
    if axis is None or not axis.splits:
        return
    source = conversion.source
    specs = {spec.name: spec for spec in (*source.inputs, *source.outputs)}
    rows_are_called = specs[axis.inputs[0]].shape[0]
    for feeds, outputs in zip(conversion.samples.feeds, reference, strict=False):
        rows = feeds[axis.inputs[0]].shape[0]
        for name, array in outputs.items():
            declared = specs[name].shape[:1]
            counts_rows = declared == (rows_are_called,) and not is_placeholder(rows_are_called)
            if (declared and not array.ndim) or (counts_rows and array.shape[0] != rows):
                raise OnnxModelError(
                    f"the model declares the output {specs[name]}, and ONNX Runtime computes one of the shape "
                    f"{array.shape} for {rows} rows, so they cannot be told apart. Export the model with an output "
                    "that has axis 0 of the inputs, or convert it for one batch of fixed size",
                    path=source.path,
                )


def compare_sessions(
    subject: Session, reference: Session, samples: Samples, tolerance: Tolerance, batch_axis: BatchAxis | None
) -> Comparison:
    """What `subject` computes against `reference`, piece by piece."""
    return compare(
        subject.description,
        str(samples),
        ((subject.run(feeds), reference.run(feeds)) for feeds in samples.feeds),
        tolerance,
        batch_axis=batch_axis,
    )


def metrics_of(comparisons: Iterable[Comparison]) -> dict[str, float]:
    """The numbers as MLflow metrics. The last comparison, which is the nearest to the hardware, counts."""
    metrics: dict[str, float] = {}
    for comparison in comparisons:
        for output in comparison.outputs:
            prefix = f"mlflow_trt/{comparison.metric_parts[output.name]}"
            metrics |= {
                f"{prefix}/relative_error": output.relative_error,
                f"{prefix}/max_abs_error": output.max_abs_error,
                f"{prefix}/mean_abs_error": output.mean_abs_error,
                f"{prefix}/cosine_similarity": output.cosine_similarity,
            }
            others = {
                "top_class_agreement": output.top_class_agreement,
                "median_row_error": output.median_row_error,
                "worst_row_error": output.worst_row_error,
            }
            metrics |= {f"{prefix}/{name}": number for name, number in others.items() if number is not None}
    return metrics


def _remark_on_engine(reason: str, conversion: Conversion) -> list[str]:
    """What was not measured, where the engine does not run here."""
    if conversion.typed.comparison is not None:
        _log.info("The engine is not compared here: %s", reason)
        return []
    why = "is the source model itself" if conversion.typed.is_source else "does not run on ONNX Runtime"
    remark = (
        f"the accuracy was not measured: the engine cannot run here ({reason}), and the {conversion.recipe.precision} "
        f"typed model, which could be compared in its place, {why}. Run `mlflow-trt verify` where there is a GPU"
    )
    _log.info("%s", remark)
    return [remark]


def _compare_engine(
    conversion: Conversion, reference: Sequence[Outputs], tolerance: Tolerance, settings: LoadSettings
) -> Comparison:
    with engine_session(conversion, settings) as session:
        pairs = _run(session, conversion.samples.feeds, reference)
        axis = conversion.profiles.batch_axis
        return compare(session.description, str(conversion.samples), pairs, tolerance, batch_axis=axis)


def why_not_here(conversion: Conversion, settings: LoadSettings) -> str | None:
    """Why this machine cannot run the engine of a conversion, or None where nothing speaks against it."""
    try:
        tensorrt = trt.load(conversion.engine.distribution)
        device = open_device(settings.first_device)
    except RuntimeUnavailableError as error:
        return error.message
    return why_not(conversion.engine, tensorrt.distribution, tensorrt.version, device.gpu)


def engine_session(conversion: Conversion, settings: LoadSettings) -> TensorRTSession:
    """A session on the engine of a conversion, which this machine can run. Raises what TensorRTSession raises."""
    tensorrt = trt.load(conversion.engine.distribution)
    load_plugins(tensorrt, conversion.recipe.plugins)
    device = open_device(settings.first_device)
    return session_on(
        conversion.plan.read_bytes(),
        tensorrt=tensorrt,
        device=device,
        settings=settings,
        inputs=conversion.typed.inputs,
        outputs=conversion.typed.outputs,
        batch_axis=conversion.profiles.batch_axis,
        store=kernel_file(conversion.engine, tensorrt, device),
        weights_from=conversion.typed.path if conversion.engine.weights is Weights.STRIPPED else None,
        weight_streaming=conversion.recipe.weight_streaming,
    )


def _run(session: Session, feeds: Sequence[Feeds], reference: Sequence[Outputs]) -> Iterator[tuple[Outputs, Outputs]]:
    for one, expected in zip(feeds, reference, strict=False):
        yield session.run(one), expected


def _remark_on_tf32(conversion: Conversion, engine: Comparison) -> list[str]:
    if conversion.recipe.precision is not Precision.FP32 or engine.relative_error < _STRICT_FLOAT32:
        return []
    remark = (
        f"fp32 was asked for, and the relative error measured on the GPU is {engine.relative_error:.1e}: "
        "that of TF32, not of strict float32"
    )
    return [remark]


def judge(verification: Verification, *, demanded: bool, is_evidence: bool) -> None:
    """Raise AccuracyError for what `verify_conversion` does not accept, and warn of what proves nothing."""
    advice = (
        "Choose another precision, keep nodes in float32 with keep_float32, or allow more with verify=Tolerance(...)."
    )
    if not is_evidence:
        advice = f"Pass calibration_data= with real inputs, which noise may be unlike. {advice}"
    for comparison in verification.comparisons:
        if comparison.verdict is Verdict.FAILED:
            raise AccuracyError(
                f"{comparison.subject} is too far from the source model on {comparison.inputs}: "
                f"{'; '.join(comparison.problems)}. Nothing was logged. {advice}",
                comparison=comparison,
            )
        if comparison.hidden_rows:
            _log.warning(
                "%s passes the tolerance that was given, which does not judge rows, and these are off: %s. "
                "Tolerance(median_row_error=..., worst_row_error=...) judges them.",
                comparison.subject,
                "; ".join(comparison.hidden_rows),
            )
        if comparison.verdict is Verdict.INCONCLUSIVE:
            text = (
                f"{comparison.subject} cannot be judged on {comparison.inputs}: the reference hardly varies, so that "
                "agreement proves nothing"
            )
            if demanded:
                raise AccuracyError(
                    f"{text}. Nothing was logged. Pass calibration_data= with real inputs, or verify=False.",
                    comparison=comparison,
                )
            _log.warning("%s; pass calibration_data= with real inputs", text)
