from __future__ import annotations

import networks
import numpy as np
import onnx
import pandas as pd
import pytest
from compare import relative_error
from helpers import read, reference
from mlflow.data.numpy_dataset import from_numpy
from mlflow.data.pandas_dataset import from_pandas
from onnx import helper
from real_models import SILERO

import mlflow_trt
from mlflow_trt import InputError, Recipe
from mlflow_trt.convert.resolve_profiles import resolve_profiles
from mlflow_trt.convert.samples import SampleOrigin, cut_samples, generate_samples
from mlflow_trt.pipeline.user_samples import sample_data_of

ORIGIN = SampleOrigin.CALIBRATION_DATA
RAGGED = [[1.0] * 16, [2.0]]


@pytest.fixture
def product(tmp_path):
    model = read(networks.product(), tmp_path)
    return model, resolve_profiles(model, Recipe(batch=(1, 4, 8)))


def forms(folder, rows):
    np.savez(folder / "inputs.npz", x=rows)
    np.save(folder / "x.npy", rows)
    yield folder / "inputs.npz"
    yield str(folder / "x.npy")
    yield rows
    yield {"x": rows}
    yield [{"x": rows[start : start + 4]} for start in range(0, len(rows), 4)]
    yield ({"x": rows[start : start + 4]} for start in range(0, len(rows), 4))
    yield pd.DataFrame({"x": list(rows)})
    yield pd.DataFrame(rows)
    yield from_numpy({"x": rows})
    yield from_numpy(rows)
    yield from_pandas(pd.DataFrame({"x": list(rows)}))


def sentences(ids=("D.0", "D.1"), lengths="D.2", result="D.3") -> onnx.ModelProto:
    """Words looked up in a table, divided by the lengths of their sentences: the axes of the rows have two names."""
    return networks.model(
        [
            helper.make_node("Gather", ["table", "ids"], ["words"]),
            helper.make_node("Reshape", ["lengths", "shape"], ["column"]),
            helper.make_node("Cast", ["column"], ["divisor"], to=networks.FLOAT),
            helper.make_node("Div", ["words", "divisor"], ["mean"]),
            helper.make_node("MatMul", ["mean", "w"], ["y"]),
        ],
        [networks.value("ids", networks.INT64, ids), networks.value("lengths", networks.INT64, [lengths])],
        [networks.value("y", networks.FLOAT, [result, "D.4", 8])],
        [
            networks.constant("table", networks.rows(50)),
            networks.constant("w", networks.rows(16, 8)),
            networks.constant("shape", np.array([-1, 1, 1])),
        ],
    )


