"""What stands in the place of the methods of an estimator of scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mlflow_trt.flavor.whole.network import Network


class EngineMethods:
    """`predict` and, of a classifier, `predict_proba`, answered by a session in the dtypes of the source."""

    def __init__(self, network: Network, estimator: Any) -> None:
        self._network = network
        self._classes = getattr(estimator, "classes_", None)

    def put_into(self, estimator: Any) -> None:
        estimator.predict = self.predict
        if self._classes is not None:
            estimator.predict_proba = self.predict_proba

    def predict_proba(self, X: Any) -> npt.NDArray[Any]:  # noqa: N803  # as scikit-learn calls it
        (name,), (output,) = self._network.call.inputs, self._network.call.outputs
        rows = np.asarray(X, np.float32)
        return np.asarray(self._network.run({name: rows})[output], np.float64)

    def predict(self, X: Any) -> npt.NDArray[Any]:  # noqa: N803  # as above
        answer = self.predict_proba(X)
        if self._classes is not None:
            labels: npt.NDArray[Any] = np.asarray(self._classes)[answer.argmax(axis=1)]
            return labels
        numbers: npt.NDArray[Any] = answer.astype(self._network.call.constants["dtype"])
        return numbers[:, 0] if numbers.shape[1:] == (1,) else numbers
