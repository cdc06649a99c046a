"""A conversion as an MLflow model: the MLmodel file, the environment, and the folder written whole or not at all.

What is private to MLflow and yet needed by every flavor is imported here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import yaml
from mlflow import pyfunc
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.models.utils import _Example, _save_example
from mlflow.utils.environment import (
    _CONDA_ENV_FILE_NAME,
    _PYTHON_ENV_FILE_NAME,
)
from mlflow.utils.file_utils import get_total_file_size
from mlflow.utils.model_utils import _copy_extra_files, _validate_and_copy_code_paths
from mlflow.utils.validation import (
    _validate_logged_model_name,
    _validate_model_alias_name,
    _validate_model_alias_name_reserved,
    _validate_model_name,
    _validate_model_version_tag,
)

from mlflow_trt.convert.conversion import Conversion
from mlflow_trt.convert.onnx.model import MODEL_FILE
from mlflow_trt.core.accuracy import Tolerance
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.output_folder import check_target, write_aside
from mlflow_trt.core.selection import Selection
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.types import EngineRecord, TensorSpec
from mlflow_trt.errors import MissingDependencyError, OptionError
from mlflow_trt.flavor.environment import check_environment, write_environment
from mlflow_trt.flavor.signatures import output_signature, tensor_signature, without_params
from mlflow_trt.flavor.whole.package import WholeSource, write_whole
from mlflow_trt.flavor.whole.parity import compare_whole
from mlflow_trt.pipeline.compile_kernels import store_kernels
from mlflow_trt.pipeline.make import ConvertedModel
from mlflow_trt.pipeline.selection_plot import draw_candidates
from mlflow_trt.pipeline.verify import Verification
from mlflow_trt.store.engine_folder import EngineInterface, write_engine_folder
from mlflow_trt.store.precision_page import REPORT_FILE, report_text
from mlflow_trt.store.record import FLAVOR_NAME, Record
from mlflow_trt.store.write_folder import add_agreement, write_folder

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class PackagingOptions:
    """What the user decides about the MLflow model around an engine; the keywords of `save_model` explain each.

    Checked when made, which is before anything is built. Raises what MLflow raises, and OptionError for a missing file.
    """

    signature: ModelSignature | bool | None = None
    input_example: Any = None
    conda_env: Any = None
    code_paths: list[str] | None = None
    pip_requirements: Any = None
    extra_pip_requirements: Any = None
    metadata: dict[str, Any] | None = None
    extra_files: list[str] | None = None
    lineage: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    whole: WholeSource | None = None

    @property
    def network_example(self) -> Any:
        """The input example where it is one for the network: that of a whole model is for what surrounds it."""
        return self.input_example if self.whole is None else None

    def __post_init__(self) -> None:
        for option in ("pip_requirements", "extra_pip_requirements"):
            given = getattr(self, option)
            if isinstance(given, Iterator):  # they are read more than once
                object.__setattr__(self, option, list(given))
        check_environment(self.conda_env, self.pip_requirements, self.extra_pip_requirements)
        if not isinstance(self.signature, (ModelSignature, bool, type(None))):
            raise OptionError(
                f"signature is a {type(self.signature).__name__}; expected a mlflow.models.ModelSignature, "
                "None to derive one, or False for none",
                option="signature",
            )
        if isinstance(self.signature, ModelSignature) and self.whole is None:
            signature, params = without_params(self.signature)
            if params:
                object.__setattr__(self, "signature", False if signature is None else signature)
                remark = f"the params of the signature ({', '.join(params)}) are left out: no engine can use them"
                object.__setattr__(self, "remarks", (*self.remarks, remark))
                _log.warning("%s", remark[0].upper() + remark[1:])
        is_pair = isinstance(self.input_example, tuple) and len(self.input_example) == 2 and self.whole is None
        if is_pair:  # MLflow's form for one with params
            object.__setattr__(self, "input_example", self.input_example[0])
        if self.input_example is not None:
            _Example(self.input_example)  # refuses what MLflow cannot store
        _check_metadata(self.metadata)
        _check_paths(self.code_paths, "code_paths")
        _check_paths(self.extra_files, "extra_files")


def write_model(
    made: ConvertedModel, path: Path, options: PackagingOptions, mlflow_model: Model | None = None
) -> Model:
    """Write the model folder of a conversion, whole or not at all; returns what its MLmodel says.

    With a compiler, it holds the kernels of its engine. Raises then what running the engine raises.
    """
    check_target(path)
    model = Model() if mlflow_model is None else mlflow_model
    with write_aside(path) as folder:
        record = write_folder(
            made.conversion,
            folder,
            options.lineage,
            selection=made.selection,
            whole=None if options.whole is None else write_whole(options.whole, folder, answer_tolerance(made)),
            **_kept(made.verification, options.remarks),
        )
        if made.compiler is not None:
            record = store_kernels(folder, made.compiler)
        (folder / REPORT_FILE).write_text(report_text(record))
        if made.selection is not None:
            _draw(made.selection, made.conversion, folder)
        _write_mlmodel(model, folder, record, options, made.settings)
        if options.whole is not None and record.whole is not None:
            agreement = compare_whole(folder, model, options.whole, made.settings, answer_tolerance(made))
            if agreement is not None:
                add_agreement(folder, record.whole, agreement)
    return model


def write_engine_model(
    plan: bytes,
    engine: EngineRecord,
    interface: EngineInterface,
    path: Path,
    options: PackagingOptions,
    settings: LoadSettings,
    mlflow_model: Model | None = None,
) -> Model:
    """Write the model folder of a plan that exists, whole or not at all; returns what its MLmodel says."""
    check_target(path)
    model = Model() if mlflow_model is None else mlflow_model
    with write_aside(path) as folder:
        record = write_engine_folder(plan, engine, interface, folder, options.lineage)
        _write_mlmodel(model, folder, record, options, settings)
    return model


def _write_mlmodel(
    model: Model, folder: Path, record: Record, options: PackagingOptions, settings: LoadSettings
) -> None:
    """Write what MLflow wants beside what the record names."""
    code = _validate_and_copy_code_paths(options.code_paths, str(folder))
    if options.whole is not None:
        # What MLflow's flavor answers is in the signature that it was logged with.
        model.signature = options.signature if isinstance(options.signature, ModelSignature) else None
    elif options.signature is None:
        model.signature = output_signature(record.outputs)
    elif options.signature is True:
        model.signature = tensor_signature(record.inputs, record.outputs, record.profiles, record.batch_axis)
    elif options.signature is not False:
        model.signature = options.signature
    if options.input_example is not None:
        _save_example(model, options.input_example, str(folder))
    if options.metadata is not None:
        model.metadata = options.metadata
    pyfunc.add_to_model(
        model,
        loader_module=FLAVOR_NAME,
        conda_env=_CONDA_ENV_FILE_NAME,
        python_env=_PYTHON_ENV_FILE_NAME,
        code=code,
        model_config=settings.to_dict() | (options.whole.other_settings if options.whole else {}),
    )
    if not record.is_engine_only:
        model.add_flavor("onnx", onnx_version=onnx.__version__, data=MODEL_FILE, code=code, **_onnx_fields(settings))
    extra_files = _copy_extra_files(options.extra_files, str(folder))
    model.add_flavor(FLAVOR_NAME, **flavor_fields(record), code=code, **extra_files)
    write_environment(
        folder,
        record,
        options.conda_env,
        options.pip_requirements,
        options.extra_pip_requirements,
        of_source=options.whole.folder if options.whole is not None else None,
    )
    model.model_size_bytes = get_total_file_size(folder)
    model.save(str(folder / MLMODEL_FILE_NAME))


def answer_tolerance(made: ConvertedModel) -> float | None:
    """What the answers of a whole model may be off by; None where nothing is to be compared."""
    if made.verification is None:
        return None
    usual = Tolerance.default(made.conversion.recipe.precision)
    return made.verification.tolerance.relative_error or usual.relative_error or 0.0


def move_model(written: Model, folder: Path, path: Path, mlflow_model: Model) -> None:
    """Move a model folder to where MLflow wants it, under the identity that MLflow gave to the logged model."""
    mlflow_model.flavors = written.flavors
    mlflow_model.signature = written.signature
    if written.saved_input_example_info is not None:
        mlflow_model.saved_input_example_info = written.saved_input_example_info
    if written.metadata is not None:
        mlflow_model.metadata = written.metadata
    mlflow_model.model_size_bytes = written.model_size_bytes
    shutil.move(folder, path)
    mlflow_model.save(str(path / MLMODEL_FILE_NAME))


def check_names(
    registered_model_name: str | None,
    tags: Mapping[str, Any] | None = None,
    alias: str | None = None,
    *,
    logged_model_name: str | None = None,
) -> None:
    """Raise MLflow's own errors for a name, tag or alias that it refuses, before anything takes time."""
    if not isinstance(logged_model_name, (str, type(None))):
        raise OptionError(f"name is {logged_model_name!r}; expected a string", option="name")
    _validate_logged_model_name(logged_model_name)
    if registered_model_name is not None:
        _validate_model_name(registered_model_name)
    for key, value in (tags or {}).items():
        _validate_model_version_tag(key, str(value))
    if alias is not None:
        _validate_model_alias_name(alias)
        _validate_model_alias_name_reserved(alias)


