"""Records of engines, and plans that nobody loads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

from mlflow_trt.core.types import Distribution, EngineRecord
from mlflow_trt.store.folder import read_folder
from mlflow_trt.store.record import record_to_dict

TENSORRT_PLAN = b"ftrt: a plan, for all that Triton's repository cares"

PLAN = b"plan" * 1000
RECORD = EngineRecord(
    file="engine.plan",
    sha256=hashlib.sha256(PLAN).hexdigest(),
    size=len(PLAN),
    distribution=Distribution.TENSORRT_RTX,
    version="1.7.1.116",
)


def tensorrt_engine(target="sm86", version="10.13.0.35", **changes):
    fields = {
        "file": f"engines/tensorrt-{version}-{target}.plan",
        "sha256": hashlib.sha256(TENSORRT_PLAN).hexdigest(),
        "size": len(TENSORRT_PLAN),
        "distribution": Distribution.TENSORRT,
        "version": version,
        "compute_capabilities": (target,),
    }
    return EngineRecord(**{**fields, **changes})


def with_engines(folder, *engines):
    """A model folder as TensorRT would have left it, which is not here: its record, and plans that nobody loads."""
    record = replace(read_folder(folder).record, engines=engines)
    for one in engines:
        (folder / one.file).write_bytes(TENSORRT_PLAN)
    (folder / "mlflow_trt.json").write_text(json.dumps(record_to_dict(record)))
    return str(folder)
