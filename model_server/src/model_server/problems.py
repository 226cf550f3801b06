"""What a wrong request is answered with: one sentence, in the words of the protocol it came by."""

import errno
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from model_server.errors import OUT_OF_DESCRIPTORS, ModelServerError, status_of
from model_server.schemas import InferenceProblem, Problem

_UNAVAILABLE = 503
_NO_ROOM = 507
_INVALID = 422
_FAILED = 500
_CLIENT_GONE = 499
"""Nginx's, for the log and the counters; nobody is there to be told."""
_RETRY_SECONDS = 2
"""When to try again where nothing is known about it, and at least."""
_PROBLEMS_SHOWN = 5
_LONGEST_PART = 60
_V2 = "/v2"

_EXAMPLES = {
    400: ("The request cannot be understood", "Say which version to load."),
    404: (
        "There is no such model, version or alias, or it is not loaded",
        "MLflow has no model 'iris' with an alias 'champion'.",
    ),
    413: ("The body is too large", "The body is larger than 33554432 bytes; send fewer rows."),
    415: ("The body is packed", "Send the body as it is; gzip is not taken."),
    422: (
        "The request, or the model, has to be changed",
        "Row 2 of data has 3 values, but row 1 has 4.",
    ),
    500: ("The model's own code failed", "The model failed: ZeroDivisionError: division by zero"),
    502: ("MLflow refused", "MLflow answered 403: Permission denied"),
    503: (
        "Something needed is away for now; Retry-After says when to try again",
        "MLflow at https://mlflow.example does not answer (connection refused).",
    ),
    504: (
        "It took too long",
        "The prediction of model 'iris' version 1 took longer than 60 seconds.",
    ),
    507: ("There is no room", "The model server's disk is full; make room on it, then ask again."),
}


def answers(*statuses: int, protocol: type[Problem | InferenceProblem] = Problem) -> dict[Any, Any]:
    """The problems that a route can answer with, as OpenAPI has them."""
    (field,) = protocol.model_fields
    return {
        status: {
            "model": protocol,
            "description": _EXAMPLES[status][0],
            "content": {"application/json": {"example": {field: _EXAMPLES[status][1]}}},
        }
        for status in statuses
    }


def add_problem_handlers(app: FastAPI) -> None:
    """Let the application answer every error with a sentence."""
    app.add_exception_handler(ModelServerError, _tell_error)
    app.add_exception_handler(RequestValidationError, _tell_invalid)
    app.add_exception_handler(HTTPException, _tell_unknown)
    app.add_exception_handler(ClientDisconnect, _tell_nobody)
    app.add_exception_handler(OSError, _tell_full_host)
    app.add_exception_handler(Exception, _tell_bug)


def problem(
    request: Request,
    detail: str,
    status: int,
    headers: dict[str, str] | None = None,
    *,
    retry_after: float | None = None,
) -> JSONResponse:
    """An answer that says what was wrong, and in how many seconds to try again."""
    if status == _UNAVAILABLE or retry_after is not None:
        seconds = max(math.ceil(retry_after or 0), _RETRY_SECONDS)
        headers = {"Retry-After": str(seconds)} | (headers or {})
    # By the route, as a model may be called v2 too.
    route: Any = request.scope.get("route")
    path: str = route.path if route else request.scope["asked"].route or request.scope["path"]
    return JSONResponse({_field(path): detail}, status, headers)


def _field(path: str) -> str:
    return "error" if path == _V2 or path.startswith(f"{_V2}/") else "detail"


async def _tell_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, ModelServerError):
        raise error
    return problem(request, str(error), status_of(error), retry_after=error.retry_after)


async def _tell_invalid(request: Request, error: Exception) -> JSONResponse:
    problems = error.errors() if isinstance(error, RequestValidationError) else []
    return problem(request, describe(problems), _INVALID)


async def _tell_unknown(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    detail = f"{error.detail}: there is no {request.method} of this address; see /docs."
    return JSONResponse({_field(request.scope["path"]): detail}, error.status_code, error.headers)


async def _tell_nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)


async def _tell_full_host(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return problem(request, _EXAMPLES[_NO_ROOM][1], _NO_ROOM)
    if isinstance(error, OSError) and error.errno in OUT_OF_DESCRIPTORS:
        return problem(
            request, "The model server has too many connections open; try again soon.", _UNAVAILABLE
        )
    raise error


async def _tell_bug(request: Request, _: Exception) -> JSONResponse:
    request_id = request.scope["asked"].id
    detail = f"This is a mistake of the model server; its log says more by the id {request_id}."
    return problem(request, detail, _FAILED, {"X-Request-ID": request_id})


def describe(problems: Any) -> str:
    """What pydantic found, as sentences."""
    sentences = []
    for found in problems[:_PROBLEMS_SHOWN]:
        where = ".".join(
            str(part)[:_LONGEST_PART] for part in found["loc"] if part not in {"path", "body"}
        )
        message = found["msg"]
        sentences.append(f"{where}: {message}." if where else f"The body is wrong: {message}.")
    if len(problems) > _PROBLEMS_SHOWN:
        sentences.append(f"And {len(problems) - _PROBLEMS_SHOWN} more.")
    return " ".join(sentences)
