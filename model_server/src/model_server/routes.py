"""The native API: HTTP in, HTTP out, one call into the domain for each.

A model may have any name: no two routes share a method and a number of segments, so one called
health, docs, metrics or v2 is asked like any other.
"""

from typing import Any

from fastapi import APIRouter, Response
from pydantic import ValidationError

from model_server import metrics
from model_server.asking import Call, ModelName, VersionOrAlias
from model_server.bodies import json_body, read_body
from model_server.errors import InvalidRequestError, ModelServerError
from model_server.problems import answers, describe, problem
from model_server.schemas import (
    Health,
    LoadedModel,
    ModelFlavor,
    PredictRequest,
    PredictResponse,
)

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

router = APIRouter()


@router.get("/health/live", tags=["health"])
async def tell_live() -> Health:
    """Whether the process answers."""
    return Health(status="live")


@router.get("/health/ready", tags=["health"], response_model=Health, responses=answers(503))
async def tell_ready(call: Call) -> Any:
    """Whether everything that shall be loaded has been brought back since the start."""
    if call.serving.is_ready():
        return Health(status="ready")
    return problem(
        call.request, "The models that shall be loaded are still being brought back.", 503
    )


@router.get(
    "/metrics",
    tags=["health"],
    response_class=Response,
    responses={200: {"content": {"text/plain": {"example": "model_server_workers 2.0"}}}},
)
async def tell_metrics(call: Call) -> Response:
    """What all workers have counted, for Prometheus."""
    try:
        loaded = await call.serving.loaded_models()
    except ModelServerError:
        loaded = None
    return Response(metrics.exposition(loaded), media_type=_METRICS_TYPE)


@router.get(
    "/load_model/{model_name}/{model_flavor}/{model_version_or_alias}",
    tags=["models"],
    responses=answers(404, 422, 502, 503, 504, 507),
)
async def load_model(
    model_name: ModelName,
    model_flavor: ModelFlavor,
    model_version_or_alias: VersionOrAlias,
    call: Call,
) -> LoadedModel:
    """Load a model version; an alias means what the registry says now."""
    call.asked.model, call.asked.flavor = model_name, model_flavor
    loaded = await call.serving.load(model_name, model_flavor, model_version_or_alias)
    call.asked.version = loaded.version
    return loaded


@router.get("/loaded_models", tags=["models"], responses=answers(503))
async def list_loaded_models(call: Call) -> list[LoadedModel]:
    """What is loaded, the same from every worker."""
    return await call.serving.loaded_models()


@router.delete(
    "/{model_name}/{model_flavor}/{model_version_or_alias}",
    tags=["models"],
    responses=answers(404, 422, 503, 504),
)
async def unload_model(
    model_name: ModelName,
    model_flavor: ModelFlavor,
    model_version_or_alias: VersionOrAlias,
    call: Call,
) -> LoadedModel:
    """Unload a model version: its process ends and its memory is free."""
    call.asked.model, call.asked.flavor = model_name, model_flavor
    unloaded = await call.serving.unload(model_name, model_flavor, model_version_or_alias)
    call.asked.version = unloaded.version
    return unloaded


@router.post(
    "/{model_name}/{model_version_or_alias}",
    tags=["predictions"],
    response_model=PredictResponse,
    responses=answers(404, 413, 415, 422, 500, 502, 503, 504, 507),
    openapi_extra=json_body(PredictRequest),
)
async def predict(
    model_name: ModelName,
    model_version_or_alias: VersionOrAlias,
    call: Call,
) -> Response:
    """Predict, loading the model on first use."""
    call.asked.model = model_name
    body = await read_body(call.request, call.settings.max_body_bytes)
    wanted = _validate(body)
    call.asked.flavor = wanted.model_flavor
    predicted = await call.serving.predict(
        model_name, wanted.model_flavor, model_version_or_alias, body
    )
    call.asked.version, call.asked.rows = predicted.version, predicted.rows
    # Already JSON, made by the model's process.
    return Response(predicted.body, media_type="application/json")


def _validate(body: bytes) -> PredictRequest:
    try:
        return PredictRequest.model_validate_json(body)
    except ValidationError as error:
        raise InvalidRequestError(describe(error.errors(include_url=False))) from None
