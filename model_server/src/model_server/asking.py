"""What the routes of both protocols need: their settings, the models, the limits of names."""

from typing import Annotated

from fastapi import Depends, Path, Request

from model_server.log import Asked
from model_server.serving import ModelServing
from model_server.settings import Settings

_PATTERN = r"^[^\x00-\x1f\x7f]+$"

ModelName = Annotated[str, Path(min_length=1, max_length=256, pattern=_PATTERN, examples=["iris"])]
VersionOrAlias = Annotated[
    str, Path(min_length=1, max_length=256, pattern=_PATTERN, examples=["champion", "1"])
]


def _serving(request: Request) -> ModelServing:
    serving: ModelServing = request.app.state.serving
    return serving


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def _asked(request: Request) -> Asked:
    asked: Asked = request.scope["asked"]
    return asked


Serving = Annotated[ModelServing, Depends(_serving)]
AppSettings = Annotated[Settings, Depends(_settings)]
Observation = Annotated[Asked, Depends(_asked)]
