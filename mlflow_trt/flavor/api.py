"""The MLflow face: save, log and load models of the flavor `mlflow_trt`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.models import Model, ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.tracking._model_registry import DEFAULT_AWAIT_MAX_SLEEP_SECONDS
from mlflow.utils.model_utils import _add_code_from_conf_to_system_path

from mlflow_trt.convert.recipe import BatchRequest, Recipe, ShapesRequest
from mlflow_trt.core.accuracy import Tolerance
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.output_folder import check_target
from mlflow_trt.core.progress import choose_progress
from mlflow_trt.core.progress_event import Progress
from mlflow_trt.core.settings import (
    CudaGraphs,
    DeviceRequest,
    KernelSpecialization,
    LoadSettings,
    ModelConfig,
    OnMismatch,
    Runtime,
    WarmUp,
    with_settings,
)
from mlflow_trt.core.types import Precision
from mlflow_trt.errors import OptionError
from mlflow_trt.flavor.conversions import LoggingOptions, log_conversion, save_conversion
from mlflow_trt.flavor.fetch import fetch_folder, model_config_here, model_config_of, read_mlmodel
from mlflow_trt.flavor.mlmodel import PackagingOptions
from mlflow_trt.flavor.tracking import check_server
from mlflow_trt.flavor.undo import undo_on_failure
from mlflow_trt.flavor.whole.loading import split_config
from mlflow_trt.pipeline.make import OnnxSource, open_onnx, prepare_conversion
from mlflow_trt.pipeline.options import ConversionOptions
from mlflow_trt.runtime.session import Session
from mlflow_trt.store.load import open_session
from mlflow_trt.store.record import FLAVOR_NAME

_log = get_logger(__name__)


def save_model(
    onnx_model: OnnxSource,
    path: str | os.PathLike[str],
    *,
    precision: Precision | str | None = None,
    batch: BatchRequest | None = None,
    shapes: ShapesRequest | None = None,
    recipe: Recipe | None = None,
    targets: Sequence[str] | str | None = None,
    calibration_data: Any = None,
    calibration_cache: str | os.PathLike[str] | None = None,
    verify: Tolerance | bool = True,
    store_kernels: bool = False,
    signature: ModelSignature | bool | None = None,
    input_example: Any = None,
    model_config: ModelConfig = None,
    allow_external_data_from: str | os.PathLike[str] | None = None,
    conda_env: Any = None,
    code_paths: list[str] | None = None,
    mlflow_model: Model | None = None,
    pip_requirements: Any = None,
    extra_pip_requirements: Any = None,
    metadata: dict[str, Any] | None = None,
    extra_files: list[str] | None = None,
    save_as_external_data: bool | None = None,
    onnx_execution_providers: Sequence[Any] | None = None,
    onnx_session_options: Mapping[str, Any] | None = None,
    lineage: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Convert an ONNX model and save it, with its engine, as an MLflow model in a folder.

    Args:
        onnx_model: the path of an ONNX file, with its external data beside it, or an onnx.ModelProto, which is not
            changed. Models above 2 GB need a path.
        path: the folder to write; it must not exist, or be empty. It is written whole or not at all.
        precision: `fp32` (default), `tf32`, `fp16`, `bf16`, `int8`, `fp8`; or `best`, the fastest of these that is
            accurate enough, measured on the GPU of this machine.
        batch: rows along axis 0: a number for a static batch, (min, opt, max) for a range, None to take it from the
            model. Other sizes are split and padded where every output carries the batch axis.
        shapes: {input: (min, opt, max)} shapes of inputs with other axes that vary; a list makes several optimization
            profiles. Axes that share a name share their range, and -1 is filled in from `batch` or the model.
        recipe: everything about the engine in one object, instead of the four keywords above and `targets`.
        targets: compute capabilities to build for, such as `["sm86", "sm120"]`; TensorRT-RTX only.
        calibration_data: real inputs, which ranges are seen on and results compared on: the path of an `.npz` or `.npy`
            file, an array, {input: array}, an iterable of such mappings, a DataFrame, or an MLflow dataset. int8 and
            fp8 need it; without it, the input example serves the other precisions, and noise if there is none.
        calibration_cache: for int8 and fp8, a file of JSON: the ranges that were seen on the calibration data are
            written to it, and read from it the next time, then also without the data.
        verify: how far the model may be off from the source model; True takes what is usual for the precision. Nodes
            are kept in float32 until it is met; a model beyond it is refused. The first rows and their results are
            stored with the model for the self-test at load. False measures and stores nothing.
        store_kernels: compile what TensorRT-RTX otherwise compiles when shapes are first run, on the GPU of this
            machine, and store it with the model, so that machines like this one answer fast from the first call on.
        signature: None derives one of the outputs; the model checks its inputs itself. True derives one of named
            tensors, in and out, that MLflow enforces, which casts DataFrames and JSON. With False the model gets none.
        input_example: stored with the model. Its shapes fix the axes that nothing else says anything about.
        model_config: load settings (see LoadSettings) that the model gets as its defaults, or a file of YAML with them.
        allow_external_data_from: a folder that symbolic links among the model's external data may lead into, such as
            `blobs` of Hugging Face's cache. Without it they may only lead to files beside the model.
        lineage: where the source model came from; kept in the record.
        progress: called while the engine is built; None shows it on standard error.
        save_as_external_data: True keeps the weights in a file beside `model.onnx`, False in it; None leaves them where
            the source has them.
        onnx_execution_providers: where ONNX Runtime runs the model if it is the runtime, as for
            `mlflow.onnx.save_model`: names of providers, or (name, options). It becomes a load setting. None: the CPU.
        onnx_session_options: how it runs it, as for `mlflow.onnx.save_model`; it becomes a load setting.
        conda_env: as for `mlflow.onnx.save_model`; None gives what `get_default_conda_env` does.
        code_paths: files and folders of Python code that are stored with the model and importable once it is loaded.
        mlflow_model: the MLflow model to add the flavor to.
        pip_requirements: as for `mlflow.onnx.save_model`, instead of the default ones.
        extra_pip_requirements: more requirements, beside the default ones.
        metadata: any mapping, stored in the MLmodel file.
        extra_files: more files to store with the model.

    Raises:
        OnnxModelError: the model cannot be read, lacks weights, or has inputs or outputs that TensorRT cannot have.
        RecipeError: the recipe contradicts itself or the model.
        OptionError: another argument makes no sense.
        BuildError: TensorRT built no engine.
        UnsupportedModelError: it cannot run the model; the text names the nodes, or the output that would be wrong.
        InputError: the calibration data does not fit the model.
        AccuracyError: the converted model is too far from the source model.
        MissingDependencyError: no TensorRT is installed, or no ONNX Runtime where the precision needs it.
        RuntimeUnavailableError: `best` or `store_kernels` was asked for, and there is no GPU for it.
    """
    check_target(Path(path))
    options = ConversionOptions(
        recipe=Recipe.of(recipe, precision=precision, batch=batch, shapes=shapes, targets=targets),
        calibration_data=calibration_data,
        calibration_cache=calibration_cache,
        verify=verify,
        store_kernels=store_kernels,
        model_config=with_settings(
            model_config,
            onnx_execution_providers=onnx_execution_providers,
            onnx_session_options=onnx_session_options,
        ),
        save_as_external_data=save_as_external_data,
        allow_external_data_from=allow_external_data_from,
        progress=progress,
    )
    packaging = PackagingOptions(
        signature=signature,
        input_example=input_example,
        conda_env=conda_env,
        code_paths=code_paths,
        pip_requirements=pip_requirements,
        extra_pip_requirements=extra_pip_requirements,
        metadata=metadata,
        extra_files=extra_files,
        lineage=lineage or {},
    )
    prepared = prepare_conversion(options)
    with open_onnx(onnx_model, options) as source:
        save_conversion(source, Path(path), prepared, packaging, mlflow_model)


