"""A conversion as an MLflow model: the MLmodel file, the environment, and the folder written whole or not at all.

What is private to MLflow and yet needed by every flavor is imported here.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Mapping, Sequence
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
    _CONSTRAINTS_FILE_NAME,
    _PYTHON_ENV_FILE_NAME,
    _REQUIREMENTS_FILE_NAME,
    _mlflow_conda_env,
    _process_conda_env,
    _process_pip_requirements,
    _PythonEnv,
    _validate_env_arguments,
)
from mlflow.utils.file_utils import get_total_file_size
from mlflow.utils.model_utils import _copy_extra_files, _validate_and_copy_code_paths
from mlflow.utils.validation import (
    _validate_model_alias_name,
    _validate_model_alias_name_reserved,
    _validate_model_name,
    _validate_model_version_tag,
)
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from mlflow_trt._version import __version__
from mlflow_trt.backends.tensorrt import installed
from mlflow_trt.convert.conversion import Conversion
from mlflow_trt.convert.onnx.model import MODEL_FILE
from mlflow_trt.core.accuracy import Tolerance
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.output_folder import check_target, write_aside
from mlflow_trt.core.selection import Selection
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.types import EngineRecord, TensorSpec
from mlflow_trt.errors import MissingDependencyError, OptionError
from mlflow_trt.flavor.signatures import output_signature, tensor_signature, without_params
from mlflow_trt.flavor.tags import (
    BATCH_TAG,
    PRECISION_ASKED_TAG,
    PRECISION_SHARE_TAG,
    PRECISION_TAG,
    RELATIVE_ERROR_TAG,
    SOURCE_DIGEST_TAG,
    TARGET_TAG,
    TENSORRT_TAG,
    VERIFICATION_TAG,
)
from mlflow_trt.flavor.whole.package import WholeSource, write_whole
from mlflow_trt.flavor.whole.parity import compare_whole
from mlflow_trt.pipeline.compile_kernels import store_kernels
from mlflow_trt.pipeline.make import ConvertedModel
from mlflow_trt.pipeline.selection_plot import draw_candidates
from mlflow_trt.pipeline.verify import Verification
from mlflow_trt.store.engine_folder import EngineInterface, write_engine_folder
from mlflow_trt.store.precision_page import REPORT_FILE, report_text
from mlflow_trt.store.record import FLAVOR_NAME, Record
from mlflow_trt.store.write_folder import write_folder

_log = get_logger(__name__)


def get_default_pip_requirements(record: Record | None = None) -> list[str]:
    """What a model of this flavor needs: this package, and the very TensorRT that built its engines.

    Without a record, what a model would need that is logged here, by the TensorRT that is installed.

    They are listed, not inferred: MLflow's inference would load and run the model, and never finds the flavor itself.
    `cuda-core` and not `cuda`, so that an environment is made of wheels, wherever that happens.
    """
    pinned = [f"{name}=={importlib.metadata.version(name)}" for name in ("mlflow", "numpy", "onnx")]
    if record is not None:
        built = {f"{engine.distribution.requirement}=={engine.version}" for engine in record.engines}
    else:
        built = {f"{name.requirement}=={importlib.metadata.version(name.requirement)}" for name in installed()[:1]}
    tensorrt = sorted(built)
    extra = "rtx" if any("rtx" in requirement for requirement in tensorrt) else "tensorrt"
    return [*pinned, f"mlflow-trt[cuda-core,{extra}]=={__version__}", *tensorrt]


def get_default_conda_env() -> dict[str, Any]:
    """The conda environment of a model that is logged here, as every flavor of MLflow has this function."""
    environment: dict[str, Any] = _mlflow_conda_env(additional_pip_deps=get_default_pip_requirements())
    return environment


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
        _validate_env_arguments(self.conda_env, self.pip_requirements, self.extra_pip_requirements)
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
        for option in ("code_paths", "extra_files"):
            paths = getattr(self, option)
            if paths is not None and not isinstance(paths, list):
                raise OptionError(f"{option} is {paths!r}; expected a list of paths", option=option)
            for path in paths or ():
                if ":/" not in str(path) and not Path(path).exists():
                    raise OptionError(f"{option}: {path} does not exist", option=option)


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
        if options.whole is not None:
            compare_whole(folder, model, options.whole, made.settings, answer_tolerance(made))
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
        model.add_flavor("onnx", onnx_version=onnx.__version__, data=MODEL_FILE, code=code)
    extra_files = _copy_extra_files(options.extra_files, str(folder))
    model.add_flavor(FLAVOR_NAME, **flavor_fields(record), code=code, **extra_files)
    _write_environment(folder, record, options)
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
    registered_model_name: str | None, tags: Mapping[str, Any] | None = None, alias: str | None = None
) -> None:
    """Raise MLflow's own errors for a name, tag or alias that it refuses, before anything takes time."""
    if registered_model_name is not None:
        _validate_model_name(registered_model_name)
    for key, value in (tags or {}).items():
        _validate_model_version_tag(key, str(value))
    if alias is not None:
        _validate_model_alias_name(alias)
        _validate_model_alias_name_reserved(alias)


