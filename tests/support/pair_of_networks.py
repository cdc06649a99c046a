"""A model from code, as MLflow logs it by its path: two networks, of which only one is used."""

from __future__ import annotations

import mlflow
import numpy as np


class Pair(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        import onnxruntime

        make = onnxruntime.InferenceSession
        self.first, self.second = (make(context.artifacts["network"], providers=["CPUExecutionProvider"]) for _ in "ab")

    def predict(self, context, model_input, params=None):
        return self.second.run(None, {"x": np.asarray(model_input, np.float32)})[0]


mlflow.models.set_model(Pair())