def sentence_feeds(count: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(count)
    return {"ids": random.integers(0, 50, (count, 12)), "lengths": random.integers(4, 12, count)}


SENTENCES = {"ids": ((1, 4), (4, 12), (16, 64)), "lengths": ((1,), (4,), (16,))}


@pytest.mark.parametrize("batch", [None, (1, 4, 16)])
def test_rows_are_counted_where_their_axes_have_several_names(batch, tmp_path):
    model = read(sentences(), tmp_path)
    profiles = resolve_profiles(model, Recipe(shapes=SENTENCES, batch=batch))
    assert cut_samples(sentence_feeds(16), ORIGIN, model, profiles).rows == 16
    assert (profiles.batch_axis is not None) == (batch is not None)


@pytest.mark.slow
def test_such_rows_are_enough_to_calibrate_on(tmp_path):
    data = sentence_feeds(16)
    mlflow_trt.save_model(sentences(), tmp_path / "m", precision="int8", shapes=SENTENCES, calibration_data=data)
    batched = tmp_path / "batched"
    mlflow_trt.save_model(
        sentences(), batched, precision="int8", shapes=SENTENCES, batch=(1, 4, 16), calibration_data=data
    )
    feeds = sentence_feeds(40)
    with mlflow_trt.load_model(str(batched), runtime="onnxruntime") as session:
        answered = session.run(feeds)
    with reference(read(sentences(), tmp_path)) as session:
        assert relative_error(answered, session.run(feeds)) < 1e-6


@pytest.mark.parametrize(
    ("model", "feeds", "rows"),
    [
        # One sequence, whatever its length.
        (sentences(ids=("sequence", "D.1")), sentence_feeds(16), 1),
        # One mapping, of rows that are not as many as lengths.
        (sentences(), sentence_feeds(3) | {"lengths": np.array([5])}, 1),
        # A batch of fixed size: each piece has so many rows.
        (networks.product(batch=4), {"x": networks.rows(16)}, 16),
        # Sequences of five steps each, with the batch behind them.
        (networks.sequences(), {"x": np.zeros((5, 12, 16), np.float32)}, 12),
        # A matrix of fixed size goes in, and another one comes out: nothing says that they have rows.
        (networks.mixed_sizes(), {"x": networks.rows(12)}, 3),
    ],
    ids=["sequence", "sizes", "fixed", "behind", "matrix"],
)
def test_what_counts_as_a_row(model, feeds, rows, tmp_path):
    source = read(model, tmp_path)
    shapes = SENTENCES if "ids" in feeds else {"x": ((5, 1, 16), (5, 4, 16), (5, 16, 16))} if rows == 12 else {}
    assert cut_samples(feeds, ORIGIN, source, resolve_profiles(source, Recipe(shapes=shapes))).rows == rows


@pytest.mark.filterwarnings("ignore:.*")  # MLflow guesses at the source of a dataset, and warns of what it tries
def test_every_form_gives_the_same_samples(product, tmp_path):
    rows = networks.rows(10)
    digests = set()
    for data in forms(tmp_path, rows):
        samples = cut_samples(sample_data_of(data, None, product[0].inputs).arrays, ORIGIN, *product)
        assert [len(feeds["x"]) for feeds in samples.feeds] == [4, 4, 2]
        assert np.array_equal(np.concatenate([feeds["x"] for feeds in samples.feeds]), rows)
        assert str(samples) == "10 rows of calibration data"
        digests.add(samples.sha256)
    assert len(digests) == 1


@pytest.mark.filterwarnings("ignore:.*")
def test_targets_and_predictions_of_a_dataset_are_no_inputs(product):
    table = pd.DataFrame(networks.rows(6), columns=[f"column {number}" for number in range(16)])
    dataset = from_pandas(table.assign(label=1, guess=0), targets="label", predictions="guess")
    assert np.array_equal(sample_data_of(dataset, None, product[0].inputs).arrays["x"], table.to_numpy())


def test_a_file_of_another_kind_is_not_said_to_be_one_to_trust(product, tmp_path):
    (tmp_path / "rows.csv").write_text("1,2\n")
    with pytest.raises(InputError, match="rows.csv cannot be read as .npz or .npy: it is neither; numpy.savez and"):
        sample_data_of(tmp_path / "rows.csv", None, product[0].inputs)


def test_the_input_example_serves_where_there_is_no_calibration_data(product):
    inputs = product[0].inputs
    for example in ({"x": networks.rows(3)}, networks.rows(3), networks.rows(3).tolist(), (networks.rows(3), {})):
        data = sample_data_of(None, example, inputs)
        assert data.origin is SampleOrigin.INPUT_EXAMPLE
        assert cut_samples(data.arrays, data.origin, *product).rows == 3
    assert sample_data_of(None, None, inputs) is None
    assert sample_data_of(None, "text", inputs) is None


def test_a_frame_that_the_model_cannot_take_is_said_to_be_no_example(product, messages):
    assert sample_data_of(None, pd.DataFrame({"x": [[1.0, 2.0], [3.0]]}), product[0].inputs) is None
    assert "Verifying on generated noise, since the model cannot take the input example: the cells of" in messages.text


@pytest.mark.parametrize("example", [{"x": RAGGED}, RAGGED], ids=["by name", "alone"])
def test_an_example_with_rows_of_different_lengths_is_passed_over(example, tmp_path, messages):
    mlflow_trt.save_model(networks.product(), tmp_path / "m", precision="fp16", input_example=example)
    assert "the model cannot take the input example: the input example: input 'x' is no regular array" in messages.text


NAN = networks.rows(4)
NAN[1, 1] = np.nan


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"z": networks.rows(4)}, "calibration data: input 'x' is missing"),
        ({"x": networks.rows(4, width=5)}, r"calibration data: input 'x' has the shape \(4, 5\)"),
        ({"x": NAN}, "calibration data: input 'x' has 1 NaN"),
        ({"x": networks.rows(0)}, "calibration data: there are no rows"),
        ([], "calibration data: there are no rows"),
        ({"x": RAGGED}, "calibration data: input 'x' is no regular array"),
        ([networks.rows(2)], "calibration data: got a ndarray in the iterable"),
        (3, "calibration data: got a int"),
    ],
)
def test_data_that_does_not_fit_is_named(product, data, message):
    with pytest.raises(InputError, match=message):
        cut_samples(data, ORIGIN, *product)


@pytest.mark.parametrize(("name", "content"), [("a.npz", b"no zip"), ("b.npy", b""), ("c.npz", None)])
def test_files_that_cannot_be_read_are_named(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        sample_data_of(tmp_path / name, None, ())


def test_a_model_of_fixed_size_takes_multiples_of_it(tmp_path):
    model = read(networks.product(batch=3), tmp_path)
    profiles = resolve_profiles(model, Recipe())
    assert len(cut_samples({"x": networks.rows(9)}, ORIGIN, model, profiles).feeds) == 3
    with pytest.raises(InputError, match="10 rows, but the model takes 3 at a time"):
        cut_samples({"x": networks.rows(10)}, ORIGIN, model, profiles)


def test_what_may_not_be_cut_stays_whole(tmp_path):
    model = read(SILERO, tmp_path)
    profiles = resolve_profiles(model, Recipe(**SILERO.recipe))
    samples = cut_samples([SILERO.feeds(20), SILERO.feeds(30)], ORIGIN, model, profiles)
    assert [len(feeds["input"]) for feeds in samples.feeds] == [20, 30]


def test_generated_samples_have_the_usual_shapes_and_differ(product):
    samples = generate_samples(*product)
    first, second = samples.feeds
    assert first["x"].shape == (4, 16)
    assert not np.array_equal(first["x"], second["x"])
    assert not samples.is_evidence
