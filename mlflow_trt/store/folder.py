"""The model folder: what lies where, the record, and the digests.

    model.onnx (+ its external data)                the source model, as the user gave it
    typed/<precision>.onnx (+ its external data)    the typed model, where it differs from the source model
    engines/<distribution>-<version>-<target>.plan  raw plans
    runtime_cache/<engine>.kernels                  kernels of an engine, as TensorRT-RTX serialized them
    golden.npz                                      the golden sample, which engines are tested with at load
    whole/...                                       the source of a whole model, without the weights of its network
    mlflow_trt.json                                 the record

The files of MLflow itself (MLmodel, requirements.txt, ...) are written by `flavor.mlmodel`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from mlflow_trt.convert.onnx.model import sha256_of
from mlflow_trt.core.types import EngineRecord, KernelsRecord
from mlflow_trt.core.whole_model import WholeModel
from mlflow_trt.errors import ArtifactError, IntegrityError
from mlflow_trt.store.golden import Golden, from_npz
from mlflow_trt.store.record import RECORD_FILE, Record, StoredGolden, StoredModel, read_record_file


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A model folder that was read. Nothing here writes to it.

    `digest` is the sha256 of the record as it was read, and so stands for every file that the record names.
    """

    path: Path
    record: Record
    digest: str

    def checked_model(self, model: StoredModel) -> Path:
        """The path of an ONNX model, after its files were found to be the ones that were logged.

        Raises ArtifactError where the model is a plan that was imported, which has none.
        """
        if self.record.is_engine_only:
            raise ArtifactError(
                f"{self.path} was imported as a plan and holds no ONNX model, which this needs; log the ONNX model "
                "itself with mlflow_trt.log_model",
                path=self.path,
            )
        for name, expected in model.files.items():
            self._compare(name, sha256_of(self._existing(name)), expected)
        return self.path / model.file

    def read_plan(self, engine: EngineRecord) -> bytes:
        """The bytes of a plan, which were checked before anybody can deserialize them."""
        return self._checked(engine.file, engine.sha256)

    def read_kernels(self, kernels: KernelsRecord) -> bytes:
        """Kernels of an engine, which were checked before TensorRT-RTX can see them."""
        return self._checked(kernels.file, kernels.sha256)

    def read_golden(self, golden: StoredGolden) -> Golden:
        content = self._checked(golden.file, golden.sha256)
        try:
            return from_npz(content)
        except ValueError as error:
            raise ArtifactError(f"{self.path / golden.file} is no golden sample: {error}", path=self.path) from error

    def check_whole(self, whole: WholeModel) -> None:
        """Compare every file of a whole model with its digest, before any of them is loaded or run.

        Raises IntegrityError for one that differs, and for one that the record does not list.
        """
        for name, expected in whole.files.items():
            self._compare(name, sha256_of(self._existing(name)), expected)
        for file in (self.path / "whole").rglob("*"):
            name = file.relative_to(self.path).as_posix()
            if not file.is_dir() and name not in whole.files and file.suffix != ".pyc":
                raise IntegrityError(
                    f"{file} is not among the files that were logged; it is not used. Download the model again",
                    path=file,
                )

    def _checked(self, name: str, sha256: str) -> bytes:
        content = self._existing(name).read_bytes()
        self._compare(name, hashlib.sha256(content).hexdigest(), sha256)
        return content

    def _existing(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; download the model again", path=path)
        return path

    def _compare(self, name: str, actual: str, expected: str) -> None:
        if actual != expected:
            raise IntegrityError(
                f"{self.path / name} is not the file that was logged: its sha256 is {actual}, expected {expected}. "
                "It is not used; download the model again, or log it again.",
                path=self.path / name,
            )


def read_folder(path: Path, uri: str | None = None) -> ModelFolder:
    """Read the record of a model folder; `uri` is what the user calls it, where it was downloaded.

    Raises ArtifactError where there is none or it makes no sense, FormatError where a newer mlflow-trt wrote it.
    """
    record, digest = read_record_file(path / RECORD_FILE, uri)
    return ModelFolder(path=path, record=record, digest=digest)
