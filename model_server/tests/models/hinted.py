"""A model that says by type hints what it takes."""

import mlflow
from mlflow.pyfunc import PythonModel


class Hinted(PythonModel):
    def predict(self, model_input: list[float]) -> list[float]:
        return [2 * value for value in model_input]


mlflow.models.set_model(Hinted())
