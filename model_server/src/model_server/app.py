"""Put the application together; the only place that does."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from model_server import docs, metrics, open_inference, routes
from model_server.bodies import Room
from model_server.catalog import Catalog
from model_server.environments import Environments
from model_server.fastpath import FastPath
from model_server.log import Observed
from model_server.problems import add_problem_handlers
from model_server.registry import ModelRegistry
from model_server.serving import ModelServing
from model_server.settings import Settings
from model_server.units import processes_for


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
        metrics.count_worker()
        yield
        serving.stop()

    app = FastAPI(
        title="Model server",
        summary="Predictions of the models in the MLflow registry",
        description=docs.DESCRIPTION,
        lifespan=lifespan,
        # Its records would hold callers' data, and asking whether anybody wants them costs time.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        # Behind a door that strips a prefix, all addresses start with it. FastAPI's own root_path
        # would also strip it from a model of the same name.
        servers=[{"url": settings.root_path or "/"}],
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.settings = settings
    app.state.serving = serving
    app.state.room = Room()
    app.include_router(docs.router)
    app.include_router(open_inference.router)
    app.include_router(routes.router)
    # The one that is added last comes first.
    app.add_middleware(
        FastPath,
        serving=serving,
        max_body_bytes=settings.max_body_bytes,
        room=app.state.room,
    )
    app.add_middleware(Observed, user_header=settings.user_header)
    add_problem_handlers(app)
    return app
