"""The native API: HTTP in, HTTP out, one call into the domain for each.

A model may have any name: no two routes share a method and a number of segments, so one called
health, docs, metrics or v2 is asked like any other.
"""

import re
from typing import Any

from fastapi import APIRouter, Response
from pydantic import ValidationError

from model_server import metrics
from model_server.asking import Call, ModelName, VersionOrAlias
from model_server.bodies import LARGE, Answer, json_body, read_body, read_wanted
from model_server.errors import InvalidRequestError
from model_server.problems import answers, describe, problem
from model_server.schemas import (
    Health,
    LoadedModel,
    ModelFlavor,
    PredictRequest,
    PredictResponse,
)

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_WHOLE_TEXTS = re.compile(
    rb"(?:[^\\]++|\\[^u]|\\u(?![dD][89a-fA-F])|\\u[dD][89abAB]..\\u[dD][c-fC-F])*+", re.DOTALL
)
"""JSON in whose escapes no half of a surrogate pair is alone."""

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
    # The counters are needed most while something is away.
    loaded = await call.serving.known_models()
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
    """Load a model version; an alias means what the registry says now.

    Loaded by its number, a version stays until it is unloaded. Loaded by aliases only, it goes when
    the last of them has moved on.
    """
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
    """Unload a model version: its process ends and its memory is free.

    A start under way is not waited for long: nobody is answered by it any more, and its process
    ends when it is done.
    """
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
    """Predict, loading the model on first use.

    A first use is a load by what the address names, a number or an alias. A version that is loaded
    already is only asked: one that aliases loaded goes when they have moved on, however it is asked
    meanwhile. To keep it, load it by its number.
    """
    call.asked.model = model_name
    body = await read_body(call.request, call.settings.max_body_bytes)
    flavor = call.asked.flavor = _flavor(body)
    predicted = await call.serving.predict(model_name, flavor, model_version_or_alias, body)
    call.asked.version, call.asked.rows = predicted.version, predicted.rows
    call.asked.call_rows = predicted.call_rows
    return Answer(predicted.body, call.request)


def _flavor(body: bytes) -> ModelFlavor:
    """The flavor that is asked, if there is nothing wrong with the request."""
    try:
        wanted = read_wanted(body)
        if _WHOLE_TEXTS.fullmatch(body):
            return wanted.model_flavor
        trouble = "half of a surrogate pair is no text"
    except ValueError as error:
        trouble = str(error)
    if len(body) > LARGE:
        # What follows makes objects of all of it, thirty times as large.
        raise InvalidRequestError(f"The body is wrong: {trouble}.")
    try:
        return PredictRequest.model_validate_json(body).model_flavor
    except ValidationError as error:
        raise InvalidRequestError(describe(error.errors(include_url=False))) from None
