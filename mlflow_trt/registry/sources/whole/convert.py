"""From a whole model that MLflow keeps to the ONNX of its network, and what has to be known to put an engine there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlflow import pyfunc
from mlflow.models import Model
from mlflow.pyfunc import PyFuncModel

from mlflow_trt.backends.onnxruntime import write_model_of
from mlflow_trt.convert.onnx.model import MODEL_FILE
from mlflow_trt.convert.recipe import Recipe, ShapeRequest
from mlflow_trt.core.arrays import Feeds
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.whole_model import Lengths, NetworkCall, NetworkKind
from mlflow_trt.errors import MlflowTrtError, OnnxModelError
from mlflow_trt.flavor.whole.hollow import hollow_weights
from mlflow_trt.flavor.whole.loading import load_impl, parent_of
from mlflow_trt.flavor.whole.package import WholeSource
from mlflow_trt.registry.sources.exporting import Export, Needs
from mlflow_trt.registry.sources.whole.capture import (
    NetworkRun,
    Recording,
    name_axes,
    recorded,
)
from mlflow_trt.registry.sources.whole.examples import inputs_of, variations
from mlflow_trt.registry.sources.whole.find import (
    SENTENCE_TRANSFORMERS,
    TRANSFORMERS,
    check_flavor_conf,
    check_no_remote_code,
    find_network,
)
from mlflow_trt.registry.sources.whole.original import export_network, runner_of
from mlflow_trt.registry.sources.whole.shapes import (
    TextLimits,
    asked_lengths,
    bears_padding,
    find_lengths,
    samples_of,
    shapes_of,
    start_cost,
    text_limits,
)

NEEDS = {
    TRANSFORMERS: Needs(
        extra="transformers", modules={"torch": "torch", "onnxscript": "onnxscript", "transformers": "transformers"}
    ),
    SENTENCE_TRANSFORMERS: Needs(
        extra="sentence-transformers",
        modules={"torch": "torch", "onnxscript": "onnxscript", "sentence_transformers": "sentence-transformers"},
    ),
}

_ROWS_AT_ONCE = 4

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class WholeOptions:
    """What the user says of a whole model: which network to convert, data to run it with, and whether to trust code.

    With `whole` an estimator of scikit-learn is converted as one, too.
    """

    whole: bool = False
    network: str | None = None
    data: Any = None
    recipe: Recipe = field(default_factory=Recipe)
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class OpenedWhole:
    """The network as an ONNX file, and what surrounds it. `shapes` are those to build for, `samples` real feeds."""

    source: WholeSource
    export: Export
    shapes: Sequence[ShapeRequest]
    samples: Sequence[Feeds]


def open_whole(
    source: str, model: Model, folder: Path, target: Path, flavor: str, options: WholeOptions
) -> OpenedWhole:
    """Run a whole model on its examples, and export its network into `target`. Its code runs here, as in MLflow.

    Raises OnnxModelError, OptionError, ArtifactError or UnsupportedModelError for one that cannot be converted.
    """
    check_flavor_conf(model, source)
    if not options.trust_remote_code:
        check_no_remote_code(folder, source)
    conf = model.flavors[pyfunc.FLAVOR_NAME]
    config = conf.get(pyfunc.MODEL_CONFIG) or {}
    with _ignored_warnings():
        impl = load_impl(folder, config, trusts_code=options.trust_remote_code)
        runs, call, path, examples = _watched(impl, model, folder, flavor, options)
        names = name_axes(runs)
        parent, name = parent_of(impl, path)
        network = getattr(parent, name)
        if call.kind is NetworkKind.TORCH:
            network.to("cpu").eval()  # some loaders take a GPU where there is one
        limits = _limits_of(impl, flavor, network)
        lengths = asked_lengths(find_lengths(runs, names, limits), options.recipe)
        bears = lengths is None or bears_padding(runner_of(network, call), runs, lengths)
        remarks = _about_lengths(lengths, limits, bears=bears)
        lengths = lengths if bears else None
        file = target / MODEL_FILE
        if call.kind is NetworkKind.ONNXRUNTIME:
            write_model_of(network, file)
            export = Export(path=file, modules=("onnxruntime",))
        else:
            export_network(network, call, runs, names, file)
            export = Export(path=file, modules=("torch", "onnxscript"))
        if lengths is not None:
            lengths = replace(lengths, start_cost=start_cost(file))
    return OpenedWhole(
        source=WholeSource(
            folder=folder,
            flavor=flavor,
            network=path,
            call=call,
            lengths=lengths,
            weights=_weights_of(impl, model, folder, flavor),
            config=config,
            examples=examples,
            answers_its_example=options.data is None,
            remarks=remarks,
            trusts_code=options.trust_remote_code,
        ),
        export=export,
        shapes=shapes_of(runs, names, lengths, limits),
        samples=samples_of(runs, lengths),
    )


def _watched(
    impl: Any, model: Model, folder: Path, flavor: str, options: WholeOptions
) -> tuple[list[NetworkRun], NetworkCall, str, tuple[tuple[Any, Any], ...]]:
    """The calls of the network while the model answers its examples, and these with the answers."""
    inputs = inputs_of(model, folder, options.data)
    face = PyFuncModel(model_meta=model, model_impl=impl)
    path, kind = find_network(impl, flavor, options.network)
    examples: list[tuple[Any, Any]] = []
    with recorded(impl, path, kind) as recording:
        for number, variation in enumerate(variations(inputs)):
            before = len(recording.runs)
            try:
                answer = face.predict(variation)
            except MlflowTrtError:
                raise
            except Exception as error:
                del recording.runs[before:]
                if number == 0:
                    raise OnnxModelError(f"the model does not answer its own input example: {error}") from error
                _log.debug("The model refuses a variation of its example: %s", error)
                continue
            examples.append((variation, answer))
        if flavor == TRANSFORMERS:
            _watch_in_batches(impl, face, inputs, recording)
    if recording.call is None:
        raise OnnxModelError(
            f"{path.removeprefix('python_model.')} was not called while the model answered its input example. A "
            "network is seen where it is called as itself, self.network(...) or self.session.run(...), and not by "
            "another method"
        )
    if not recording.call.inputs:
        raise OnnxModelError(f"{path.removeprefix('python_model.')} is called without any tensor")
    return recording.runs, recording.call, path, tuple(examples)


def _watch_in_batches(impl: Any, face: PyFuncModel, inputs: Any, recording: Recording) -> None:
    """Let a pipeline hand on several rows at once, which it does one by one unless it is told otherwise."""
    pipeline, before = impl.pipeline, len(recording.runs)
    pipeline._batch_size, usual = _ROWS_AT_ONCE, pipeline._batch_size  # noqa: SLF001  # has no other name once it is made
    try:
        face.predict(inputs)
    except MlflowTrtError:
        raise
    except Exception as error:  # noqa: BLE001  # without a token to pad with, for example
        del recording.runs[before:]
        _log.debug("The pipeline takes no batches: %s", error)
    finally:
        pipeline._batch_size = usual  # noqa: SLF001  # as above


def _about_lengths(lengths: Lengths | None, limits: TextLimits, *, bears: bool) -> tuple[str, ...]:
    if lengths is None:
        return ()
    if not bears:
        remark = "texts are run one by one in the length that they have, since padding changes what comes out"
    else:
        sizes = ", ".join(map(str, lengths.sizes))
        seen = "" if limits.longest is not None else ", as the longest that was seen; --data with longer ones raises it"
        remark = f"texts are padded to the next of {sizes} tokens and may have {lengths.sizes[-1]} at most{seen}"
    _log.info("%s", remark[0].upper() + remark[1:])
    return (remark,)


def _limits_of(impl: Any, flavor: str, network: Any) -> TextLimits:
    if flavor == TRANSFORMERS:
        return text_limits(network, impl.pipeline.tokenizer)
    if flavor == SENTENCE_TRANSFORMERS:
        first = network[0]
        return text_limits(getattr(first, "auto_model", None), network.tokenizer)
    tokenizers = [value for value in vars(impl.python_model).values() if hasattr(value, "model_max_length")]
    return text_limits(network, tokenizers[0] if len(tokenizers) == 1 else None)


def _weights_of(impl: Any, model: Model, folder: Path, flavor: str) -> dict[Path, bytes]:
    """The folders, below that of the model, with weights that the engine has instead, and what is to be there."""
    if flavor == TRANSFORMERS:
        return {Path(model.flavors[TRANSFORMERS]["model_binary"]): hollow_weights(impl.pipeline.model.state_dict())}
    if flavor == SENTENCE_TRANSFORMERS:
        data = Path(model.flavors[pyfunc.FLAVOR_NAME][pyfunc.DATA])
        # Only a transformer's: those of other modules are small, and loaded whole or not at all.
        configs = [file for file in sorted((folder / data).rglob("config.json")) if '"model_type"' in file.read_text()]
        transformers = [module.auto_model for module in impl.model if hasattr(module, "auto_model")]
        if len(configs) == len(transformers) == 1:
            return {configs[0].parent.relative_to(folder): hollow_weights(transformers[0].state_dict())}
    return {}


@contextmanager
def _ignored_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the source, of torch and of MLflow, about their own insides
        yield
