"""A plan that exists already becomes an MLflow model: what trtexec, Polygraphy or a script built is served as it is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.models import ModelSignature
from mlflow.models.model import ModelInfo

from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.convert.recipe import Recipe, ShapesRequest
from mlflow_trt.core.compatibility import why_not
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.output_folder import check_target
from mlflow_trt.core.scratch import scratch_folder
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.types import BatchAxis, EngineRecord, InputRange, ShapeProfile, TensorSpec
from mlflow_trt.errors import OptionError, RuntimeUnavailableError
from mlflow_trt.flavor.describe import describe_version
from mlflow_trt.flavor.mlmodel import PackagingOptions, check_names, write_engine_model
from mlflow_trt.flavor.recognize import params_from, tags_from
from mlflow_trt.flavor.register import log_folder, register_version
from mlflow_trt.flavor.tracking import check_server
from mlflow_trt.flavor.undo import undo_on_failure
from mlflow_trt.runtime.cuda.device import Device, open_device
from mlflow_trt.store.engine_folder import EngineInterface, engine_record
from mlflow_trt.store.record import RECORD_FILE, read_record_file

TensorRequest = Mapping[str, tuple[str, Sequence[int]]]
"""Tensors by name: the dtype as numpy calls it, and the shape, with -1 for what varies."""

_DTYPES = frozenset({"float32", "float16", "bfloat16", "int8", "uint8", "int32", "int64", "bool"})
_log = get_logger(__name__)


def save_engine(
    plan: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    inputs: TensorRequest | None = None,
    outputs: TensorRequest | None = None,
    shapes: ShapesRequest | None = None,
    splits_batches: bool = False,
    targets: Sequence[str] | str | None = None,
    signature: ModelSignature | bool | None = None,
    input_example: Any = None,
    model_config: Mapping[str, Any] | None = None,
    pip_requirements: Any = None,
    extra_pip_requirements: Any = None,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Save a plan of TensorRT or TensorRT-RTX as an MLflow model in a folder; the arguments are those of `log_engine`.

    Args:
        path: the folder to write; it must not exist, or be empty. It is written whole or not at all.
    """
    check_target(Path(path))
    source = Path(plan)
    content = _read_plan(source)
    options = PackagingOptions(
        signature=signature,
        input_example=input_example,
        pip_requirements=pip_requirements,
        extra_pip_requirements=extra_pip_requirements,
        metadata=metadata,
        lineage={"source": source.name},
    )
    settings = LoadSettings.of(model_config)
    engine, interface = _examine(
        content, settings, inputs, outputs, shapes, splits_batches=splits_batches, targets=targets
    )
    write_engine_model(content, engine, interface, Path(path), options, settings)


