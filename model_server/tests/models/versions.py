"""A model that answers with the version of a package in its own environment."""

from importlib.metadata import version

import mlflow
from mlflow.pyfunc import PythonModel


class Versions(PythonModel):
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        return [version(str(name)) for name in model_input]


mlflow.models.set_model(Versions())
