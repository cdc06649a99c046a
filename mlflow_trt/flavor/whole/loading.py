"""Load a whole model: by the loader of its own flavor, and an engine in the place of its network.

Only what MLflow asks of every flavor is used of it, the module that the MLmodel names and its `_load_pyfunc`; but for
sentence_transformers, whose `_load_pyfunc` takes a GPU and trusts all code: there it is the wrapper alone.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow import pyfunc
from mlflow.models import Model
from mlflow.utils.model_utils import _add_code_from_conf_to_system_path

from mlflow_trt.core.optional import is_installed
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.whole_model import NetworkKind, WholeModel
from mlflow_trt.errors import ArtifactError, OptionError
from mlflow_trt.flavor.whole.estimator import EngineMethods
from mlflow_trt.flavor.whole.hollow import fill
from mlflow_trt.flavor.whole.network import EngineForward, EngineInferenceSession, Network
from mlflow_trt.runtime.session import Session
from mlflow_trt.store.folder import ModelFolder
from mlflow_trt.store.record import Record

WHOLE_FOLDER = "whole"
PYTHON_MODELS = ("mlflow.pyfunc.model", "mlflow.pyfunc.loaders.code_model")
"""The loaders of PythonModels, in MLmodel files: those that were pickled, and those from code."""

_SENTENCE_TRANSFORMERS = "mlflow.sentence_transformers"
_ON_THE_CPU = {"MLFLOW_DEFAULT_PREDICTION_DEVICE": "-1"}


def split_config(config: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our load settings in a `model_config`, and the rest, which is the source's."""
    ours = LoadSettings().to_dict()
    given = config or {}
    return {k: v for k, v in given.items() if k in ours}, {k: v for k, v in given.items() if k not in ours}


def usual_rows(record: Record) -> int | None:
    """How many rows the engine usually runs at once; None where it runs no batches of any size."""
    axis = record.batch_axis
    if axis is None or not axis.splits or not record.profiles:
        return None
    return record.profiles[0].ranges[axis.inputs[0]].opt[0]


def load_impl(folder: Path, config: Mapping[str, Any], files: Path | None = None, *, trusts_code: bool = False) -> Any:
    """What MLflow's own loader makes of the model in a folder: the object that its pyfunc calls `predict` of.

    `files` is another folder with the same files, for the loader; code is taken from the first, where it stays.
    """
    conf = Model.load(str(folder)).flavors[pyfunc.FLAVOR_NAME]
    _add_code_from_conf_to_system_path(str(folder), conf)
    loader = importlib.import_module(conf[pyfunc.MAIN])
    data = files or folder
    data = data / conf[pyfunc.DATA] if pyfunc.DATA in conf else data
    with _quiet_transformers(), _environment(_ON_THE_CPU):
        if conf[pyfunc.MAIN] == _SENTENCE_TRANSFORMERS:
            return _load_sentence_transformer(loader, data, config, trusts_code=trusts_code)
        parameters = inspect.signature(loader._load_pyfunc).parameters  # noqa: SLF001  # every flavor has to have it
        more = {"model_config": dict(config)} if "model_config" in parameters else {}
        return loader._load_pyfunc(str(data), **more)  # noqa: SLF001  # as above


def _load_sentence_transformer(flavor: Any, data: Path, config: Mapping[str, Any], *, trusts_code: bool) -> Any:
    package: Any = importlib.import_module("sentence_transformers")
    model = package.SentenceTransformer(str(data), device="cpu", trust_remote_code=trusts_code)
    return flavor._SentenceTransformerModelWrapper(model, config.get("task"))  # noqa: SLF001  # see above


