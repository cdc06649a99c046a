from __future__ import annotations

import numpy as np
import pytest

from mlflow_trt import Precision, RecipeError, Tolerance
from mlflow_trt.core.accuracy import Comparison, Verdict, compare

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
    [{"relative_error": -1}, {"relative_error": "much"}, {"top_class_agreement": 2}, {"max_abs_error": float("nan")}],
)
def test_a_tolerance_that_makes_no_sense_is_refused(arguments):
    with pytest.raises(RecipeError, match=next(iter(arguments))):
        Tolerance(**arguments)


def test_every_precision_has_a_default():
    for precision in set(Precision) - {Precision.BEST}:
        assert 0 < Tolerance.default(precision).relative_error <= 0.1