def log_model(
    onnx_model: OnnxSource,
    name: str | None = None,
    *,
    artifact_path: str | None = None,
    precision: Precision | str | None = None,
    batch: BatchRequest | None = None,
    shapes: ShapesRequest | None = None,
    recipe: Recipe | None = None,
    targets: Sequence[str] | str | None = None,
    calibration_data: Any = None,
    calibration_cache: str | os.PathLike[str] | None = None,
    verify: Tolerance | bool = True,
    store_kernels: bool = False,
    signature: ModelSignature | bool | None = None,
    input_example: Any = None,
    model_config: ModelConfig = None,
    allow_external_data_from: str | os.PathLike[str] | None = None,
    registered_model_name: str | None = None,
    await_registration_for: int | None = DEFAULT_AWAIT_MAX_SLEEP_SECONDS,
    conda_env: Any = None,
    code_paths: list[str] | None = None,
    pip_requirements: Any = None,
    extra_pip_requirements: Any = None,
    metadata: dict[str, Any] | None = None,
    extra_files: list[str] | None = None,
    save_as_external_data: bool | None = None,
    onnx_execution_providers: Sequence[Any] | None = None,
    onnx_session_options: Mapping[str, Any] | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    model_type: str | None = None,
    step: int = 0,
    model_id: str | None = None,
    validate_serving_input: bool | None = None,
    lineage: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> ModelInfo:
    """Convert an ONNX model and log it, with its engine, to MLflow; register it with `registered_model_name`.

    The engine is built before anything is logged: a conversion that fails leaves no trace in the store. Precision
    and targets become tags (`mlflow_trt.precision`, ...) of the logged model and the model version, and with batch
    range, TensorRT version and accuracy params of the logged model, where they can be searched for.

    Keywords that are not listed here, and what is raised, are those of `save_model`.

    Args:
        onnx_model: as for `save_model`.
        name: the name of the logged model.
        artifact_path: MLflow's old word for `name`.
        registered_model_name: register a version under this name, creating the registered model if need be.
        validate_serving_input: whether MLflow loads the logged model once to try the input example on it; None does so
            where a GPU can run it.
        await_registration_for: seconds to wait until the version is ready.
        params: of the logged model, beside its own.
        tags: of the logged model and the version, beside their own.
        model_type: MLflow's, of the logged model.
        step: of the metrics that are logged.
        model_id: of a logged model to write to, instead of a new one. Its name, params, tags and type stay as they are.

    Returns:
        What every MLflow flavor returns: the logged model's URI, signature and, if registered, version.
    """
    options = ConversionOptions(
        recipe=Recipe.of(recipe, precision=precision, batch=batch, shapes=shapes, targets=targets),
        calibration_data=calibration_data,
        calibration_cache=calibration_cache,
        verify=verify,
        store_kernels=store_kernels,
        model_config=with_settings(
            model_config,
            onnx_execution_providers=onnx_execution_providers,
            onnx_session_options=onnx_session_options,
        ),
        save_as_external_data=save_as_external_data,
        allow_external_data_from=allow_external_data_from,
        progress=progress,
    )
    packaging = PackagingOptions(
        signature=signature,
        input_example=input_example,
        conda_env=conda_env,
        code_paths=code_paths,
        pip_requirements=pip_requirements,
        extra_pip_requirements=extra_pip_requirements,
        metadata=metadata,
        extra_files=extra_files,
        lineage=lineage or {},
    )
    logging = LoggingOptions(
        name=_chosen_name(name, artifact_path),
        registered_model_name=registered_model_name,
        await_registration_for=await_registration_for,
        params=params or {},
        tags=tags or {},
        model_type=model_type,
        step=step,
        model_id=model_id,
        validate_serving_input=validate_serving_input,
    )
    check_server()
    prepared = prepare_conversion(options)
    # First, and so last to end: removing the temporary folders may be interrupted too.
    with undo_on_failure() as undo, open_onnx(onnx_model, options) as source:
        return log_conversion(source, prepared, packaging, logging, undo)


def _chosen_name(name: str | None, artifact_path: str | None) -> str | None:
    """Raises OptionError where both are given."""
    if artifact_path is None:
        return name
    if name is not None:
        raise OptionError(
            f"name is {name!r} and artifact_path, MLflow's old word for it, {artifact_path!r}; give name only",
            option="artifact_path",
        )
    _log.warning("artifact_path is deprecated in MLflow; use name instead")
    return artifact_path


def load_model(
    model_uri: str | os.PathLike[str],
    dst_path: str | os.PathLike[str] | None = None,
    *,
    runtime: Runtime | None = None,
    on_mismatch: OnMismatch | None = None,
    device: DeviceRequest | None = None,
    kernel_specialization: KernelSpecialization | None = None,
    cuda_graphs: CudaGraphs | None = None,
    max_batch_delay_ms: float | None = None,
    warm_up: WarmUp | None = None,
    allow_engine_host_code: bool | None = None,
    self_test: bool | None = None,
    plugins: Sequence[str] | None = None,
    onnx_execution_providers: Sequence[Any] | None = None,
    onnx_session_options: Mapping[str, Any] | None = None,
    expected_digest: str | None = None,
    trust_engines: bool | None = None,
    signature: str | os.PathLike[str] | None = None,
    signed_by: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Session:
    """Load a model for its native interface, a Session. `mlflow.pyfunc.load_model` loads it the MLflow way.

    All other keywords are load settings, which LoadSettings explains; None takes what the environment variable
    MLFLOW_PYFUNC_INFERENCE_CONFIG says, or else the ones that the model was logged with.

    Args:
        model_uri: any model URI of MLflow, such as `models:/resnet50-trt/1` or a local folder.
        dst_path: an existing folder to download to; a temporary one if left out.
        progress: called while an engine is built for this machine; None shows it on standard error.

    Returns:
        The model, to be closed or used in a `with` statement.

    Raises:
        ArtifactError: it is no model of this flavor.
        IntegrityError: one of its files is not the one that was logged, or it is not the model that is expected.
        SignatureError: it is not what was signed.
        RuntimeUnavailableError: there is no GPU, or nothing that can call it.
        EngineMismatchError: no stored engine fits, and `on_mismatch` is `error`.
        BuildError: none fits, and none can be built here.
        SelfTestError: the engine answers wrongly on this machine.
        ExecutionError: it cannot be loaded, and why.
    """
    folder = fetch_folder(os.fspath(model_uri), dst_path)
    given = {
        "runtime": runtime,
        "on_mismatch": on_mismatch,
        "device": device,
        "kernel_specialization": kernel_specialization,
        "cuda_graphs": cuda_graphs,
        "max_batch_delay_ms": max_batch_delay_ms,
        "warm_up": warm_up,
        "allow_engine_host_code": allow_engine_host_code,
        "self_test": self_test,
        "plugins": plugins,
        "onnx_execution_providers": onnx_execution_providers,
        "onnx_session_options": onnx_session_options,
        "expected_digest": expected_digest,
        "trust_engines": trust_engines,
        "signature": None if signature is None else os.fspath(signature),
        "signed_by": None if signed_by is None else os.fspath(signed_by),
    }
    mlmodel = read_mlmodel(str(folder.path))
    _add_code_from_conf_to_system_path(str(folder.path), mlmodel.flavors.get(FLAVOR_NAME, {}))
    LoadSettings.check_logged(model_config_of(mlmodel))
    wanted = {name: value for name, value in given.items() if value is not None}
    # MLflow's environment variable comes between, as it does for pyfunc.
    defaults = model_config_here(mlmodel)
    if folder.record.whole is not None:
        defaults, _ = split_config(defaults)
    settings = LoadSettings.of(defaults | wanted)
    with choose_progress("Building a TensorRT engine for this machine", progress) as shown:
        return open_session(folder, settings, shown)
