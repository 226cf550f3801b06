"""Put the application together; the only place that does."""

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from model_server.catalog import Catalog
from model_server.environments import Environments
from model_server.errors import STATUS_CODES, ModelServerError
from model_server.registry import ModelRegistry
from model_server.routes import describe, router
from model_server.serving import ModelServing
from model_server.settings import Settings
from model_server.units import processes_for

_UNAVAILABLE = 503
_NO_ROOM = 507
_INVALID = 422
_RETRY_AFTER_SECONDS = "2"


def create_app(settings: Settings) -> FastAPI:
    """The application for these settings."""
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    settings.sockets.mkdir(parents=True, exist_ok=True)
    serving = ModelServing(
        settings,
        Catalog(settings.database),
        ModelRegistry.connect(settings),
        Environments(settings),
        processes_for(settings),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        serving.start()
        yield
        serving.stop()

    app = FastAPI(
        title="Model server",
        summary="Predictions of the models in the MLflow registry",
        lifespan=lifespan,
        # Behind a door that strips a prefix, all addresses start with it. FastAPI's own root_path
        # would also strip it from a model of the same name.
        servers=[{"url": settings.root_path or "/"}],
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.settings = settings
    app.state.serving = serving
    app.include_router(router)
    app.add_exception_handler(ModelServerError, _tell_error)
    app.add_exception_handler(RequestValidationError, _tell_invalid)
    app.add_exception_handler(OSError, _tell_full_disk)
    return app


async def _tell_error(_: Request, error: Exception) -> JSONResponse:
    status = next(STATUS_CODES[kind] for kind in type(error).__mro__ if kind in STATUS_CODES)
    headers = {"Retry-After": _RETRY_AFTER_SECONDS} if status == _UNAVAILABLE else None
    return JSONResponse({"detail": str(error)}, status, headers)


async def _tell_invalid(_: Request, error: Exception) -> JSONResponse:
    problems = error.errors() if isinstance(error, RequestValidationError) else []
    return JSONResponse({"detail": describe(problems)}, _INVALID)


async def _tell_full_disk(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise error
    detail = "The model server's disk is full; make room on it, then ask again."
    return JSONResponse({"detail": detail}, _NO_ROOM)
