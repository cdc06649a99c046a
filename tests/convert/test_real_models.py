"""Real models, from the wheel to an engine. The engines run in tests/gpu; here the typed model does."""

from __future__ import annotations

import pytest
from compare import relative_error
from helpers import convert_in, read, reference
from real_models import ALL, CLS, MAGIKA, TRANSFORMER, RealModel, nested_if
from tiers import exhaustive

from mlflow_trt import Recipe, UnsupportedModelError
from mlflow_trt.convert.onnx.model import read_onnx
from mlflow_trt.core.types import Distribution

pytestmark = pytest.mark.slow
SMALL = (MAGIKA, CLS, TRANSFORMER)
MODELS = [*SMALL, *exhaustive(*(model for model in ALL if model not in SMALL))]


@pytest.mark.parametrize(
    "model", [*SMALL, *exhaustive(*(model for model in ALL if model not in SMALL))], ids=lambda model: model.name
)
def test_converts_and_the_typed_model_computes_the_same(model: RealModel, tmp_path):
    source = read(model, tmp_path)
    conversion = convert_in(tmp_path, source, Recipe(**model.recipe))

    engine = conversion.engine
    assert engine.distribution is Distribution.TENSORRT_RTX
    assert conversion.plan.stat().st_size == engine.size > 100_000
    assert engine.build_seconds > 0
    rows = max(model.rows_at_once)
    typed = read_onnx(conversion.typed.path, tmp_path)
    with reference(source) as expected, reference(typed) as actual:
        feeds = model.feeds(rows)
        if model.varies:
            assert relative_error(actual.run(feeds), expected.run(feeds)) == 0


def test_nested_control_flow_is_named(tmp_path):
    shapes = {"input": ((1, 512),) * 3, "state": ((2, 1, 128),) * 3}
    with pytest.raises(UnsupportedModelError, match="nested If, Loop or Scan") as caught:
        convert_in(tmp_path, read_onnx(nested_if(), tmp_path), Recipe(shapes=shapes))
    assert caught.value.nodes == ("If_0 (If)",)
    assert "Internal Error" in caught.value.log[-1]
    assert not list(tmp_path.glob("*.plan*"))
