"""The Python environment of a model: requirements, checked before anything is built, and the files that hold them."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from mlflow.utils.environment import (
    _CONDA_ENV_FILE_NAME,
    _CONSTRAINTS_FILE_NAME,
    _PYTHON_ENV_FILE_NAME,
    _REQUIREMENTS_FILE_NAME,
    _get_pip_deps,
    _mlflow_conda_env,
    _parse_pip_requirements,
    _process_conda_env,
    _process_pip_requirements,
    _PythonEnv,
    _validate_env_arguments,
)
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from mlflow_trt._version import __version__
from mlflow_trt.backends.tensorrt import installed
from mlflow_trt.errors import OptionError
from mlflow_trt.store.record import Record


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


def check_environment(conda_env: Any, pip_requirements: Any, extra_pip_requirements: Any) -> None:
    """Find what is wrong with an environment, before an engine is built for it.

    Raises OptionError for a file that cannot be read, a line that is no requirement, and a pin that another line, or a
    requirement of the model itself, excludes; what MLflow raises for several environments at once and for other types.
    """
    _validate_env_arguments(conda_env, pip_requirements, extra_pip_requirements)
    if conda_env is not None:
        _check_lines(_conda_lines(conda_env), "conda_env")
    if pip_requirements is not None:
        _check_lines(pip_requirements, "pip_requirements")
    if extra_pip_requirements is not None:
        _check_lines(extra_pip_requirements, "extra_pip_requirements", get_default_pip_requirements())


def _conda_lines(conda_env: Any) -> list[str]:
    if isinstance(conda_env, (str, os.PathLike)):
        try:
            conda_env = yaml.safe_load(Path(conda_env).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise OptionError(f"conda_env names a file that cannot be read: {error}", option="conda_env") from error
    dependencies = conda_env.get("dependencies") if isinstance(conda_env, dict) else None
    if not isinstance(dependencies, list):
        raise OptionError(
            f"conda_env is {conda_env!r}; expected the path of a conda.yaml, or a dict, with a list of dependencies",
            option="conda_env",
        )
    lines: list[str] = _get_pip_deps(conda_env)
    return lines


def _check_lines(given: Any, option: str, defaults: list[str] | None = None) -> None:
    try:
        lines, constraints = _parse_pip_requirements(given)
    except OSError as error:
        raise OptionError(f"{option} names a file that cannot be read: {error}", option=option) from error
    known = [(line, Requirement(line)) for line in defaults or ()]
    for line in (*lines, *constraints):
        requirement = _requirement_of(line, option)
        if requirement is not None:
            known.append((line, requirement))
    _check_pins(known, option)


def _requirement_of(line: str, option: str) -> Requirement | None:
    """None for an option, an address or a path, which pip alone can judge."""
    text = line.split(" --", maxsplit=1)[0].split(" #", maxsplit=1)[0].strip()
    if text.startswith("-") or "/" in text or "\\" in text or Path(text).exists():
        return None
    try:
        return Requirement(text)
    except InvalidRequirement as error:
        raise OptionError(
            f"{option} has the line {line!r}, which is no requirement: {str(error).splitlines()[0]}", option=option
        ) from error


def _check_pins(known: list[tuple[str, Requirement]], option: str) -> None:
    """Raise OptionError where a line pins a release that another excludes. MLflow asks pip, which takes minutes."""
    for line, requirement in known:
        pins = [part.version for part in requirement.specifier if part.operator == "==" and "*" not in part.version]
        if not pins or (requirement.marker is not None and not requirement.marker.evaluate()):
            continue
        name = canonicalize_name(requirement.name)
        for other_line, other in known:
            is_same = canonicalize_name(other.name) == name and (other.marker is None or other.marker.evaluate())
            if is_same and not other.specifier.contains(pins[0], prereleases=True):
                raise OptionError(
                    f"{option} makes an environment that nobody can install: {line!r} and {other_line!r} exclude each "
                    "other. Requirements of a model's own, which get_default_pip_requirements() lists, are replaced by "
                    "pip_requirements=",
                    option=option,
                )


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


def write_environment(
    folder: Path,
    record: Record,
    conda_env: Any,
    pip_requirements: Any,
    extra_pip_requirements: Any,
    *,
    of_source: Path | None = None,
) -> None:
    """Write the files that MLflow's tools make an environment from. `of_source` is where a whole model came from."""
    if conda_env is None:
        defaults = get_default_pip_requirements(record) if pip_requirements is None else None
        if defaults is not None and of_source is not None:
            defaults = with_requirements_of(of_source / _REQUIREMENTS_FILE_NAME, defaults)
        environment, requirements, constraints = _process_pip_requirements(
            defaults, pip_requirements, extra_pip_requirements
        )
    else:
        environment, requirements, constraints = _process_conda_env(conda_env)
    (folder / _CONDA_ENV_FILE_NAME).write_text(yaml.safe_dump(environment, default_flow_style=False))
    if constraints:
        (folder / _CONSTRAINTS_FILE_NAME).write_text("\n".join(constraints))
    (folder / _REQUIREMENTS_FILE_NAME).write_text("\n".join(requirements))
    _PythonEnv.current().to_yaml(str(folder / _PYTHON_ENV_FILE_NAME))
