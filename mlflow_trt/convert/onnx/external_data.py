"""The files that a model keeps its weights in: where they may be, and whether they are whole.

What a model names becomes a part of what is made of it, so a model from outside must not name a private key. Its files
lie in its own folder. The caches of model hubs fill such a folder with symbolic links to a folder of blobs, which are
followed where the user names that folder.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from onnx import TensorProto

from mlflow_trt.errors import OnnxModelError

RESERVED_NAMES = frozenset(
    """model.onnx typed engines runtime_cache code extra_files mlflow_trt.json MLmodel conda.yaml python_env.yaml
    requirements.txt constraints.txt input_example.json serving_input_example.json environment_variables.txt
    metadata registered_model_meta golden.npz precision_report.md fp32.onnx tf32.onnx fp16.onnx bf16.onnx int8.onnx
    fp8.onnx fp16.onnx.data bf16.onnx.data int8.onnx.data fp8.onnx.data""".split()  # noqa: SIM905  # easier to read than a list of quotes
)
"""What else may lie in a model folder, where the external data of a model is stored beside it."""


def check_external_data(tensors: Iterable[TensorProto], path: Path, allowed: Path | None) -> tuple[str, ...]:
    """The files with the weights of the model at `path`, relative to its folder.

    Raises OnnxModelError for one that is missing, truncated, or neither in the model's folder nor in `allowed`.
    """
    needed: dict[str, tuple[int, str]] = {}
    for tensor in tensors:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            location = _location(entries, tensor, path)
            end = _number(entries, "offset", tensor, path) + _number(entries, "length", tensor, path)
            needed[location] = max(needed.get(location, (0, "")), (end, tensor.name))
    for location, (end, tensor_name) in needed.items():
        file = path.parent / location
        _check_inside(file, path, allowed)
        if not file.is_file():
            raise OnnxModelError(
                f"{path}: the file {location!r} with the weights of {tensor_name!r} is missing; "
                f"put it beside the model, into {path.parent}",
                path=path,
            )
        if file.stat().st_size < end:
            raise OnnxModelError(
                f"{path}: {location!r} has {file.stat().st_size} bytes, but the weights of {tensor_name!r} "
                f"end at byte {end}; it is truncated",
                path=path,
            )
    return tuple(sorted(needed))


def without_links(path: Path, external_files: tuple[str, ...], workdir: Path) -> Path:
    """The model where its external files are files of its own, which is a copy where they are not.

    onnx.checker refuses all others. Caches of model hubs have symbolic links; installers and tools that version data
    have hard ones.
    """
    if not any(_is_linked(path.parent, name) for name in external_files):
        return path
    folder = workdir / "source"
    folder.mkdir()
    shutil.copyfile(path, folder / path.name)
    for name in external_files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path.parent / name, folder / name)
    return folder / path.name


def _location(entries: Mapping[str, str], tensor: TensorProto, path: Path) -> str:
    location = entries.get("location", "")
    pure = PurePosixPath(location)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts:
        raise OnnxModelError(
            f"{path}: the weights of {tensor.name!r} are at {location!r}; they must be in the folder of the model",
            path=path,
        )
    if pure.parts[0] in RESERVED_NAMES:
        raise OnnxModelError(
            f"{path}: its external weights are in {location!r}, a name that a model folder uses for something "
            "else; save the weights under another name",
            path=path,
        )
    return location


def _number(entries: Mapping[str, str], key: str, tensor: TensorProto, path: Path) -> int:
    text = entries.get(key) or "0"
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise OnnxModelError(
            f"{path}: the weights of {tensor.name!r} have the {key} {text!r}; expected a number of bytes", path=path
        )
    return int(text)


def _check_inside(file: Path, path: Path, allowed: Path | None) -> None:
    real = _resolved(file, path)
    folders = [path.parent] if allowed is None else [path.parent, allowed]
    if not any(real.is_relative_to(folder.resolve()) for folder in folders):
        raise OnnxModelError(
            f"{path}: its external data {str(file.relative_to(path.parent))!r} is a symbolic link to {real}, outside "
            "of the folder of the model. If you trust what is there, name the folder (in Hugging Face's cache, `blobs` "
            "beside `snapshots`) with allow_external_data_from= or --allow-external-data-from",
            path=path,
        )


def _resolved(file: Path, path: Path) -> Path:
    try:
        return file.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or a name that no file can have
        raise OnnxModelError(f"{path}: its external data {str(file)!r} cannot be read: {error}", path=path) from error


def _is_linked(folder: Path, name: str) -> bool:
    """Whether an external file is a link, lies behind one, or has a second name elsewhere."""
    file = folder / name
    return file.stat().st_nlink > 1 or file.resolve() != folder.resolve() / name
