"""The naive server, as one writes it first: FastAPI, sync routes, models in a dict."""

import os
from typing import Any, Literal

import mlflow
import numpy as np
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel


class Question(BaseModel):
    """The same body that ODSP's server takes."""

    data: list[Any]
    predict_function: Literal["predict", "predict_proba"] = "predict"
    model_flavor: Literal["pyfunc", "sklearn"] = "pyfunc"
    dtype: str | None = None
    params: dict[str, Any] | None = None


app = FastAPI()
model = os.environ["BENCH_MODEL"]
models = {(model, "1"): mlflow.sklearn.load_model(f"models:/{model}/1")}


@app.post("/{name}/{version}")
def predict(name: str, version: str, question: Question) -> dict[str, Any]:
    """Predict in a thread of FastAPI's pool."""
    if (name, version) not in models:
        raise HTTPException(404, "model not loaded")
    data = np.array(question.data, dtype=question.dtype)
    function = getattr(models[name, version], question.predict_function)
    return {"prediction": function(data, **(question.params or {})).tolist()}
