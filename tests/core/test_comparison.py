from __future__ import annotations

import numpy as np
import pytest

from mlflow_trt import OptionError, Precision, Tolerance
from mlflow_trt.core.accuracy import Comparison, Verdict
from mlflow_trt.core.comparing import compare
from mlflow_trt.core.types import BatchAxis

AXIS = BatchAxis(inputs=("x",), splits=True, declared=True)
ROWS = np.random.default_rng(0).standard_normal((20, 5)).astype(np.float32)


def compared(actual, reference, tolerance=None) -> Comparison:
    return compare("subject", "inputs", [({"y": actual}, {"y": reference})], tolerance or Tolerance())


def test_the_numbers_are_those_of_numpy_over_all_samples():
    noisy = ROWS + np.float32(0.01) * ROWS[::-1]
    pairs = [({"y": noisy[:7]}, {"y": ROWS[:7]}), ({"y": noisy[7:]}, {"y": ROWS[7:]})]
    output = compare("subject", "inputs", pairs, Tolerance()).outputs[0]
    difference = (noisy - ROWS).astype(np.float64)
    assert output.values == 100
    assert output.max_abs_error == pytest.approx(np.abs(difference).max())
    assert output.mean_abs_error == pytest.approx(np.abs(difference).mean())
    assert output.relative_error == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(ROWS), rel=1e-6)
    cosine = np.vdot(noisy, ROWS) / np.linalg.norm(noisy) / np.linalg.norm(ROWS)
    assert output.cosine_similarity == pytest.approx(cosine, rel=1e-6)


@pytest.mark.parametrize(
    ("tolerance", "words"),
    [
        (Tolerance(relative_error=0.05), "relative error 0.1, at most 0.05"),
        (Tolerance(max_abs_error=0.01), "largest absolute error"),
        (Tolerance(cosine_similarity=0.999999), None),
        (Tolerance(relative_error=0.2, max_abs_error=1), None),
    ],
)
def test_what_is_beyond_the_tolerance_is_said(tolerance, words):
    comparison = compared(ROWS * np.float32(1.1), ROWS, tolerance)
    assert comparison.verdict is (Verdict.FAILED if words else Verdict.PASSED)
    assert (words or "") in " ".join(comparison.problems)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_tolerance_covers_nan_and_infinity(value):
    broken = ROWS.copy()
    broken[3, 2] = value
    comparison = compared(broken, ROWS)
    assert comparison.verdict is Verdict.FAILED
    assert comparison.severity == float("inf")
    assert (comparison.outputs[0].nans, comparison.outputs[0].infinities) == (
        int(np.isnan(value)),
        int(np.isinf(value)),
    )


def test_infinity_where_the_reference_has_it_is_no_error():
    reference = ROWS.copy()
    reference[0, 0] = -np.inf
    assert compared(reference, reference).verdict is Verdict.PASSED


@pytest.mark.parametrize("value", [np.nan, np.inf, -65504.0, 0.0])
def test_anything_else_where_the_reference_is_infinite_is_one(value):
    """A masked score that is no longer masked."""
    reference = ROWS.copy()
    reference[3, 2] = -np.inf
    actual = reference.copy()
    actual[3, 2] = value
    comparison = compared(actual, reference)
    assert comparison.verdict is Verdict.FAILED
    assert comparison.outputs[0].lost_infinities == 1
    assert "where the reference is infinite, 1 values are not, or another infinity" in comparison.problems[0]


def test_the_best_of_classes_that_are_masked():
    reference = np.array([[1, 2, -np.inf], [-np.inf, 3, 1], [2, 1, -np.inf], [4, -np.inf, 1]], np.float32)
    actual = reference.copy()
    actual[0, :2] = actual[0, 1::-1]
    (output,) = compared(actual, reference, Tolerance(relative_error=None, top_class_agreement=1.0)).outputs
    assert (output.classes, output.top_class_agreement, output.lost_infinities) == (3, 0.75, 0)


@pytest.mark.parametrize(("actual", "error", "nans"), [(2.0, 0.0, 0), (2.1, 0.05, 0), (np.nan, 0.0, 1)])
def test_outputs_without_an_axis(actual, error, nans):
    """One number for each sample, such as a loss."""
    pairs = [({"y": np.array(actual)}, {"y": np.array(2.0)}), ({"y": np.array(-2.0)}, {"y": np.array(-2.0)})]
    (output,) = compare("subject", "inputs", pairs, Tolerance(), batch_axis=AXIS).outputs
    assert (output.values, output.nans) == (2 - nans, nans)
    assert output.max_abs_error == pytest.approx(error * 2)
    assert output.worst_row_error == pytest.approx(error)


