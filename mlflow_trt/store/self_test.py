"""The self-test at load: an engine can answer wrongly without any error, so its golden sample is run first.

A pass is remembered in the cache, for this engine on this GPU, driver and TensorRT.
"""

from __future__ import annotations

from mlflow_trt.core.comparing import compare
from mlflow_trt.core.log import get_logger
from mlflow_trt.errors import SelfTestError
from mlflow_trt.runtime.session import Session
from mlflow_trt.store import cache
from mlflow_trt.store.folder import ModelFolder

_log = get_logger(__name__)


def check(session: Session, folder: ModelFolder, identity: dict[str, object]) -> None:
    """Run the golden sample and compare, unless that was done before for the same `identity`.

    Raises SelfTestError where the outputs are beyond the recorded tolerance.
    """
    stored = folder.record.golden
    if stored is None:
        return
    key = cache.key_of({**identity, "golden": stored.sha256, "tolerance": stored.tolerance})
    if cache.has_passed(key):
        return
    golden = folder.read_golden(stored)
    pairs = [(session.run(golden.feeds), golden.outputs)]
    comparison = compare(
        session.description,
        "the golden sample",
        pairs,
        stored.tolerance,
        batch_axis=folder.record.batch_axis,
    )
    if comparison.problems:
        raise SelfTestError(
            f"{session.description} answers wrongly: {'; '.join(comparison.problems)}, on the golden sample of the "
            "model. The engine is not used. Build one on this machine, use another TensorRT or kernel_specialization, "
            "or load with runtime='onnxruntime'; self_test=False uses it all the same.",
            comparison=comparison,
        )
    _log.info("Self-test passed: relative error %.1e", comparison.relative_error)
    cache.remember_pass(key)
