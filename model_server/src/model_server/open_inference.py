"""The Open Inference Protocol (V2): the same models, by the same domain calls.

V2's version is a version or an alias of the registry; without one, the highest version that runs on
this host is meant. The flavor is pyfunc unless a request's parameter `model_flavor` says sklearn.
"""

import re
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

import model_server
from model_server.asking import Call, ModelName, VersionOrAlias
from model_server.bodies import LARGE, Answer, json_body, read_body
from model_server.errors import InvalidRequestError, ModelNotLoadedError
from model_server.problems import answers, describe, problem
from model_server.runner import wire
from model_server.runner.open_inference import BINARY
from model_server.schemas import (
    InferenceProblem,
    InferenceRequest,
    InferenceResponse,
    LoadedModel,
    ModelFlavor,
    ModelMetadata,
    ModelReady,
    RepositoryEntry,
    RepositoryIndexRequest,
    RepositoryRequest,
    ServerLive,
    ServerMetadata,
    ServerReady,
)
from model_server.serving import ModelServing

_LARGEST_HEADER = 2**24 - 1
_LENGTH = re.compile(r"[0-9]{1,9}")
_STATES: dict[str, Any] = {"ready": "READY", "loading": "LOADING"}
_OF_A_LOADED_MODEL = answers(404, 422, 502, 503, 504, 507, protocol=InferenceProblem)
_Content = TypeVar("_Content", RepositoryIndexRequest, RepositoryRequest)

router = APIRouter(prefix="/v2", tags=["open inference protocol"])


class _Parameters(msgspec.Struct):
    """Those that say where an infer request goes; the others are the runner's."""

    model_flavor: ModelFlavor = "pyfunc"


class _Envelope(msgspec.Struct):
    inputs: msgspec.Raw
    parameters: _Parameters | None = None


_ENVELOPE = msgspec.json.Decoder(_Envelope)


@router.get("")
@router.get("/", include_in_schema=False)
async def tell_server() -> ServerMetadata:
    """What this server is."""
    return ServerMetadata(
        name="model-server",
        version=model_server.__version__,
        extensions=["model_repository", "binary_tensor_data"],
    )


@router.get("/health/live")
async def tell_live() -> ServerLive:
    """Whether the process answers."""
    return ServerLive(live=True)


@router.get(
    "/health/ready", response_model=ServerReady, responses=answers(503, protocol=InferenceProblem)
)
async def tell_ready(call: Call) -> Any:
    """Whether everything that shall be loaded has been brought back since the start."""
    if call.serving.is_ready():
        return ServerReady(ready=True)
    return problem(
        call.request, "The models that shall be loaded are still being brought back.", 503
    )


@router.get("/models/{model_name}", responses=_OF_A_LOADED_MODEL)
async def describe_model(
    model_name: ModelName,
    call: Call,
    model_flavor: ModelFlavor = "pyfunc",
) -> ModelMetadata:
    """What a loaded model takes and gives, by its signature; loads nothing.

    One that rests, as nobody has asked it for a while, is started.
    """
    version = _highest(call.serving, model_name, model_flavor)
    return await describe_version(model_name, version, call, model_flavor)


@router.get(
    "/models/{model_name}/versions/{model_version}",
    responses=_OF_A_LOADED_MODEL,
)
async def describe_version(
    model_name: ModelName,
    model_version: VersionOrAlias,
    call: Call,
    model_flavor: ModelFlavor = "pyfunc",
) -> ModelMetadata:
    """What a loaded model version takes and gives, by its signature; loads nothing.

    One that rests, as nobody has asked it for a while, is started.
    """
    call.asked.model, call.asked.flavor = model_name, model_flavor
    loaded, described = await call.serving.describe(model_name, model_flavor, model_version)
    call.asked.version = loaded.version
    return ModelMetadata(
        name=loaded.model_name,
        versions=[str(version) for version in call.serving.versions(model_name, model_flavor)],
        platform=f"mlflow_{loaded.model_flavor}",
        inputs=described["inputs"] or [],
        outputs=described["outputs"] or [],
    )


@router.get(
    "/models/{model_name}/ready",
    response_model=ModelReady,
    responses=_OF_A_LOADED_MODEL,
)
async def tell_model_ready(
    model_name: ModelName,
    call: Call,
    model_flavor: ModelFlavor = "pyfunc",
) -> Any:
    """Whether a loaded model answers.

    One that rests, as nobody has asked it for a while, is started.
    """
    version = _highest(call.serving, model_name, model_flavor)
    return await tell_version_ready(model_name, version, call, model_flavor)


@router.get(
    "/models/{model_name}/versions/{model_version}/ready",
    response_model=ModelReady,
    responses=_OF_A_LOADED_MODEL,
)
async def tell_version_ready(
    model_name: ModelName,
    model_version: VersionOrAlias,
    call: Call,
    model_flavor: ModelFlavor = "pyfunc",
) -> Any:
    """Whether a loaded model version answers.

    One that rests, as nobody has asked it for a while, is started.
    """
    call.asked.model, call.asked.flavor = model_name, model_flavor
    loaded, _ = await call.serving.describe(model_name, model_flavor, model_version)
    call.asked.version = loaded.version
    if loaded.state == "ready":
        return ModelReady(name=model_name, ready=True)
    return problem(call.request, f"Model {model_name!r} is {loaded.state}.", 503)


@router.post(
    "/models/{model_name}/infer",
    response_model=InferenceResponse,
    responses=answers(404, 413, 415, 422, 500, 503, 504, protocol=InferenceProblem),
    openapi_extra=json_body(InferenceRequest),
)
async def infer(
    model_name: ModelName,
    call: Call,
) -> Response:
    """Predict with the highest version that runs on this host."""
    call.asked.model = model_name
    body, flavor = _read(await read_body(call.request, call.settings.max_body_bytes), call.request)
    version = _highest(call.serving, model_name, flavor)
    return await _infer(call, model_name, flavor, version, body)