def log_engine(
    plan: str | os.PathLike[str],
    name: str | None = None,
    *,
    inputs: TensorRequest | None = None,
    outputs: TensorRequest | None = None,
    shapes: ShapesRequest | None = None,
    splits_batches: bool = False,
    targets: Sequence[str] | str | None = None,
    signature: ModelSignature | bool | None = None,
    input_example: Any = None,
    model_config: Mapping[str, Any] | None = None,
    registered_model_name: str | None = None,
    pip_requirements: Any = None,
    extra_pip_requirements: Any = None,
    metadata: dict[str, Any] | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
) -> ModelInfo:
    """Log a plan of TensorRT or TensorRT-RTX as an MLflow model, as it is.

    The model has no source: it cannot be rebuilt for another GPU or release of TensorRT, run on ONNX Runtime or be
    compared with what it was made of. Where there is the ONNX model, `log_model` gives all of that.

    Args:
        plan: the file. It is executable content: take it from where you would take a program from.
        name: the name of the logged model.
        inputs: {name: (dtype, shape)}, the dtype as numpy calls it or `bfloat16`, -1 for what varies. None asks the
            engine, on a GPU of this machine that it was built for.
        outputs: likewise.
        shapes: {input: (min, opt, max)} shapes that the engine allows; a list for several optimization profiles. None
            asks the engine, too; without a GPU, inputs of fixed shapes need none.
        splits_batches: axis 0 of every input and output that varies counts rows, and these do not depend on each
            other, so that batches of any size may be split and padded.
        targets: compute capabilities that it was built for, such as `sm86`. None: the GPU of this machine, and
            without one, or with TensorRT-RTX, Ampere and later.
        model_config: load settings (see LoadSettings) that the model gets as its defaults.
        registered_model_name: register a version under this name, creating the registered model if need be.
        signature: as for `save_model`.
        input_example: as for `save_model`.
        pip_requirements: as for `save_model`.
        extra_pip_requirements: as for `save_model`.
        metadata: as for `save_model`.
        params: as for `log_model`.
        tags: as for `log_model`.

    Returns:
        What every MLflow flavor returns: the logged model's URI, signature and, if registered, version.

    Raises:
        OptionError: it is no plan, or what is said of its tensors makes no sense or is not enough.
        RuntimeUnavailableError: neither inputs and outputs are given, nor is there a GPU to ask the engine on.
        EngineMismatchError: the plan is not for this machine's GPU and TensorRT.
        ExecutionError: TensorRT does not load the plan.
    """
    check_names(registered_model_name, tags, logged_model_name=name)
    check_server()
    with scratch_folder() as staging, undo_on_failure() as undo:
        folder = staging / "model"
        source = Path(plan)
        content = _read_plan(source)
        options = PackagingOptions(
            signature=signature,
            input_example=input_example,
            pip_requirements=pip_requirements,
            extra_pip_requirements=extra_pip_requirements,
            metadata=metadata,
            lineage={"source": source.name},
        )
        settings = LoadSettings.of(model_config)
        engine, interface = _examine(
            content, settings, inputs, outputs, shapes, splits_batches=splits_batches, targets=targets
        )
        written = write_engine_model(content, engine, interface, folder, options, settings)
        record, _ = read_record_file(folder / RECORD_FILE)
        wanted = {**tags_from(record), **(tags or {})}
        facts, description = params_from(record), describe_version(record)
        info = log_folder(
            undo,
            folder,
            written,
            name=name,
            params={**facts, **(params or {})},
            tags=wanted,
            description=description,
        )
        if registered_model_name is not None:
            version = register_version(
                undo, registered_model_name, str(info.model_id), tags=wanted, description=description
            )
            info.registered_model_version = version.version
    return info


def _read_plan(plan: Path) -> bytes:
    try:
        return plan.read_bytes()
    except OSError as error:
        raise OptionError(f"the plan {plan} cannot be read: {error.strerror}", option="plan") from None


def _examine(
    plan: bytes,
    settings: LoadSettings,
    inputs: TensorRequest | None,
    outputs: TensorRequest | None,
    shapes: ShapesRequest | None,
    *,
    splits_batches: bool,
    targets: Sequence[str] | str | None,
) -> tuple[EngineRecord, EngineInterface]:
    """What is known of a plan: what was given, and the rest by asking the engine."""
    recipe = Recipe.of(None, shapes=shapes, targets=targets)
    engine = engine_record(plan, targets=recipe.targets)
    if (inputs is None) != (outputs is None):
        raise OptionError("give both of inputs and outputs, or none to ask the engine", option="inputs")
    if inputs is not None and outputs is not None:
        specs, results = _specs(inputs, "inputs"), _specs(outputs, "outputs")
        profiles = _profiles(recipe, specs)
    else:
        specs, results, profiles, device = _ask(plan, engine, settings)
        if not recipe.targets and not trt.load(engine.distribution).is_rtx:
            engine = engine_record(plan, targets=(str(device.gpu.compute_capability),), gpu=device.gpu.name)
    axis = _batch_axis(specs, results) if splits_batches else None
    return engine, EngineInterface(inputs=specs, outputs=results, profiles=profiles, batch_axis=axis)


