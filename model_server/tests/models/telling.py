"""A model that tells what it got."""

import mlflow
from mlflow.pyfunc import PythonModel


class Telling(PythonModel):
    # No type hints: MLflow would make a signature of them.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        if isinstance(model_input, dict):
            (model_input,) = model_input.values()
        if hasattr(model_input, "itertuples"):
            return list(map(str, model_input.itertuples(index=False, name=None)))
        return list(map(str, model_input))

    def predict_proba(self, rows):  # type: ignore[no-untyped-def]
        return self.predict(None, rows)  # type: ignore[no-untyped-call]


mlflow.models.set_model(Telling())
