from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from mlflow_trt import Precision, Recipe, RecipeError
from mlflow_trt.convert.recipe import BatchRange
from mlflow_trt.core.types import ComputeCapability, HardwareCompatibility


def test_brings_values_into_one_form():
    recipe = Recipe(
        precision="tf32",
        batch=np.int64(64),
        shapes={"x": [[1, 3], [2, 3], [4, 3]]},
        targets=["SM120", "8.6", "sm86"],
        tactic_sources=["jit_convolutions"],
        hardware_compatibility="ampere_plus",
    )
    assert recipe.precision is Precision.TF32
    assert recipe.batch == BatchRange(64, 64, 64)
    assert Recipe(batch=np.array([1, 8, 64])).batch == BatchRange(1, 8, 64)
    assert recipe.shapes == ({"x": ((1, 3), (2, 3), (4, 3))},)
    assert recipe.targets == ("sm86", "sm120")
    assert recipe.tactic_sources == ("JIT_CONVOLUTIONS",)
    assert recipe.hardware_compatibility is HardwareCompatibility.AMPERE_PLUS
    other = Recipe(workspace_bytes=np.int64(7), optimization_level=np.int8(2), timing_cache=Path("cache"))
    assert json.loads(json.dumps(asdict(other)))["workspace_bytes"] == 7
    assert other.timing_cache == "cache"


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"precision": "fp13"}, "unknown precision 'fp13'; choose one of fp32, tf32"),
        ({"batch": 0}, r"expected 1 <= min <= opt <= max"),
        ({"batch": (8, 4, 16)}, r"expected 1 <= min <= opt <= max"),
        ({"batch": (1, 2)}, r"expected a number, or \(min, opt, max\)"),
        ({"batch": "8"}, r"expected a number, or \(min, opt, max\)"),
        ({"batch": True}, r"expected a number, or \(min, opt, max\)"),
        ({"shapes": {"x": (1, 3)}}, r"shapes\['x'\] is \(1, 3\); expected three shapes"),
        ({"shapes": {"x": ((1,), (1, 2), (1,))}}, "differ in their number of dimensions"),
        ({"shapes": "x"}, "shapes is 'x'; expected"),
        ({"optimization_level": 6}, "optimization_level is 6; expected 0 to 5"),
        ({"workspace_bytes": -1}, "workspace_bytes is -1; expected 1 or more"),
        ({"avg_timing_iterations": 0}, "avg_timing_iterations is 0"),
        ({"tactic_sources": ["CUDNN"]}, "unknown tactic source 'CUDNN'"),
        ({"hardware_compatibility": "all"}, "unknown hardware_compatibility 'all'"),
        ({"targets": ["hopper"]}, "'hopper' is no compute capability"),
        ({"targets": 8}, "'8' is no compute capability"),
        ({"tactic_sources": 5}, "unknown tactic source '5'"),
        ({"batch": 2**70}, r"expected 1 <= min <= opt <= max < 2\*\*31"),
        ({"batch": np.array([1, 2])}, r"expected a number, or \(min, opt, max\)"),
        ({"workspace_bytes": 2**70}, "expected 1 or more"),
        ({"avg_timing_iterations": 2**40}, "avg_timing_iterations is"),
        ({"weights": "none"}, "unknown weights 'none'; choose one of included, refittable, stripped"),
        ({"profiling_verbosity": "loud"}, "unknown profiling_verbosity 'loud'"),
        ({"memory_pools": {"dla_sram": 1}}, "unknown memory pool 'dla_sram'; there are tactic_dram"),
        ({"memory_pools": {"tactic_dram": 0}}, "memory_pools is 0; expected 1 or more"),
        ({"memory_pools": 5}, r"expected \{pool: bytes\}"),
        ({"precision": "tf32", "allow_tf32": False}, "contradict each other; choose precision='fp32'"),
        ({"timing_cache": "t", "builder_cache": False}, "timing_cache= needs the builder's cache"),
        ({"weight_streaming": True, "weights": "stripped"}, "choose one of the two"),
        ({"timing_cache": 5}, "timing_cache is 5; expected the path of a file"),
        ({"timing_cache": b"t"}, "timing_cache is b't'; expected the path"),
        ({"timing_cache": "a\0b"}, "expected the path"),
    ],
)
def test_refuses_what_makes_no_sense(keywords, message):
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe(**keywords)
    assert caught.value.option in keywords


def test_a_recipe_and_its_keywords_exclude_each_other():
    recipe = Recipe(batch=4)
    assert Recipe.of(recipe) is recipe
    assert Recipe.of(batch=4) == recipe
    with pytest.raises(RecipeError, match="recipe is a dict; expected a mlflow_trt.Recipe"):
        Recipe.of({"batch": 4})
    with pytest.raises(RecipeError, match="both recipe= and batch= were given"):
        Recipe.of(recipe, batch=8)


def test_compute_capabilities_have_an_order():
    parse = ComputeCapability.parse
    assert parse("sm86") < parse("sm_90") < parse("12.0") == parse("120")
    assert str(parse("12.1")) == "sm121"