def _kept(verification: Verification | None, remarks: tuple[str, ...]) -> dict[str, Any]:
    if verification is None:
        return {"remarks": remarks}
    return {
        "comparisons": verification.comparisons,
        "golden": verification.golden,
        "tolerance": verification.tolerance,
        "remarks": (*verification.remarks, *remarks),
    }


def searchable_facts(made: ConvertedModel) -> dict[str, str]:
    """What is worth searching for, as it appears in params and tags."""
    conversion, verification = made.conversion, made.verification
    engine, axis = conversion.engine, conversion.profiles.batch_axis
    facts = {
        PRECISION_TAG: str(conversion.recipe.precision),
        TENSORRT_TAG: f"{engine.distribution} {engine.version}",
        TARGET_TAG: engine.target,
        SOURCE_DIGEST_TAG: conversion.source.digest,
    }
    share = conversion.typed.report.share
    if share is not None:
        facts[PRECISION_SHARE_TAG] = f"{share:.4g}"
    if made.selection is not None:
        facts[PRECISION_ASKED_TAG] = str(made.selection.asked)
    if verification is not None and verification.verdict is not None:
        facts[VERIFICATION_TAG] = str(verification.verdict)
        facts[RELATIVE_ERROR_TAG] = f"{verification.comparisons[-1].relative_error:.3g}"
    if axis is not None:
        ranges = [profile.ranges[axis.inputs[0]] for profile in conversion.profiles.profiles]
        facts[BATCH_TAG] = f"{min(r.min[0] for r in ranges)}:{ranges[0].opt[0]}:{max(r.max[0] for r in ranges)}"
    return facts


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


def with_requirements_of(file: Path, ours: Sequence[str]) -> list[str]:
    """Our requirements and those of the source of a whole model, whose versions come before ours."""
    listed = file.read_text().splitlines() if file.is_file() else []
    theirs = [line.strip() for line in listed if line.strip() and not line.strip().startswith(("#", "-"))]
    named = {_package_of(line) for line in theirs}
    return [*theirs, *(line for line in ours if _package_of(line) not in named)]


def _package_of(requirement: str) -> str:
    try:
        return canonicalize_name(Requirement(requirement).name)
    except InvalidRequirement:  # a path or a URL
        return requirement


def _described(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _write_environment(folder: Path, record: Record, options: PackagingOptions) -> None:
    if options.conda_env is None:
        defaults = get_default_pip_requirements(record) if options.pip_requirements is None else None
        if defaults is not None and options.whole is not None:
            defaults = with_requirements_of(options.whole.folder / _REQUIREMENTS_FILE_NAME, defaults)
        conda_env, requirements, constraints = _process_pip_requirements(
            defaults, options.pip_requirements, options.extra_pip_requirements
        )
    else:
        conda_env, requirements, constraints = _process_conda_env(options.conda_env)
    (folder / _CONDA_ENV_FILE_NAME).write_text(yaml.safe_dump(conda_env, default_flow_style=False))
    if constraints:
        (folder / _CONSTRAINTS_FILE_NAME).write_text("\n".join(constraints))
    (folder / _REQUIREMENTS_FILE_NAME).write_text("\n".join(requirements))
    _PythonEnv.current().to_yaml(str(folder / _PYTHON_ENV_FILE_NAME))
