"""Put the source of a whole model into the folder of what is made of it: everything but the weights of its network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mlflow_trt.convert.onnx.model import combined_digest, sha256_of
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.whole_model import GoldenAnswer, Lengths, NetworkCall, WholeModel
from mlflow_trt.errors import ArtifactError
from mlflow_trt.flavor.whole.hollow import HOLLOW_FILE
from mlflow_trt.flavor.whole.loading import WHOLE_FOLDER
from mlflow_trt.flavor.whole.self_test import GOLDEN_WHOLE_FILE, LARGEST, as_json

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json",
            "tf_model.h5", "flax_model.msgpack")  # fmt: skip
_log = get_logger(__name__)

_NOT_COPIED = ("exported", "__pycache__", "registered_model_meta")  # the last by MLflow, when it downloads a version


@dataclass(frozen=True, kw_only=True)
class WholeSource:
    """A whole model that is converted: its folder, how it calls its network, and what it was seen to answer.

    `weights` are folders below it that hold the weights of the network, each with what is there instead, see
    `hollow_weights`; `config` is the `model_config` that it was logged with. `examples` are inputs with the answers of
    the source, the first its own input example where `answers_its_example`. `remarks` tell what was chosen for
    the user, who with `trusts_code` allowed the model to run code of its own.
    """

    folder: Path
    flavor: str
    network: str
    call: NetworkCall
    lengths: Lengths | None = None
    weights: Mapping[Path, bytes] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    examples: tuple[tuple[Any, Any], ...] = ()
    answers_its_example: bool = False
    remarks: tuple[str, ...] = ()
    trusts_code: bool = False

    @property
    def digest(self) -> str:
        """The sha256 of everything around the network."""
        return combined_digest({name: sha256_of(self.folder / name) for name in self.files()})

    def files(self) -> Iterator[str]:
        """What is kept of it, by path below its folder. Raises ArtifactError for a link that leads out of it."""
        for file in sorted(self.folder.rglob("*")):
            below = file.relative_to(self.folder)
            if file.is_symlink() and not file.resolve().is_relative_to(self.folder.resolve()):
                raise ArtifactError(f"{below} is a link that leads out of the model; copy what it names", path=file)
            is_weights = below.parent in self.weights and any(fnmatch(file.name, pattern) for pattern in _WEIGHTS)
            if file.is_file() and not is_weights and not set(below.parts) & set(_NOT_COPIED):
                yield below.as_posix()

    @property
    def own_settings(self) -> dict[str, Any]:
        """Settings of the source that are called like one of ours."""
        ours = LoadSettings().to_dict()
        return {name: value for name, value in self.config.items() if name in ours}

    @property
    def other_settings(self) -> dict[str, Any]:
        """Settings of the source that can be overridden beside ours."""
        return {name: value for name, value in self.config.items() if name not in self.own_settings}


def write_whole(source: WholeSource, folder: Path, tolerance: float | None) -> WholeModel:
    """Copy the source below `whole/` of a model folder, without the weights of its network.

    With a tolerance, its answer to its input example is written for the self-test, where it is not large.
    """
    target = folder / WHOLE_FOLDER
    for name in source.files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.folder / name, target / name)
    for weights, hollow in source.weights.items():
        (target / weights).mkdir(parents=True, exist_ok=True)
        (target / weights / HOLLOW_FILE).write_bytes(hollow)
    golden = None if tolerance is None else _write_golden(source, folder, tolerance)
    files = sorted(file for file in target.rglob("*") if file.is_file())
    files += [] if golden is None else [folder / golden.file]
    return WholeModel(
        flavor=source.flavor,
        network=source.network,
        call=source.call,
        lengths=source.lengths,
        golden=golden,
        trusts_code=source.trusts_code,
        hollow=tuple(f"{WHOLE_FOLDER}/{weights.as_posix()}/{HOLLOW_FILE}" for weights in source.weights),
        own_settings=source.own_settings,
        files={file.relative_to(folder).as_posix(): sha256_of(file) for file in files},
    )


def _write_golden(source: WholeSource, folder: Path, tolerance: float) -> GoldenAnswer | None:
    if not source.answers_its_example:
        return None
    try:
        text = json.dumps(as_json(source.examples[0][1]))
    except Exception as error:  # noqa: BLE001  # MLflow's encoder raises what it comes upon
        _log.debug("The answer of the source is no JSON, and so there is no self-test: %s", error)
        return None
    if len(text) > LARGEST:
        return None
    (folder / GOLDEN_WHOLE_FILE).write_text(text)
    return GoldenAnswer(file=GOLDEN_WHOLE_FILE, tolerance=tolerance)
