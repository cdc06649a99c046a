"""Texts in few lengths, and the data that whole models are run with."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from mlflow.data.pandas_dataset import from_pandas

from mlflow_trt.core.whole_model import Lengths
from mlflow_trt.errors import InputError
from mlflow_trt.flavor.whole.lengths import (
    computed_tokens,
    ends_of,
    few_lengths,
    group_rows,
    run_in_lengths,
)
from mlflow_trt.registry.sources.whole.examples import read_data, variations

LENGTHS = Lengths(
    mask="attention_mask", padding={"input_ids": 7, "attention_mask": 0}, outputs=("tokens",), sizes=(8, 16, 32)
)


def feeds(*ends, width=24, seed=0):
    ids = np.random.default_rng(seed).integers(10, 90, (len(ends), width))
    mask = (np.arange(width) < np.array(ends)[:, None]).astype(np.int64)
    return {"input_ids": np.where(mask, ids, 7), "attention_mask": mask, "weight": np.float32(2)}


class Network:
    """Squares of tokens and their sum, of what the mask shows; notes what it was called with."""

    def __init__(self):
        self.shapes = []

    def __call__(self, given):
        self.shapes.append(given["input_ids"].shape)
        assert (given["input_ids"][given["attention_mask"] == 0] == 7).all()
        tokens = given["input_ids"] ** 2 * given["attention_mask"] * given["weight"]
        return {"tokens": tokens, "sum": tokens.sum(1)}


@pytest.mark.parametrize(
    ("usual", "longest", "sizes"),
    [(12, 256, (16, 40, 104, 256)), (300, 256, (256,)), (1, 5, (5,)), (8, 512, (8, 32, 128, 512)), (250, 256, (256,))],
)
def test_four_lengths_at_most(usual, longest, sizes):
    assert few_lengths(usual, longest) == sizes


@pytest.mark.parametrize("ends", [(3, 24, 9, 8, 1, 17), (5, 6), (24,), (20, 24)], ids=str)
def test_rows_come_back_in_their_places(ends):
    network, given = Network(), feeds(*ends)
    answer = run_in_lengths(network, given, LENGTHS)
    expected = Network()(given)
    assert answer.keys() == expected.keys()
    for name, array in expected.items():
        assert answer[name].dtype == array.dtype
        assert (answer[name] == array).all()
    assert {shape[1] for shape in network.shapes} <= set(LENGTHS.sizes)
    assert sum(rows * length for rows, length in network.shapes) == computed_tokens(given["attention_mask"], LENGTHS)


@pytest.mark.parametrize(
    ("start_cost", "groups"),
    [
        (0, [(8, [0, 3, 4]), (16, [2]), (32, [1, 5])]),
        (7, [(8, [0, 3, 4]), (16, [2]), (32, [1, 5])]),
        (17, [(8, [0, 3, 4]), (32, [1, 2, 5])]),  # one row more of 32 tokens instead of 16
        (1000, [(32, [0, 1, 2, 3, 4, 5])]),
    ],
)
def test_rows_are_padded_further_where_that_costs_less_than_a_run(start_cost, groups):
    given = feeds(3, 24, 9, 8, 1, 17)
    assert group_rows(ends_of(given["attention_mask"]), LENGTHS.sizes, start_cost) == groups
    network = Network()
    answer = run_in_lengths(network, given, LENGTHS, start_cost)
    for name, array in Network()(given).items():
        assert (answer[name] == array).all()
    assert [rows for rows, _ in network.shapes] == [len(rows) for _, rows in groups]


def test_the_fewest_tokens_of_all_ways():
    """Checked against every way to pad each row to any length."""
    random = np.random.default_rng(3)
    for _ in range(60):
        ends = random.integers(1, 33, random.integers(1, 6))
        start_cost = int(random.integers(0, 80))
        ways = itertools.product(*([size for size in LENGTHS.sizes if size >= end] for end in ends))
        best = min(sum(way) + start_cost * len(set(way)) for way in ways)
        found = group_rows(ends, LENGTHS.sizes, start_cost)
        assert sum(size * len(rows) + start_cost for size, rows in found) == best
        assert sorted(row for _, rows in found for row in rows) == list(range(len(ends)))


def test_what_does_not_end_with_its_padding_is_run_as_it_is():
    given = feeds(5, 12)
    given = {name: array[:, ::-1] if array.ndim else array for name, array in given.items()}
    network = Network()
    assert (run_in_lengths(network, given, LENGTHS)["sum"] == Network()(given)["sum"]).all()
    assert network.shapes == [(2, 24)]


def test_a_text_that_is_too_long_keeps_its_length():
    network = Network()
    run_in_lengths(network, feeds(40, 3, width=40), LENGTHS)
    assert sorted(network.shapes) == [(1, 8), (1, 40)]


class TestData:
    texts = ("warm sun", 'cold, "rain"', "")

    @pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet", "txt"])
    def test_files_of_one_column_are_lists(self, ending, tmp_path):
        frame = pd.DataFrame({"text": self.texts[:2]})
        file = tmp_path / f"texts.{ending}"
        if ending == "csv":
            frame.to_csv(file, index=False)
        elif ending == "parquet":
            frame.to_parquet(file)
        else:
            lines = [json.dumps({"text": text}) if ending == "jsonl" else text for text in self.texts[:2]]
            file.write_text("\n".join(lines))
        assert read_data(file) == list(self.texts[:2])

    @pytest.mark.filterwarnings("ignore")  # MLflow's, about pandas 4
    def test_several_columns_are_a_frame(self, tmp_path):
        frame = pd.DataFrame({"text": self.texts[:2], "number": [1, 2]})
        frame.to_csv(tmp_path / "texts.csv", index=False)
        pd.testing.assert_frame_equal(read_data(str(tmp_path / "texts.csv")), frame)
        pd.testing.assert_frame_equal(read_data(from_pandas(frame)), frame)
        labelled = from_pandas(frame.assign(label=1), targets="label")
        pd.testing.assert_frame_equal(read_data(labelled), frame)

    def test_a_folder_of_images(self, tmp_path):
        for name in ("b.png", "a.jpg", "notes.md"):
            (tmp_path / name).write_bytes(name.encode())
        assert read_data(tmp_path) == [b"a.jpg", b"b.png"]

    def test_anything_else_is_an_error(self, tmp_path):
        with pytest.raises(InputError, match="has no images"):
            read_data(tmp_path)
        with pytest.raises(InputError, match=r"expected one of .csv, .parquet, .jsonl, .txt, or a folder of images"):
            read_data(tmp_path / "texts.xml")
        with pytest.raises(InputError, match="cannot be read"):
            read_data(tmp_path / "missing.csv")
        (tmp_path / "broken.jsonl").write_text("{")
        with pytest.raises(InputError, match="cannot be read"):
            read_data(tmp_path / "broken.jsonl")

    @pytest.mark.parametrize(
        ("inputs", "rows"),
        [
            (["a b", "c"], [2, 1, 3, 2, 2]),
            (np.zeros((3, 2)), [3, 1, 4]),
            (pd.DataFrame({"text": ["a", "b"], "n": [1, 2]}), [2, 1, 3, 2, 2]),
            ({"x": np.zeros((2, 2)), "y": [1, 2]}, [2, 2, 2]),
            ("a text", [6, 2, 13, 1]),
            (b"bytes", [5]),
        ],
        ids=["list", "array", "frame", "mapping", "text", "bytes"],
    )
    def test_variations_differ_in_rows_and_lengths(self, inputs, rows):
        found = list(variations(inputs))
        assert [len(one) for one in found] == rows
        assert found[0] is inputs

    def test_texts_are_found_wherever_they_are(self):
        pairs = [{"text": "a b", "text_pair": "c d"}, {"text": "e", "text_pair": "f"}]
        *_, longer, shorter = variations(pairs)
        assert longer[0] == {"text": "a b a b", "text_pair": "c d c d"}
        assert shorter[0] == {"text": "a", "text_pair": "c"}
        *_, longer, shorter = variations({"sequences": ["a b"], "candidate_labels": ["c d"], "n": 3})
        assert shorter == {"sequences": ["a"], "candidate_labels": ["c"], "n": 3}