def _profiles(recipe: Recipe, inputs: Sequence[TensorSpec]) -> tuple[ShapeProfile, ...]:
    """The optimization profiles that were given, checked against the inputs."""
    specs = {spec.name: spec for spec in inputs}
    varying = [spec.name for spec in inputs if None in spec.fixed]
    profiles = []
    for number, shapes in enumerate(recipe.shapes):
        missing = [name for name in varying if name not in shapes]
        if missing:
            raise OptionError(f"shapes lacks the input {missing[0]!r} in profile {number}", option="shapes")
        ranges = {}
        for name, (low, usual, high) in shapes.items():
            fixed = specs[name].fixed if name in specs else ()
            limits = InputRange(min=low, opt=usual, max=high)
            fits = len(low) == len(fixed) and all(
                size in {None, least, most} and least <= middle <= most and (size is None or least == most)
                for size, least, middle, most in zip(fixed, low, usual, high, strict=True)
            )
            if not fits:
                known = specs.get(name, f"no input; there are {', '.join(specs)}")
                raise OptionError(f"shapes gives {limits} for {name!r}, which is {known}", option="shapes")
            ranges[name] = limits
        profiles.append(ShapeProfile(ranges=ranges))
    if varying and not profiles:
        raise OptionError(f"the sizes of input {varying[0]!r} vary: give shapes, what they may be", option="shapes")
    return tuple(profiles)


def _ask(
    plan: bytes, record: EngineRecord, settings: LoadSettings
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], tuple[ShapeProfile, ...], Device]:
    """The tensors and profiles of an engine, which is loaded for it."""
    try:
        tensorrt = trt.load(record.distribution)
        device = open_device(settings.first_device)
    except RuntimeUnavailableError as error:
        raise error.with_advice(
            wanted="what is not given of inputs, outputs and shapes the engine has to be asked for",
            advice="Give inputs= and outputs=, and shapes= where shapes vary.",
        ) from error
    reason = why_not(record, tensorrt.distribution, tensorrt.version, device.gpu)
    if reason is not None:
        raise OptionError(f"the plan does not run here: {reason}. Give inputs= and outputs=", option="inputs")
    from mlflow_trt.runtime.engine.engine import Engine

    with device.current():
        engine = Engine(plan, tensorrt, device, cuda_graphs=False)
        try:
            specs, results = (
                tuple(engine.spec_of(name) for name in names) for names in (engine.inputs, engine.outputs)
            )
            return specs, results, engine.profiles if any(p.ranges for p in engine.profiles) else (), device
        finally:
            engine.close()


def _specs(given: TensorRequest, option: str) -> tuple[TensorSpec, ...]:
    found = []
    for name, tensor in given.items():
        try:
            dtype, shape = tensor
            dims = tuple(None if int(size) == -1 else int(size) for size in shape)
        except (TypeError, ValueError):
            raise OptionError(
                f"{option}[{name!r}] is {tensor!r}; expected a dtype and a shape, like ('float32', (-1, 3, 224, 224))",
                option=option,
            ) from None
        if dtype not in _DTYPES or any(size is not None and size < 0 for size in dims):
            raise OptionError(
                f"{option}[{name!r}] is {tensor!r}; expected one of {', '.join(sorted(_DTYPES))}, and sizes of 0 or "
                "more, or -1",
                option=option,
            )
        found.append(TensorSpec(name=name, dtype=dtype, shape=dims))
    if not found:
        raise OptionError(f"{option} names no tensor", option=option)
    return tuple(found)


def _batch_axis(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> BatchAxis:
    carriers = tuple(spec.name for spec in inputs if spec.shape and spec.fixed[0] is None)
    without = [spec.name for spec in outputs if not spec.shape or spec.fixed[0] is not None]
    if not carriers or without:
        what = f"the outputs {', '.join(without)} have none" if without else "no input has one that varies"
        raise OptionError(
            f"batches are split along axis 0, and {what}; leave splits_batches out", option="splits_batches"
        )
    return BatchAxis(inputs=carriers, splits=True, declared=True)
