"""Splitting, padding and joining, on the CPU runtime: the code that the GPU sessions run."""

from __future__ import annotations

import networks
import numpy as np
import pytest
from helpers import read, reference
from real_models import MAGIKA

from mlflow_trt import InputShapeError
from mlflow_trt.runtime.batching import Piece, pieces, run_in_pieces
from mlflow_trt.spec import BatchAxis

AXIS = BatchAxis(inputs=("x",), splits=True, declared=True)


@pytest.mark.parametrize(
    ("rows", "smallest", "largest", "expected"),
    [
        (5, 1, 8, [Piece(0, 5, 5)]),
        (8, 1, 8, [Piece(0, 8, 8)]),
        (1, 4, 8, [Piece(0, 1, 4)]),
        (17, 2, 8, [Piece(0, 8, 8), Piece(8, 16, 8), Piece(16, 17, 2)]),
        (6, 4, 4, [Piece(0, 4, 4), Piece(4, 6, 4)]),
        (0, 2, 8, [Piece(0, 0, 2)]),
    ],
)
def test_pieces(rows, smallest, largest, expected):
    assert list(pieces(rows, smallest, largest)) == expected


@pytest.mark.parametrize("rows", [0, 1, 4, 5, 8, 19])
def test_a_batch_of_any_size_gives_the_same_rows(rows, tmp_path):
    sizes = []
    with reference(read(networks.product(), tmp_path)) as session:

        def execute(feeds):
            sizes.append(len(feeds["x"]))
            return session.run(feeds)

        feeds = {"x": networks.rows(rows)}
        result = run_in_pieces(feeds, AXIS, 4, 8, execute)
        assert all(4 <= size <= 8 for size in sizes)
        assert np.allclose(result["y"], session.run(feeds)["y"], rtol=1e-6)
        assert result["y"].shape == (rows, 8)


def test_padding_repeats_valid_rows(tmp_path):
    """magika looks its input up in a table; a padding of zeros would be valid too, but not for every model."""
    seen = []
    run_in_pieces({"x": np.array([[3], [7]])}, AXIS, 4, 4, lambda feeds: seen.append(feeds["x"]) or {"y": feeds["x"]})
    assert seen[0].tolist() == [[3], [7], [7], [7]]


def test_inputs_without_the_axis_are_passed_whole(tmp_path):
    model = networks.transformer()
    axis = BatchAxis(inputs=("input_ids", "attention_mask"), splits=True, declared=True)
    with reference(read(model, tmp_path)) as session:
        feeds = networks.sentences(11, 16)
        split = run_in_pieces(feeds, axis, 2, 4, session.run)
        whole = session.run(feeds)
        assert all(np.allclose(split[name], whole[name], atol=1e-5) for name in whole)


def test_real_rows_are_independent(tmp_path):
    axis = BatchAxis(inputs=("bytes",), splits=True, declared=True)
    with reference(read(MAGIKA, tmp_path)) as session:
        feeds = MAGIKA.feeds(13)
        split = run_in_pieces(feeds, axis, 2, 5, session.run)["target_label"]
        whole = session.run(feeds)["target_label"]
        assert np.allclose(split, whole, atol=1e-5)
        assert len(set(whole.argmax(axis=1))) > 1


@pytest.mark.parametrize("output", [np.zeros(()), np.zeros((1, 8))])
def test_an_output_without_the_axis_is_an_error(output):
    with pytest.raises(InputShapeError, match="output 'y' has the shape .* for 8 rows of input"):
        run_in_pieces({"x": networks.rows(9)}, AXIS, 1, 8, lambda feeds: {"y": output})


def test_inputs_must_agree_on_the_number_of_rows():
    axis = BatchAxis(inputs=("x", "z"), splits=True, declared=True)
    with pytest.raises(InputShapeError, match="input 'z' has 8 rows, but input 'x' has 9"):
        run_in_pieces({"x": networks.rows(9), "z": networks.rows(8)}, axis, 1, 8, lambda feeds: feeds)
