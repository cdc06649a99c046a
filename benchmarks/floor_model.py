"""A model that does nothing: what a request costs without one. MLflow runs this file when it loads the model."""

from __future__ import annotations

from typing import Any

import mlflow
import numpy as np

from mlflow_trt.core import wire


class Floor(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]  # MLflow's module is lazy
    """Answers numbers that were there before, as many rows of each output as there are rows of input.

    Its model_config: `rows`, the largest number of them; `outputs`, by name the shape of a row; `answers`, as for
    mlflow_trt.
    """

    def load_context(self, context: Any) -> None:
        random = np.random.default_rng(0)
        rows = context.model_config["rows"]
        self._packs = context.model_config["answers"] == "base64"
        self._outputs = {
            name: random.standard_normal((rows, *shape)).astype(np.float32)
            for name, shape in context.model_config["outputs"].items()
        }

    # MLflow takes type hints of its own kind only.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ARG002
        rows = len(next(iter(model_input.values())))
        outputs = {name: output[:rows] for name, output in self._outputs.items()}
        return {name: wire.packed(output) for name, output in outputs.items()} if self._packs else outputs


mlflow.models.set_model(Floor())
