"""From a source model and what was asked for to what is going to be written: convert, verify, and for `best` choose."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import onnx

from mlflow_trt.backends.onnxruntime_process import shared_process
from mlflow_trt.convert.conversion import Conversion, ConversionTask, check_share, convert_source
from mlflow_trt.convert.onnx.model import OnnxModel, read_onnx
from mlflow_trt.core.accuracy import Tolerance
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.progress import choose_progress
from mlflow_trt.core.scratch import scratch_folder
from mlflow_trt.core.selection import Selection
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.types import Precision
from mlflow_trt.pipeline.bench import Bench
from mlflow_trt.pipeline.best import check_best, convert_best
from mlflow_trt.pipeline.compile_kernels import KernelCompiler, check_kernels
from mlflow_trt.pipeline.options import ConversionOptions
from mlflow_trt.pipeline.user_samples import example_shapes, sample_data_of
from mlflow_trt.pipeline.verify import Verification, verify_conversion

_log = get_logger(__name__)

OnnxSource = str | os.PathLike[str] | onnx.ModelProto


@dataclass(frozen=True, kw_only=True)
class PreparedConversion:
    """Options that can be carried out on this machine, and the GPU for those that need one."""

    options: ConversionOptions
    bench: Bench | None
    compiler: KernelCompiler | None


@dataclass(frozen=True, kw_only=True)
class ConvertedModel:
    """What is going to be written.

    `selection` tells how the precision was chosen, where `best` was asked for; `compiler` is for the kernels that are
    to be stored with it.
    """

    conversion: Conversion
    verification: Verification | None
    settings: LoadSettings
    selection: Selection | None = None
    compiler: KernelCompiler | None = None


def prepare_conversion(options: ConversionOptions) -> PreparedConversion:
    """Find out what cannot be measured or compiled here, before a model is downloaded, exported or read.

    Raises what `check_best` and `check_kernels` raise.
    """
    recipe, settings = options.recipe, options.settings
    bench = check_best(recipe, settings, options.verify, options.bench) if recipe.precision is Precision.BEST else None
    compiler = check_kernels(recipe, settings, options.compiler) if options.store_kernels else None
    return PreparedConversion(options=options, bench=bench, compiler=compiler)


@contextmanager
def open_onnx(model: OnnxSource, options: ConversionOptions) -> Iterator[OnnxModel]:
    """Read, check and hash a source model, once, for the length of the block. Raises what `read_onnx` raises."""
    with scratch_folder() as workdir:
        yield read_onnx(
            model,
            workdir,
            allow_external_data_from=options.external_data_folder,
            save_as_external_data=options.save_as_external_data,
        )


@contextmanager
def convert_and_verify(
    source: OnnxModel, prepared: PreparedConversion, input_example: Any = None
) -> Iterator[ConvertedModel]:
    """Convert and verify in a temporary folder, which is removed when the block ends, however it ends."""
    options = prepared.options
    with scratch_folder() as workdir:
        task = ConversionTask(
            source=source,
            recipe=options.recipe,
            workdir=workdir,
            data=sample_data_of(options.calibration_data, input_example, source.inputs),
            tolerance=options.required_tolerance,
            example_shapes=example_shapes(input_example, source.inputs),
            calibration_cache=options.calibration_cache_file,
        )
        with shared_process():
            converted = _convert_best(task, prepared) if prepared.bench is not None else _convert(task, prepared)
        yield converted


def _convert_best(task: ConversionTask, prepared: PreparedConversion) -> ConvertedModel:
    options = prepared.options
    assert prepared.bench is not None  # noqa: S101  # else another precision was asked for
    with choose_progress(f"Trying the precisions of {_name_of(task.source)}", options.progress) as shown:
        best = convert_best(replace(task, progress=shown), prepared.bench, options.settings)
    return ConvertedModel(
        conversion=best.conversion,
        verification=best.verification,
        settings=options.settings,
        selection=best.selection,
        compiler=prepared.compiler,
    )


def _convert(task: ConversionTask, prepared: PreparedConversion) -> ConvertedModel:
    options = prepared.options
    tolerance = task.tolerance or Tolerance.default(options.recipe.precision)
    with choose_progress(f"Building a TensorRT engine of {_name_of(task.source)}", options.progress) as shown:
        conversion = convert_source(replace(task, tolerance=tolerance if options.verify else None, progress=shown))
    check_share(conversion.typed.report)
    engine = conversion.engine
    _log.info("Built %s, %.1f MB, in %.1f s", engine, engine.size / 1e6, engine.build_seconds)
    verification = None
    if options.verify:
        required = options.required_tolerance is not None
        verification = verify_conversion(conversion, tolerance, options.settings, demanded=required)
    return ConvertedModel(
        conversion=conversion,
        verification=verification,
        settings=options.settings,
        compiler=prepared.compiler,
    )


def _name_of(source: OnnxModel) -> str:
    return source.proto.graph.name or source.path.name
