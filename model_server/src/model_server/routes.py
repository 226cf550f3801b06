"""The native API: HTTP in, HTTP out, one call into the domain for each."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from pydantic import ValidationError

from model_server.errors import BodyTooLargeError, InvalidRequestError
from model_server.schemas import (
    Health,
    LoadedModel,
    ModelFlavor,
    PredictRequest,
    PredictResponse,
    Problem,
)
from model_server.serving import ModelServing
from model_server.settings import Settings

_PROBLEMS_SHOWN = 5

_Name = Annotated[
    str, Path(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$", examples=["iris"])
]
_Reference = Annotated[
    str,
    Path(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$", examples=["champion", "1"]),
]

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": description}
    for status, description in {
        404: "There is no such model, version or alias, or it is not loaded",
        413: "The body is too large",
        422: "The request, or the model, has to be changed",
        500: "The model's own code failed",
        502: "MLflow refused",
        503: "Something needed is away for now",
        504: "It took too long",
    }.items()
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": PredictRequest.model_json_schema()}},
    }
}

router = APIRouter()


def _serving(request: Request) -> ModelServing:
    serving: ModelServing = request.app.state.serving
    return serving


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


_Serving = Annotated[ModelServing, Depends(_serving)]
_Settings = Annotated[Settings, Depends(_settings)]


@router.get("/", include_in_schema=False)
async def show_start(settings: _Settings) -> RedirectResponse:
    """Send a browser to the documentation."""
    return RedirectResponse(f"{settings.root_path}/docs")


@router.get("/docs", include_in_schema=False)
async def show_docs(request: Request, settings: _Settings) -> HTMLResponse:
    """The documentation of the API."""
    return get_swagger_ui_html(
        openapi_url=f"{settings.root_path}/openapi.json", title=request.app.title
    )


@router.get("/health/live", tags=["health"])
async def tell_live() -> Health:
    """Whether the process answers."""
    return Health(status="live")


@router.get(
    "/health/ready",
    tags=["health"],
    response_model=Health,
    responses={503: {"model": Problem, "description": "Models are still being brought back"}},
)
async def tell_ready(serving: _Serving) -> Any:
    """Whether everything that shall be loaded has been brought back since the start."""
    if serving.is_ready():
        return Health(status="ready")
    return JSONResponse(
        {"detail": "The models that shall be loaded are still being brought back."}, 503
    )


@router.get(
    "/load_model/{model_name}/{model_flavor}/{model_version_or_alias}",
    tags=["models"],
    responses={key: _PROBLEMS[key] for key in (404, 422, 502, 503, 504)},
)
async def load_model(
    model_name: _Name,
    model_flavor: ModelFlavor,
    model_version_or_alias: _Reference,
    serving: _Serving,
) -> LoadedModel:
    """Load a model version; an alias means what the registry says now."""
    return await serving.load(model_name, model_flavor, model_version_or_alias)


@router.get("/loaded_models", tags=["models"], responses={503: _PROBLEMS[503]})
async def list_loaded_models(serving: _Serving) -> list[LoadedModel]:
    """What is loaded, the same from every worker."""
    return await serving.loaded_models()


@router.delete(
    "/{model_name}/{model_flavor}/{model_version_or_alias}",
    tags=["models"],
    responses={key: _PROBLEMS[key] for key in (404, 422, 503, 504)},
)
async def unload_model(
    model_name: _Name,
    model_flavor: ModelFlavor,
    model_version_or_alias: _Reference,
    serving: _Serving,
) -> LoadedModel:
    """Unload a model version: its process ends and its memory is free."""
    return await serving.unload(model_name, model_flavor, model_version_or_alias)


@router.post(
    "/{model_name}/{model_version_or_alias}",
    tags=["predictions"],
    response_model=PredictResponse,
    responses=_PROBLEMS,
    openapi_extra=_BODY,
)
async def predict(
    model_name: _Name,
    model_version_or_alias: _Reference,
    request: Request,
    serving: _Serving,
    settings: _Settings,
) -> Response:
    """Predict, loading the model on first use."""
    body = await _read_body(request, settings.max_body_bytes)
    wanted = _validate(body)
    answer = await serving.predict(model_name, wanted.model_flavor, model_version_or_alias, body)
    # Already JSON, made by the model's process.
    return Response(answer.body, media_type="application/json")


async def _read_body(request: Request, limit: int) -> bytes:
    too_large = BodyTooLargeError(f"The body is larger than {limit} bytes; send fewer rows.")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise too_large
    return bytes(body)


def _validate(body: bytes) -> PredictRequest:
    try:
        return PredictRequest.model_validate_json(body)
    except ValidationError as error:
        raise InvalidRequestError(describe(error.errors(include_url=False))) from None


def describe(problems: Any) -> str:
    """What pydantic found, as sentences."""
    sentences = []
    for problem in problems[:_PROBLEMS_SHOWN]:
        where = ".".join(str(part) for part in problem["loc"] if part not in {"path", "body"})
        message = problem["msg"]
        sentences.append(f"{where}: {message}." if where else f"The body is wrong: {message}.")
    if len(problems) > _PROBLEMS_SHOWN:
        sentences.append(f"And {len(problems) - _PROBLEMS_SHOWN} more.")
    return " ".join(sentences)
