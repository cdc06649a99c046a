"""From what was asked for to what is going to be written: convert, verify, and for `best` choose."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import onnx

from mlflow_trt.convert.conversion import Conversion, convert
from mlflow_trt.convert.onnx.model import OnnxModel, read_onnx
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.core.accuracy import Tolerance
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.progress import told_progress
from mlflow_trt.core.progress_event import Progress
from mlflow_trt.core.selection import Selection
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.types import Precision
from mlflow_trt.errors import RecipeError
from mlflow_trt.pipeline.best import check_best, convert_best
from mlflow_trt.pipeline.compile_kernels import KernelCompiler, check_kernels
from mlflow_trt.pipeline.user_samples import example_shapes, sample_data_of
from mlflow_trt.pipeline.verify import Verification, verify_conversion

_log = get_logger(__name__)

OnnxSource = str | os.PathLike[str] | onnx.ModelProto


class Asked(NamedTuple):
    """What decides about the engine and its verification."""

    recipe: Recipe
    calibration_data: Any
    input_example: Any
    verify: Tolerance | bool
    settings: LoadSettings
    store_kernels: bool = False


class Made(NamedTuple):
    """What came of it.

    `selection` tells how the precision was chosen, where `best` was asked for; `compiler` is for the kernels that are
    to be stored with it.
    """

    conversion: Conversion
    verification: Verification | None
    selection: Selection | None = None
    compiler: KernelCompiler | None = None


@contextmanager
def converted(onnx_model: OnnxSource, asked: Asked, progress: Progress | None) -> Iterator[Made]:
    """Convert and verify in a temporary folder, which is removed when the block ends, however it ends."""
    if not isinstance(asked.verify, (bool, Tolerance)):
        raise RecipeError(f"verify is {asked.verify!r}; expected True, False or a Tolerance", option="verify")
    demanded = isinstance(asked.verify, Tolerance)
    tolerance = asked.verify if isinstance(asked.verify, Tolerance) else Tolerance.default(asked.recipe.precision)
    compiler = check_kernels(asked.recipe, asked.settings) if asked.store_kernels else None
    bench = check_best(asked.recipe, asked.settings, asked.verify) if asked.recipe.precision is Precision.BEST else None
    with tempfile.TemporaryDirectory(prefix="mlflow-trt-") as workdir:
        source = read_onnx(onnx_model, Path(workdir))
        data = sample_data_of(asked.calibration_data, asked.input_example, source.inputs)
        shapes = example_shapes(asked.input_example, source.inputs)
        if bench is not None:
            with told_progress(f"Trying the precisions of {_name_of(source)}", progress) as shown:
                best = convert_best(
                    source,
                    asked.recipe,
                    Path(workdir),
                    bench,
                    asked.settings,
                    data=data,
                    tolerance=tolerance if demanded else None,
                    example_shapes=shapes,
                    progress=shown,
                )
            yield Made(best.conversion, best.verification, best.selection, compiler)
            return
        with told_progress(f"Building a TensorRT engine of {_name_of(source)}", progress) as shown:
            conversion = convert(
                source,
                asked.recipe,
                Path(workdir),
                data=data,
                tolerance=tolerance if asked.verify else None,
                example_shapes=shapes,
                progress=shown,
            )
        engine = conversion.engine
        _log.info("Built %s, %.1f MB, in %.1f s", engine, engine.size / 1e6, engine.build_seconds)
        verification = None
        if asked.verify:
            verification = verify_conversion(conversion, tolerance, asked.settings, demanded=demanded)
        yield Made(conversion, verification, compiler=compiler)


def _name_of(source: OnnxModel) -> str:
    return source.proto.graph.name or source.path.name
