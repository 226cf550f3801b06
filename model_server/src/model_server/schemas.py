"""Requests and responses: the public contract."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

ModelFlavor = Literal["pyfunc", "sklearn"]
ModelState = Literal["ready", "loading", "failed", "stopped", "unloaded"]


class PredictRequest(BaseModel):
    """Rows to predict, and how."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "data": [[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]],
                    "predict_function": "predict",
                    "model_flavor": "pyfunc",
                    "dtype": None,
                    "params": None,
                }
            ]
        },
    )

    data: list[Any] = Field(
        description="Rows: lists of values, or records whose keys are the model's columns."
    )
    predict_function: Literal["predict", "predict_proba"] = "predict"
    model_flavor: ModelFlavor = "pyfunc"
    dtype: str | None = Field(
        default=None, description="A numpy type name that the data is cast to."
    )
    params: dict[str, Any] | None = Field(
        default=None,
        description="Parameters of a pyfunc model's predict, as its signature names them.",
    )


class PredictResponse(BaseModel):
    """What the model answered; NaN, infinity and missing values are null."""

    prediction: Any


class LoadedModel(BaseModel):
    """One model version that is loaded, or shall be."""

    # The contract's names start with model_, which pydantic keeps for itself otherwise.
    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_flavor: ModelFlavor
    model_version_or_alias: str = Field(description="What it was first loaded by.")
    version: int
    aliases: list[str] = Field(description="The aliases that mean this version here.")
    state: ModelState
    since: datetime = Field(description="When it was first loaded.")
    memory_bytes: int | None = Field(description="Resident memory of its process.")
    problem: str | None = Field(description="Why it is not running, where the state is failed.")


class Health(BaseModel):
    """A healthy answer."""

    status: Literal["live", "ready"]


class Problem(BaseModel):
    """What was wrong, in a sentence."""

    detail: str