def load_whole(folder: ModelFolder, session: Session, config: Mapping[str, Any]) -> Any:
    """The object that MLflow's pyfunc calls, with the session in the place of its network. Its files were checked."""
    whole = folder.record.whole
    if whole is None:
        raise ArtifactError(f"{folder.path} is not a whole model", path=folder.path)
    rows = usual_rows(folder.record)
    settings = {**whole.own_settings, **config}
    if whole.hollow:
        with fill(folder.path, whole.files, whole.hollow) as filled:
            files = filled / WHOLE_FOLDER
            impl = load_impl(folder.path / WHOLE_FOLDER, settings, files, trusts_code=whole.trusts_code)
    else:
        impl = load_impl(folder.path / WHOLE_FOLDER, settings, trusts_code=whole.trusts_code)
    exchange(impl, whole, Network(session, whole.call, whole.lengths))
    pipeline = getattr(impl, "pipeline", None)
    if whole.flavor == "transformers" and rows is not None and "batch_size" not in config:
        batch_in_pipeline(pipeline, whole, rows)
    return impl


def exchange(impl: Any, whole: WholeModel, network: Network) -> None:
    """Put a network in the place of the one that `whole.network` names, and free the weights of that.

    Raises ArtifactError where there is none.
    """
    parent, name = parent_of(impl, whole.network)
    original = getattr(parent, name, None)
    if original is None:
        raise ArtifactError(f"the whole model has no {whole.network}, which the engine takes the place of")
    if whole.call.kind is NetworkKind.ONNXRUNTIME:
        setattr(parent, name, EngineInferenceSession(network, original))
        return
    if whole.call.kind is NetworkKind.SKLEARN:
        EngineMethods(network, original).put_into(original)
        return
    original.forward = EngineForward(network, inspect.signature(original.forward))
    if whole.flavor == "sentence_transformers":
        _empty_networks(original)
    for tensor in (*original.parameters(), *original.buffers()):
        # The same shape and dtype, for code that asks for these, and one element of memory, on the CPU.
        tensor.data = tensor.data.new_zeros((), device="cpu").expand(tensor.shape)


def _empty_networks(module: Any) -> None:
    """Leave one parameter of each network of transformers, for its dtype and device.

    sentence_transformers walks through all layers several times for each call, which takes longer than the engine.
    """
    networks: Any = importlib.import_module("transformers").PreTrainedModel
    for network in [one for one in module.modules() if isinstance(one, networks)]:
        first = next(network.parameters(), None)
        network._modules.clear()  # noqa: SLF001  # torch has no other name for them, also below
        network._buffers.clear()  # noqa: SLF001
        network._parameters.clear()  # noqa: SLF001
        if first is not None:
            network.register_parameter("held_by_the_engine", first)


def parent_of(impl: Any, path: str) -> tuple[Any, str]:
    """The object that has the attribute at the end of a dotted path, and the name of that.

    Raises OptionError where the path leads nowhere.
    """
    *parents, name = path.split(".")
    for number, one in enumerate(parents):
        found = getattr(impl, one, None)
        if found is None:
            known = ".".join(parents[: number + 1])
            raise OptionError(f"network is {path!r}, and there is no {known}", option="network")
        impl = found
    return impl, name


def batch_in_pipeline(pipeline: Any, whole: WholeModel, rows: int) -> None:
    """Let a pipeline of transformers hand on several rows at once, unless its model says how many.

    Where outputs do not carry the length, as labels do not, it hands on many, which are sorted by length.
    """
    tokenizer = getattr(pipeline, "tokenizer", None)
    # Without lengths, a network of texts has no mask, or its answers change with padding.
    can_pad = tokenizer is None or (tokenizer.pad_token is not None and whole.lengths is not None)
    # The answer of feature-extraction would have rows of padding.
    if pipeline.task == "feature-extraction" or not can_pad or pipeline._batch_size not in {None, 1}:  # noqa: SLF001
        return
    carries = whole.lengths is not None and not whole.lengths.outputs
    pipeline._batch_size = rows * 8 if carries else rows  # noqa: SLF001  # has no other name once it is made


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' report of the weights that a whole model is without."""
    if not is_installed("transformers"):
        yield
        return
    logging = importlib.import_module("transformers.utils.logging")
    before, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if has_bars:
            logging.enable_progress_bar()
