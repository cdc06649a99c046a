"""A whole model: how everything around a network calls it, so that an engine can answer in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlflow_trt.core.types import StrEnum


class NetworkKind(StrEnum):
    """What the network of the source is."""

    TORCH = "torch"
    ONNXRUNTIME = "onnxruntime"
    SKLEARN = "sklearn"


class Answer(StrEnum):
    """In which form a network hands back its outputs.

    `MODEL_OUTPUT` is that of transformers, `FEATURES` that of sentence_transformers: what came in, and more.
    """

    TENSOR = "tensor"
    TUPLE = "tuple"
    LIST = "list"
    DICT = "dict"
    MODEL_OUTPUT = "model_output"
    FEATURES = "features"


@dataclass(frozen=True, kw_only=True)
class NetworkCall:
    """How the network is called.

    `inputs` and `outputs` are names of the ONNX model; those of a torch module are the parameters of its `forward`, and
    `keys` those of the answer where it has any. `constants` are the other arguments, which are the same in every call.
    """

    kind: NetworkKind
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    answer: Answer = Answer.TENSOR
    keys: tuple[str, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The few lengths that texts are run in, so that each is compiled once.

    Rows are padded at the end, which is allowed since `mask` tells the network where they end. `padding` names the
    inputs whose axis 1 is that of the mask and what they are padded with, `outputs` the outputs that carry the axis.
    `start_cost` is how many tokens a GPU computes while it could start another run: it decides whether rows are padded
    to the length of others or run by themselves.
    """

    mask: str
    padding: Mapping[str, int]
    outputs: tuple[str, ...]
    sizes: tuple[int, ...]
    start_cost: int = 0


@dataclass(frozen=True, kw_only=True)
class GoldenAnswer:
    """The file with the source's answer to its input example, and what another answer may be off from it."""

    file: str
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How near the answers came to those of the source, before the model was logged.

    `inputs` were answered on `runtime`. `numbers` is how many floats there were, and `largest_error` the largest one of
    any column or array: its largest absolute difference, as a share of its largest magnitude, or of 1 where all are 0.
    Of `texts`, such as labels, all were `equal` but those whose numbers beside them were a tie.
    """

    inputs: int
    runtime: str
    numbers: int
    largest_error: float
    texts: int
    equal: int

    def __str__(self) -> str:
        of_numbers = f"{self.numbers} numbers off by {self.largest_error:.2g} at most" if self.numbers else ""
        of_texts = f"{self.equal} of {self.texts} texts equal" if self.texts else ""
        return ", ".join(filter(None, (f"{self.inputs} inputs", of_numbers, of_texts, f"on {self.runtime}")))


@dataclass(frozen=True, kw_only=True)
class WholeModel:
    """What a model folder says of the whole model in it.

    `flavor` is the one of MLflow that loads it, `network` the attribute that the engine takes the place of. `files` are
    those below `whole/`, each with its sha256, and `golden` what the source answers to its input example; `hollow` are
    files of weights that have none. With `trusts_code` it may run Python files of its own. `own_settings` are settings
    of the source that are called like one of ours, and so cannot be overridden. `agreement` is with the source, where
    the two were compared.
    """

    flavor: str
    network: str
    call: NetworkCall
    files: Mapping[str, str]
    lengths: Lengths | None = None
    golden: GoldenAnswer | None = None
    hollow: tuple[str, ...] = ()
    trusts_code: bool = False
    own_settings: Mapping[str, Any] = field(default_factory=dict)
    agreement: Agreement | None = None