@pytest.mark.parametrize("reference", [np.zeros((4, 5), np.float32), np.full((4, 5), 0.2, np.float32)])
def test_a_reference_that_hardly_varies_proves_nothing(reference):
    assert compared(reference, reference, Tolerance(relative_error=0.1)).verdict is Verdict.INCONCLUSIVE


def test_the_best_class_must_agree_where_it_is_beyond_doubt():
    scores = np.float32([[0.9, 0.1], [0.505, 0.495], [0.2, 0.8]])
    swapped = np.float32([[0.9, 0.1], [0.495, 0.505], [0.2, 0.8]])
    output = compared(swapped, scores, Tolerance(relative_error=0.02)).outputs[0]
    assert output.classes == 2
    assert output.top_class_agreement == pytest.approx(2 / 3)
    assert output.clear_agreement == 1
    assert compared(swapped, scores, Tolerance(relative_error=0.02, top_class_agreement=1)).verdict is Verdict.PASSED
    wrong = scores[:, ::-1]
    assert "agreement of the best class 0" in " ".join(
        compared(wrong, scores, Tolerance(top_class_agreement=0.99)).problems
    )


def test_probabilities_of_any_rank_are_classes_and_images_are_not():
    exponentials = np.exp(np.random.default_rng(1).standard_normal((2, 3, 7)))
    probabilities = exponentials / exponentials.sum(axis=-1, keepdims=True)
    assert compared(probabilities, probabilities).outputs[0].classes == 7
    assert compared(exponentials, exponentials).outputs[0].classes is None


def test_names_and_shapes_are_no_matter_of_tolerance():
    comparison = compared(ROWS[:3], ROWS)
    assert comparison.verdict is Verdict.FAILED
    assert "its shape is another" in comparison.problems[0]
    with pytest.raises(ValueError, match="the outputs are z; expected y"):
        compare("subject", "inputs", [({"z": ROWS}, {"y": ROWS})], Tolerance())


@pytest.mark.parametrize(
    "arguments",
    [
        {"relative_error": -1},
        {"relative_error": "much"},
        {"top_class_agreement": 2},
        {"worst_row_error": -1},
        {"max_abs_error": float("nan")},
    ],
)
def test_a_tolerance_that_makes_no_sense_is_refused(arguments):
    with pytest.raises(OptionError, match=next(iter(arguments))):
        Tolerance(**arguments)


def test_every_precision_has_a_default():
    for precision in set(Precision) - {Precision.BEST}:
        assert 0 < Tolerance.default(precision).relative_error <= 0.1


def by_row(actual, reference, tolerance=None, pieces=1) -> Comparison:
    pairs = zip(np.array_split(actual, pieces), np.array_split(reference, pieces), strict=True)
    return compare(
        "subject", "inputs", (({"y": a}, {"y": b}) for a, b in pairs), tolerance or Tolerance(), batch_axis=AXIS
    )


@pytest.mark.parametrize("pieces", [1, 3])
def test_rows_are_measured_each_against_its_own_norm(pieces):
    noisy = ROWS + np.float32(0.01) * ROWS[::-1]
    output = by_row(noisy, ROWS, pieces=pieces).outputs[0]
    differences, norms = np.linalg.norm(noisy - ROWS, axis=1), np.linalg.norm(ROWS, axis=1)
    assert output.rows == 20
    assert output.median_row_error == pytest.approx(np.median(differences / norms), rel=1e-5)
    one_usual_value = np.median(norms) / np.sqrt(5)
    assert output.worst_row_error == pytest.approx((differences / np.maximum(norms, one_usual_value)).max(), rel=1e-5)


@pytest.mark.parametrize("shape", [(1,), (4, 6, 6), (10, 8)])
def test_a_loud_row_does_not_hide_the_others(shape):
    reference = np.random.default_rng(1).standard_normal((64, *shape)).astype(np.float32)
    reference[0] *= 1000
    wrong = np.where(np.abs(reference) < 10, 0, reference)
    comparison = by_row(wrong, reference, Tolerance.default(Precision.INT8))
    assert comparison.outputs[0].relative_error < 0.1
    assert comparison.verdict is Verdict.FAILED
    assert any("relative error of the median of 64 rows 1, at most 0.1 is tolerated" in p for p in comparison.problems)
    assert comparison.severity == pytest.approx(10, rel=0.01)


def test_a_single_wrong_row_of_many_is_found():
    reference = np.random.default_rng(1).standard_normal((1000, 5, 2)).astype(np.float32)
    wrong = reference.copy()
    wrong[17] *= -1
    comparison = by_row(wrong, reference, Tolerance.default(Precision.INT8))
    assert comparison.outputs[0].relative_error < 0.1
    assert comparison.problems == ("output 'y': relative error of the worst of 1000 rows 2, at most 0.5 is tolerated",)


