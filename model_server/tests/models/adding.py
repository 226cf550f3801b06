"""A model of tensors with names, which it adds."""

import mlflow
from mlflow.pyfunc import PythonModel


class Adding(PythonModel):
    # No type hints: MLflow would make a signature of them.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        return sum(model_input.values())


mlflow.models.set_model(Adding())
