"""What every route of both protocols takes: names of models, and the call itself."""

from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Call:
    request: Request
    serving: ModelServing
    settings: Settings
    asked: Asked


def _call(request: Request) -> _Call:
    state = request.app.state
    return _Call(request, state.serving, state.settings, request.scope["asked"])


Call = Annotated[_Call, Depends(_call)]