@router.post(
    "/models/{model_name}/versions/{model_version}/infer",
    response_model=InferenceResponse,
    responses=answers(404, 413, 415, 422, 500, 502, 503, 504, 507, protocol=InferenceProblem),
    openapi_extra=json_body(InferenceRequest),
)
async def infer_with_version(
    model_name: ModelName,
    model_version: VersionOrAlias,
    call: Call,
) -> Response:
    """Predict with a version or an alias, loading it on first use."""
    call.asked.model = model_name
    body, flavor = _read(await read_body(call.request, call.settings.max_body_bytes), call.request)
    return await _infer(call, model_name, flavor, model_version, body)


@router.post(
    "/repository/index",
    responses=answers(413, 415, 422, 503, protocol=InferenceProblem),
    openapi_extra=json_body(RepositoryIndexRequest, required=False),
)
async def list_models(
    call: Call,
) -> list[RepositoryEntry]:
    """What is loaded, the same from every worker."""
    wanted = await _optional_body(call, RepositoryIndexRequest)
    return [
        _entry(model)
        for model in await call.serving.loaded_models()
        if model.state == "ready" or not wanted.ready
    ]


@router.post(
    "/repository/models/{model_name}/load",
    responses=answers(404, 413, 415, 422, 502, 503, 504, 507, protocol=InferenceProblem),
    openapi_extra=json_body(RepositoryRequest, required=False),
)
async def load_model(
    model_name: ModelName,
    call: Call,
) -> RepositoryEntry:
    """Load the version or alias of `parameters.version`; without it, the highest one anew."""
    parameters = (await _optional_body(call, RepositoryRequest)).parameters
    call.asked.model, call.asked.flavor = model_name, parameters.model_flavor
    version = parameters.version
    if version is None:
        loaded = call.serving.versions(model_name, parameters.model_flavor)
        if not loaded:
            raise InvalidRequestError(
                f"Say which version of {model_name!r} to load, by number or alias: "
                '{"parameters": {"version": "1"}}.'
            )
        version = str(max(loaded))
    model = await call.serving.load(model_name, parameters.model_flavor, version)
    call.asked.version = model.version
    return _entry(model)


@router.post(
    "/repository/models/{model_name}/unload",
    responses=answers(404, 413, 415, 422, 503, 504, protocol=InferenceProblem),
    openapi_extra=json_body(RepositoryRequest, required=False),
)
async def unload_model(
    model_name: ModelName,
    call: Call,
) -> list[RepositoryEntry]:
    """Unload the version or alias of `parameters.version`; without it, all versions."""
    parameters = (await _optional_body(call, RepositoryRequest)).parameters
    call.asked.model, call.asked.flavor = model_name, parameters.model_flavor
    versions = (
        [parameters.version]
        if parameters.version
        else [
            str(version) for version in call.serving.versions(model_name, parameters.model_flavor)
        ]
    )
    if not versions:
        raise _not_loaded(model_name, parameters.model_flavor)
    return [
        _entry(await call.serving.unload(model_name, parameters.model_flavor, version))
        for version in versions
    ]


def _entry(model: LoadedModel) -> RepositoryEntry:
    return RepositoryEntry(
        name=model.model_name,
        version=str(model.version),
        state=_STATES.get(model.state, "UNAVAILABLE"),
        # As other servers have it, which say nothing where nothing is wrong.
        reason=model.problem or ("" if model.state == "ready" else model.state),
        model_flavor=model.model_flavor,
    )


async def _infer(call: Call, name: str, flavor: ModelFlavor, version: str, body: bytes) -> Response:
    call.asked.flavor = flavor
    predicted = await call.serving.predict(name, flavor, version, body, kind=wire.INFER)
    call.asked.version, call.asked.rows = predicted.version, predicted.rows
    call.asked.call_rows = predicted.call_rows
    # The model's process writes the tensors, and does not know what it is called.
    about = msgspec.json.encode({"model_name": name, "model_version": str(predicted.version)})
    return Answer(about[:-1] + b"," + predicted.body[1:], call.request)


def _read(body: bytes, request: Request) -> tuple[bytes, ModelFlavor]:
    """The content of the frame for the runner, and the flavor that is asked."""
    length = request.headers.get("inference-header-content-length")
    envelope = body
    if length is not None:
        if not _LENGTH.fullmatch(length) or int(length) > min(len(body), _LARGEST_HEADER):
            raise InvalidRequestError(
                "Inference-Header-Content-Length must be the length of the JSON before the "
                "binary data, in bytes."
            )
        envelope, body = body[: int(length)], BINARY.pack(int(length)) + body
    try:
        parameters = _ENVELOPE.decode(envelope).parameters
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"The body is wrong: {error}.") from None
    return body, parameters.model_flavor if parameters else "pyfunc"


def _highest(serving: ModelServing, name: str, flavor: ModelFlavor) -> str:
    version = serving.highest(name, flavor)
    if version is None:
        raise _not_loaded(name, flavor)
    return str(version)


def _not_loaded(name: str, flavor: ModelFlavor) -> ModelNotLoadedError:
    return ModelNotLoadedError(
        f"No version of model {name!r} is loaded as {flavor}; load one, or name a version."
    )


async def _optional_body(call: Call, kind: type[_Content]) -> _Content:
    """What a body says, or its defaults: V2's clients send none, or no media type with it."""
    body = await read_body(call.request, min(call.settings.max_body_bytes, LARGE))
    try:
        return kind.model_validate_json(body) if body else kind()
    except ValidationError as error:
        raise InvalidRequestError(describe(error.errors(include_url=False))) from None
