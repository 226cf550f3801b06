"""Requests and responses: the public contract."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

ModelFlavor = Literal["pyfunc", "sklearn"]
PredictFunction = Literal["predict", "predict_proba"]
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
    predict_function: PredictFunction = "predict"
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

    model_config = ConfigDict(json_schema_extra={"examples": [{"prediction": [0, 2]}]})

    prediction: Any


class LoadedModel(BaseModel):
    """One model version that is loaded, or shall be."""

    model_config = ConfigDict(
        # The contract's names start with model_, which pydantic keeps for itself otherwise.
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {
                    "model_name": "iris",
                    "model_flavor": "pyfunc",
                    "model_version_or_alias": "champion",
                    "version": 1,
                    "aliases": ["champion"],
                    "state": "ready",
                    "since": "2026-11-22T09:00:00Z",
                    "memory_bytes": 180000000,
                    "problem": None,
                    "runner": "3f9c0de51b7a2846-p",
                }
            ]
        },
    )

    model_name: str
    model_flavor: ModelFlavor
    model_version_or_alias: str = Field(
        description="What it was first loaded by. A number, once it was loaded by that: it stays "
        "when its aliases move on."
    )
    version: int
    aliases: list[str] = Field(description="The aliases that mean this version here.")
    state: ModelState
    since: datetime = Field(description="When it was first loaded.")
    memory_bytes: int | None = Field(description="Resident memory of its process.")
    problem: str | None = Field(
        description="Why it is not running, where the state is failed; what is left to be done, "
        "where it was unloaded while it was being started."
    )
    runner: str = Field(
        description="What its process is called; as a unit, odsp-model_runner@<runner>.service."
    )


class Health(BaseModel):
    """A healthy answer."""

    status: Literal["live", "ready"]


class Problem(BaseModel):
    """What was wrong, in a sentence."""

    detail: str


Datatype = Literal[
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BYTES",
]


class InferenceProblem(BaseModel):
    """What was wrong, in a sentence, as V2 has it."""

    error: str


class InferenceInput(BaseModel):
    """A tensor of the request."""

    name: str
    shape: list[int] = Field(description="Its first size is the number of rows.")
    datatype: Datatype
    data: list[Any] = Field(description="Values in row-major order, flat or nested.")
    parameters: dict[str, Any] | None = Field(
        default=None, description="content_type: np, pd, str, base64 or datetime."
    )


class InferenceOutputName(BaseModel):
    """An output that is asked for."""

    name: str = Field(description="predict, predict_proba, or a column of the answer.")
    parameters: dict[str, Any] | None = None


class InferenceRequest(BaseModel):
    """Tensors to predict. One is rows of values; several are the named columns of records."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "inputs": [
                        {
                            "name": "x",
                            "shape": [2, 4],
                            "datatype": "FP64",
                            "data": [5.1, 3.5, 1.4, 0.2, 6.7, 3.0, 5.2, 2.3],
                        }
                    ]
                }
            ]
        }
    )

    id: str | None = None
    inputs: list[InferenceInput] = Field(min_length=1)
    outputs: list[InferenceOutputName] | None = None
    parameters: dict[str, Any] | None = Field(
        default=None,
        description="model_flavor, predict_function, dtype and params as in the native protocol; "
        "content_type pd makes columns of a single tensor too.",
    )


class InferenceOutput(BaseModel):
    """A tensor of the answer; a column of a data frame is one."""

    name: str
    shape: list[int]
    datatype: Datatype
    data: list[Any] = Field(description="Values in row-major order; null where JSON has none.")


class InferenceResponse(BaseModel):
    """What the model answered, as tensors."""

    model_config = ConfigDict(
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {
                    "model_name": "iris",
                    "model_version": "1",
                    "outputs": [
                        {"name": "predict", "shape": [2, 1], "datatype": "INT64", "data": [0, 2]}
                    ],
                }
            ]
        },
    )

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[InferenceOutput]


class ServerMetadata(BaseModel):
    """What this server is."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(BaseModel):
    """The process answers."""

    live: bool


class ServerReady(BaseModel):
    """What shall be loaded has been brought back."""

    ready: bool


class ModelReady(BaseModel):
    """The model answers."""

    name: str
    ready: bool


class TensorMetadata(BaseModel):
    """A tensor that a model takes or gives; a size of -1 may be any."""

    name: str
    datatype: Datatype
    shape: list[int]


class ModelMetadata(BaseModel):
    """A loaded model, by its signature."""

    name: str
    versions: list[str] = Field(description="Those that are loaded.")
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class RepositoryIndexRequest(BaseModel):
    """Which models to list."""

    ready: bool = Field(default=False, description="Only those that answer now.")


class RepositoryEntry(BaseModel):
    """A model version that is loaded, or shall be."""

    model_config = ConfigDict(protected_namespaces=())

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNAVAILABLE"]
    reason: str
    model_flavor: ModelFlavor


class RepositoryParameters(BaseModel):
    """What to load or unload."""

    model_config = ConfigDict(protected_namespaces=())

    version: str | None = Field(
        default=None, min_length=1, max_length=256, description="A version or an alias."
    )
    model_flavor: ModelFlavor = "pyfunc"


class RepositoryRequest(BaseModel):
    """A load or an unload."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"parameters": {"version": "champion"}}]}
    )

    parameters: RepositoryParameters = RepositoryParameters()


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a body that a route reads by itself, without references."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def resolved(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolved(parts[node["$ref"].rpartition("/")[2]])
            return {key: resolved(value) for key, value in node.items()}
        return [resolved(item) for item in node] if isinstance(node, list) else node

    return {key: resolved(value) for key, value in schema.items()}
