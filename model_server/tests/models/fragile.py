"""A model that doubles numbers, and that some numbers are too much for."""

import os
import signal
import time

import mlflow
from mlflow.pyfunc import PythonModel

KILLS, HANGS, FAILS, NOT_JSON = -9, -1, -2, -3


class Fragile(PythonModel):
    # No type hints: MLflow would make a signature of them.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        first = float(model_input[0][0])
        if first == KILLS:
            os.kill(os.getpid(), signal.SIGKILL)
        if first == HANGS:
            time.sleep(3600)
        if first == FAILS:
            raise RuntimeError("this number is too much")
        if first == NOT_JSON:
            return object()
        return {
            "doubled": model_input * 2,
            "environment": dict(os.environ),
            "not a number": float("nan"),
        }


mlflow.models.set_model(Fragile())