def test_a_number_that_is_near_zero_by_chance_is_no_failure():
    reference = np.random.default_rng(1).standard_normal((64, 1)).astype(np.float32)
    reference[9] = 1e-6
    assert by_row(reference + np.float32(0.01), reference, Tolerance(worst_row_error=0.1)).verdict is Verdict.PASSED
    assert by_row(np.zeros_like(reference), np.zeros_like(reference)).outputs[0].worst_row_error == 0


def test_without_a_batch_axis_each_sample_is_a_row():
    loud = ROWS.copy() * np.float32(1000)
    pairs = [({"y": loud}, {"y": loud}), ({"y": ROWS * 0}, {"y": ROWS}), ({"y": ROWS * 0}, {"y": ROWS})]
    output = compare("subject", "inputs", pairs, Tolerance()).outputs[0]
    assert (output.rows, output.median_row_error, output.worst_row_error) == (3, 1, 1)
    assert compared(ROWS * 2, ROWS).outputs[0].median_row_error is None


def test_integers_have_no_worst_row():
    """One label that is another would be as wrong as can be."""
    labels = np.arange(1, 41)
    output = by_row(np.where(labels == 3, 4, labels), labels).outputs[0]
    assert (output.median_row_error, output.worst_row_error) == (0, None)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.bool_])
def test_tokens_indices_and_truth_values_are_equal_or_not(kind):
    """The relative error of tokens around 50,000 is 1e-4 where they are off by 5, and one other index is as large."""
    wanted = (np.arange(200) + 50_000 if kind is not np.bool_ else np.arange(200) % 2).astype(kind)
    one_is_another = np.where(np.arange(200) == 3, np.zeros(1, kind), wanted)
    tolerance = Tolerance.default(Precision.FP16)
    assert compared(one_is_another, wanted, tolerance).verdict is Verdict.PASSED
    assert compared(one_is_another, wanted, Tolerance(relative_error=0.02)).verdict is Verdict.FAILED
    others = ~wanted if kind is np.bool_ else wanted + kind(5)
    comparison = compared(others, wanted, tolerance)
    words = "relative error 1.41" if kind is np.bool_ else "share of equal values 0, at least 0.99 is tolerated"
    assert comparison.verdict is Verdict.FAILED
    assert words in comparison.problems[0]
    assert comparison.severity > 50
    assert "values are equal in 0.0%" in str(comparison)


def test_numbers_that_were_rounded_may_be_off_by_one():
    coordinates = np.arange(100, 300)
    rounded = coordinates + (np.arange(200) % 10 == 0)
    tolerance = Tolerance.default(Precision.FP16)
    assert compared(rounded, coordinates, tolerance).verdict is Verdict.PASSED
    few = compared(rounded % 10, coordinates % 10, tolerance)
    assert few.verdict is Verdict.FAILED
    assert compared(rounded, coordinates, Tolerance(top_class_agreement=0.99)).verdict is Verdict.FAILED


def test_pixels_may_be_a_little_off():
    wanted = np.arange(1, 200).astype(np.uint8)
    comparison = compared(wanted + np.uint8(1), wanted, Tolerance.default(Precision.FP16))
    assert comparison.verdict is Verdict.PASSED
    assert comparison.outputs[0].top_class_agreement is None


def test_a_tolerance_without_rows_says_what_it_does_not_judge():
    reference = np.resize(ROWS, (64, 5))
    reference[0] *= 1000
    comparison = by_row(np.where(np.abs(reference) < 10, 0, reference), reference, Tolerance(relative_error=0.1))
    assert comparison.verdict is Verdict.PASSED
    assert "relative error of the median of 64 rows 1" in comparison.hidden_rows[0]
    assert by_row(reference, reference, Tolerance(relative_error=0.1)).hidden_rows == ()


def test_the_limits_of_rows_change_with_that_of_all():
    changed = Tolerance.default(Precision.INT8).with_relative_error(0.2)
    assert (changed.relative_error, changed.median_row_error, changed.worst_row_error) == (0.2, 0.2, 1.0)
    assert Tolerance(max_abs_error=1).with_relative_error(0.2) == Tolerance(max_abs_error=1, relative_error=0.2)


def test_outputs_with_names_alike_have_metrics_of_their_own():
    names = ["a/b", "a:b", "a_b", "a_b-2", "c"]
    pairs = [(dict.fromkeys(names, ROWS), dict.fromkeys(names, ROWS))]
    parts = compare("subject", "inputs", pairs, Tolerance()).metric_parts
    assert parts == {"a/b": "a_b-3", "a:b": "a_b-4", "a_b": "a_b", "a_b-2": "a_b-2", "c": "c"}
