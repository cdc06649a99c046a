"""The self-test of a whole model at load: its own input example, answered as the source did."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from typing import Any

from mlflow import pyfunc
from mlflow.models import Model
from mlflow.pyfunc.scoring_server import predictions_to_json

from mlflow_trt.core.log import get_logger
from mlflow_trt.core.whole_model import WholeModel
from mlflow_trt.errors import SelfTestError
from mlflow_trt.flavor.whole.answers import differences
from mlflow_trt.flavor.whole.loading import split_config
from mlflow_trt.runtime.session import Session
from mlflow_trt.store import cache
from mlflow_trt.store.folder import ModelFolder

GOLDEN_WHOLE_FILE = "golden_whole.json"
LARGEST = 2**20
"""In bytes. It is downloaded with the model, and compared at every first load."""

_log = get_logger(__name__)


def as_json(answer: Any) -> Any:
    """An answer as MLflow's scoring server would give it, read back. Raises what MLflow does for what is no JSON."""
    text = io.StringIO()
    predictions_to_json(answer, text)
    return json.loads(text.getvalue())


def check_whole(folder: ModelFolder, whole: WholeModel, impl: Any, session: Session, config: Mapping[str, Any]) -> None:
    """Answer the input example, and compare, unless that was done before for this model and runtime.

    With other settings of the source than those that it was logged with, there is nothing to compare with.

    Raises SelfTestError for another answer than that of the source.
    """
    golden = whole.golden
    if golden is None:
        return
    engines = [engine.sha256 for engine in folder.record.engines]
    key = cache.key_of({"whole": whole.files, "engines": engines, "runtime": session.description})
    if cache.has_passed(key):
        return
    model = Model.load(str(folder.path))
    if split_config(model.flavors[pyfunc.FLAVOR_NAME].get(pyfunc.MODEL_CONFIG))[1] != config:
        return
    expected = json.loads((folder.path / golden.file).read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the source, about its own insides
        answer = as_json(
            pyfunc.PyFuncModel(model_meta=model, model_impl=impl).predict(model.load_input_example(str(folder.path)))
        )
    found = list(differences(answer, expected, golden.tolerance))
    if found:
        raise SelfTestError(
            f"the whole model on {session.description} answers its input example otherwise than its source did: "
            f"{'; '.join(found[:3])}. It is not used. Look whether the packages that it needs are those of its "
            "requirements, or load with self_test=False to use it all the same."
        )
    _log.info("Self-test passed: the whole model answers its input example as its source did")
    cache.remember_pass(key)