def _check_paths(paths: Any, option: str) -> None:
    if paths is not None and not isinstance(paths, list):
        raise OptionError(f"{option} is {paths!r}; expected a list of paths", option=option)
    for path in paths or ():
        if ":/" not in str(path) and not Path(path).exists():
            raise OptionError(f"{option}: {path} does not exist", option=option)


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, (Mapping, type(None))):
        raise OptionError(f"metadata is {metadata!r}; expected a dict", option="metadata")
    try:
        yaml.safe_dump(metadata)
    except yaml.YAMLError as error:
        raise OptionError(
            f"metadata cannot be written to the MLmodel file, which takes Python's own types only: {error}",
            option="metadata",
        ) from error


def _kept(verification: Verification | None, remarks: tuple[str, ...]) -> dict[str, Any]:
    if verification is None:
        return {"remarks": remarks}
    return {
        "comparisons": verification.comparisons,
        "golden": verification.golden,
        "tolerance": verification.tolerance,
        "remarks": (*verification.remarks, *remarks),
    }


def _draw(selection: Selection, conversion: Conversion, folder: Path) -> None:
    """The picture of the candidates, where there is a package to draw it with; the report has the table."""
    title = conversion.source.proto.graph.name or conversion.source.path.name
    try:
        draw_candidates(selection, title, folder)
    except MissingDependencyError as error:
        _log.warning("The candidates are in %s as a table, and not as a picture: %s", REPORT_FILE, error.message)


def flavor_fields(record: Record) -> dict[str, Any]:
    """What the MLmodel file says of the record, for those who look there."""
    return {
        "format": record.format,
        "precision": "unknown" if record.is_engine_only else str(record.recipe.precision),
        "profiles": [{name: str(limits) for name, limits in profile.ranges.items()} for profile in record.profiles],
        "engines": [
            {
                "file": engine.file,
                "sha256": engine.sha256,
                "tensorrt": f"{engine.distribution} {engine.version}",
                "target": engine.target,
            }
            for engine in record.engines
        ],
        "source_digest": record.source.digest,
        "inputs": [_described(spec) for spec in record.inputs],
        "outputs": [_described(spec) for spec in record.outputs],
    }


def _onnx_fields(settings: LoadSettings) -> dict[str, Any]:
    """What `mlflow.onnx` writes of ONNX Runtime, where it was asked for."""
    logged = settings.to_dict()
    fields = {"providers": logged["onnx_execution_providers"], "onnx_session_options": logged["onnx_session_options"]}
    return {name: value for name, value in fields.items() if value is not None}


def _described(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}
