"""The shapes that the network of a whole model is built for, from the calls that were seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx

from mlflow_trt.convert.recipe import Recipe, ShapeRequest
from mlflow_trt.core.arrays import Feeds, Outputs
from mlflow_trt.core.whole_model import Lengths
from mlflow_trt.flavor.whole.lengths import ends_of, few_lengths, run_in_lengths
from mlflow_trt.registry.sources.exporting import ROWS
from mlflow_trt.registry.sources.whole.capture import LENGTH, NetworkRun, Sizes, axes_of

_PADDING_ERROR = 1e-3
"""What padding may change, relative; float32 rounds by less in sums of another order."""

_START_OPERATIONS = 1.2e11
"""In half precision, while a run is prepared and launched, 0.8 ms: measured on an H100. MiniLM has 11 million weights
in matrices, a BERT-base 85. Less powerful GPUs pad more than would be best, by no more than a few milliseconds."""
_MOST_START_COST = 16_384

MASK = "attention_mask"
"""What networks of texts call the input that tells them where a row ends."""


@dataclass(frozen=True, kw_only=True)
class TextLimits:
    """The longest text that a network takes, in tokens, where that is known, and what pads `input_ids`."""

    longest: int | None = None
    padding: int = 0
    pads_at_end: bool = True


def text_limits(network: Any, tokenizer: Any) -> TextLimits:
    """What a network and its tokenizer say."""
    config = getattr(network, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    config = get_text_config() if callable(get_text_config) else config
    positions = getattr(config, "max_position_embeddings", None)
    limits = [getattr(tokenizer, "model_max_length", None)]
    padding = getattr(tokenizer, "pad_token_id", None)
    if padding is None:
        padding = getattr(config, "pad_token_id", None)
    if isinstance(positions, int) and positions > 0:
        # Like RoBERTa, whose positions begin behind that of the padding.
        offset = getattr(_embedding_of_positions(network), "padding_idx", None)
        limits.append(positions if offset is None else positions - offset - 1)
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 2**20]
    return TextLimits(
        longest=min(known, default=None),
        padding=padding if isinstance(padding, int) else 0,
        pads_at_end=getattr(tokenizer, "padding_side", "right") == "right",
    )


def _embedding_of_positions(network: Any) -> Any:
    named = getattr(network, "named_modules", None)
    return next((one for name, one in named() if name.endswith("position_embeddings")), None) if named else None


def find_lengths(runs: Sequence[NetworkRun], names: Mapping[Sizes, str], limits: TextLimits) -> Lengths | None:
    """The lengths that texts are padded to; None where the network takes no mask, or more than its length varies."""
    inputs = axes_of([run.feeds for run in runs])
    outputs = axes_of([run.outputs for run in runs])
    if MASK not in inputs or len(inputs[MASK]) != 2 or not limits.pads_at_end:
        return None
    if any(ends_of(run.feeds[MASK]) is None for run in runs):
        return None
    length = inputs[MASK][1]
    if names.get(length) != LENGTH:
        return None
    others = {axis for axes in inputs.values() for axis in axes} | {axis for axes in outputs.values() for axis in axes}
    if any(len(set(axis)) > 1 and names.get(axis) not in {ROWS, LENGTH} for axis in others):
        return None
    padding = {
        name: limits.padding if name == "input_ids" else 0
        for name, axes in inputs.items()
        if len(axes) > 1 and axes[1] == length
    }
    if any(length in axes[:1] + axes[2:] for axes in (*inputs.values(), *outputs.values())):
        return None
    used = [int(row) for run in runs for row in (np.asarray(run.feeds[MASK]) != 0).sum(axis=1)]
    longest = limits.longest or max(used)
    return Lengths(
        mask=MASK,
        padding=padding,
        outputs=tuple(name for name, axes in outputs.items() if len(axes) > 1 and axes[1] == length),
        sizes=few_lengths(round(median(used)), longest),
    )


def bears_padding(run: Callable[[Feeds], Outputs], runs: Sequence[NetworkRun], lengths: Lengths) -> bool:
    """Whether the network answers the same on padded rows: some mix what the mask hides into their answer."""
    for one in runs:
        mask = np.asarray(one.feeds[lengths.mask]) != 0
        for name, array in run_in_lengths(run, one.feeds, lengths).items():
            expected, answer = one.outputs[name].astype(np.float64), array.astype(np.float64)
            if name in lengths.outputs:
                expected, answer = expected[mask], answer[mask]
            if np.linalg.norm(answer - expected) > _PADDING_ERROR * np.linalg.norm(expected):
                return False
    return True


def start_cost(network: Path) -> int:
    """How many tokens a GPU computes in the time of starting a run, for a network of texts in an ONNX file.

    A token costs two operations for each weight of a matrix, but for those that are looked up.
    """
    graph = onnx.load(network, load_external_data=False).graph
    looked_up = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    weights = sum(math.prod(one.dims) for one in graph.initializer if len(one.dims) == 2 and one.name not in looked_up)
    cost: int = min(_MOST_START_COST, round(_START_OPERATIONS / (2 * max(weights, 1))))
    return cost


def asked_lengths(lengths: Lengths | None, recipe: Recipe) -> Lengths | None:
    """The lengths of the shapes that the user asks for, instead of those that were found."""
    if lengths is None or not recipe.shapes:
        return lengths
    sizes: set[int] = set()
    for request in recipe.shapes:
        triple = next((request[name] for name in lengths.padding if name in request), None)
        if triple is None or len(triple[0]) < 2:
            return None
        low, usual, high = (shape[1] for shape in triple)
        sizes |= {high} if low == high else set(few_lengths(usual, high))
    return replace(lengths, sizes=tuple(sorted(sizes)))


def shapes_of(
    runs: Sequence[NetworkRun], names: Mapping[Sizes, str], lengths: Lengths | None, limits: TextLimits
) -> list[ShapeRequest]:
    """The shapes to ask for: a profile for each length, or one of what was seen. -1 stands for rows."""
    inputs = axes_of([run.feeds for run in runs])

    def seen(axis: Sizes, number: int) -> tuple[int, int, int]:
        if number == 0 and (names.get(axis) == ROWS or len(set(axis)) == 1):
            return (-1, -1, -1)
        if names.get(axis) == LENGTH and "input_ids" in inputs and limits.longest is not None:
            return (1, axis[0], limits.longest)
        return (min(axis), axis[0], max(axis))

    def request(size: int | None) -> ShapeRequest:
        shapes = {}
        for name, axes in inputs.items():
            dims = [
                (size,) * 3 if size is not None and names.get(axis) == LENGTH else seen(axis, number)
                for number, axis in enumerate(axes)
            ]
            low, usual, high = zip(*dims, strict=True) if dims else ((), (), ())
            shapes[name] = (low, usual, high)
        return shapes

    return [request(size) for size in (lengths.sizes if lengths is not None else (None,))]


def samples_of(runs: Sequence[NetworkRun], lengths: Lengths | None) -> list[Feeds]:
    """What the network was called with, as an engine of these lengths is going to be."""
    if lengths is None:
        return [run.feeds for run in runs]
    padded: list[Feeds] = []

    def note(feeds: Feeds) -> dict[str, Any]:
        padded.append(feeds)
        return {}

    for run in runs:
        run_in_lengths(note, run.feeds, replace(lengths, outputs=()))
    return padded
