"""What was logged with a source model besides the model: files, code, requirements, params, options of ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from mlflow_trt.core.settings import LoadSettings, ModelConfig, read_model_config, with_settings
from mlflow_trt.errors import OptionError
from mlflow_trt.flavor.environment import get_default_pip_requirements
from mlflow_trt.flavor.tags import PREFIX

# What MLflow's flavors need to load and run the source, which is not what runs here.
_OF_FLAVORS = frozenset(
    map(
        canonicalize_name,
        (
            *("mlflow", "mlflow-skinny", "mlflow-tracing", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "pandas"),
            *("torch", "torchvision", "torchaudio", "onnxscript", "scikit-learn", "skl2onnx", "scipy", "skops"),
            *("tensorflow", "tensorflow-cpu", "keras", "tf2onnx", "cloudpickle", "protobuf", "ml-dtypes"),
        ),
    )
)
_DEFAULT_PROVIDERS = ["CUDAExecutionProvider", "CPUExecutionProvider"]  # what mlflow.onnx writes where none were given


@dataclass(frozen=True, kw_only=True)
class Belongings:
    """What a model that is made of the source gets, too. `remarks` name what it cannot get, and why."""

    code_paths: list[str] | None = None
    extra_files: list[str] | None = None
    requirements: list[str] | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    model_type: str | None = None
    onnx_session_options: Mapping[str, Any] | None = None
    onnx_execution_providers: list[Any] | None = None
    remarks: tuple[str, ...] = ()

    def settings(self, given: ModelConfig) -> ModelConfig:
        """The load settings that were given, and below them those of the source."""
        options, providers = self.onnx_session_options, self.onnx_execution_providers
        if options is None and providers is None:
            return given
        own = with_settings({}, onnx_session_options=options, onnx_execution_providers=providers)
        return {**(own or {}), **(read_model_config(given) or {})}


def find_belongings(model: Model, folder: Path) -> Belongings:
    """What a downloaded model has. Its files are there as long as the folder is."""
    remarks: list[str] = []
    flavors = model.flavors
    logged = _logged_model(model)
    options, providers = _onnx_options(flavors.get("onnx", {}), remarks)
    return Belongings(
        code_paths=_entries(folder, flavors.get("python_function", {}).get("code")),
        extra_files=_extra_files(folder, flavors),
        requirements=_requirements(folder, remarks),
        params={key: value for key, value in (logged.params if logged else {}).items() if not key.startswith(PREFIX)},
        model_type=logged.model_type if logged else None,
        onnx_session_options=options,
        onnx_execution_providers=providers,
        remarks=tuple(remarks),
    )


def _logged_model(model: Model) -> Any:
    if model.model_id is None:
        return None
    try:
        return MlflowClient().get_logged_model(model.model_id)
    except MlflowException:  # deleted, or of another server
        return None


def _entries(folder: Path, code: Any) -> list[str] | None:
    """The files and folders of a model's own code, one by one, as `code_paths` takes them."""
    if not isinstance(code, str) or not (folder / code).is_dir():
        return None
    return sorted(str(entry) for entry in (folder / code).iterdir() if entry.name != "__pycache__") or None


def _extra_files(folder: Path, flavors: Mapping[str, Mapping[str, Any]]) -> list[str] | None:
    listed = [entry for flavor in flavors.values() for entry in flavor.get("extra_files") or ()]
    paths = {os.fspath(folder / entry["path"]): None for entry in listed if isinstance(entry, dict) and "path" in entry}
    return [path for path in paths if Path(path).exists()] or None


def _requirements(folder: Path, remarks: list[str]) -> list[str] | None:
    """The requirements of the user's own: neither those of the source's flavor, nor any that ours pin already."""
    file = folder / "requirements.txt"
    if not file.is_file():
        return None
    ours = {canonicalize_name(Requirement(line).name) for line in get_default_pip_requirements()}
    kept, left = [], []
    for line in filter(None, map(str.strip, file.read_text(encoding="utf-8").splitlines())):
        try:
            name = canonicalize_name(Requirement(line).name)
        except InvalidRequirement:
            left.append(line)
            continue
        if name not in _OF_FLAVORS and name not in ours:
            kept.append(line)
    if left:
        remarks.append(f"of the source's requirements, {', '.join(left)} are not carried over: they name no package")
    return kept or None


def _onnx_options(flavor: Mapping[str, Any], remarks: list[str]) -> tuple[Mapping[str, Any] | None, list[Any] | None]:
    options = flavor.get("onnx_session_options") or None
    providers = flavor.get("providers") or None
    if isinstance(providers, str):
        providers = [providers]
    if providers == _DEFAULT_PROVIDERS:
        providers = None  # nobody asked for them
    kept: dict[str, Any] = {}
    for name, value in (("onnx_session_options", options), ("onnx_execution_providers", providers)):
        if value is None:
            continue
        try:
            LoadSettings.of({name: value})
        except OptionError as error:
            remarks.append(f"the source's {name} are not carried over: {error.message}")
        else:
            kept[name] = value
    return kept.get("onnx_session_options"), kept.get("onnx_execution_providers")
