"""What a runner says, checked before it is believed: a model's own code may be speaking."""

import json
import re
from collections.abc import Iterable
from typing import Any, Literal, TypeVar

import msgspec

from model_server.schemas import Datatype

_LONGEST_MESSAGE = 4096
"""Bytes."""
_MOST_LINES = 10
_LONGEST_LINE = 512
_UNFIT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""What no database, terminal or JSON of others should get; lines may end and be indented."""

_Said = TypeVar("_Said")


class ReplyError(Exception):
    """What came is nothing that a runner says."""


class Refusal(msgspec.Struct):
    """Why there is no answer."""

    kind: Literal["input", "model", "load"]
    message: str
    lines: list[str] = []


class _Tensor(msgspec.Struct):
    name: str
    datatype: Datatype
    shape: list[int]


class _Description(msgspec.Struct):
    inputs: list[_Tensor] | None
    outputs: list[_Tensor] | None
    flavor: str
    batching: bool


def read_refusal(content: bytes) -> Refusal:
    """The content of a refusal, or ReplyError."""
    said = _read(content, Refusal)
    said.message = with_lines(said.message, said.lines)
    return said


def read_description(content: bytes) -> dict[str, Any]:
    """The content of a description, or ReplyError."""
    said = _read(content, _Description)
    for tensor in [*(said.inputs or ()), *(said.outputs or ())]:
        tensor.name = sane(tensor.name)
    description: dict[str, Any] = msgspec.to_builtins(said)
    return description


def with_lines(sentence: str, lines: Iterable[str]) -> str:
    """A sentence, and below it the end of what a process has written."""
    last = [sane(line, _LONGEST_LINE) for line in [*lines][-_MOST_LINES:]]
    return "\n".join([f"{sane(sentence)} Its last lines:", *last]) if last else sane(sentence)


def sane(text: str, longest: int = _LONGEST_MESSAGE) -> str:
    """A text of so many bytes at most, without what harms those who read it."""
    encoded = _UNFIT.sub("\N{REPLACEMENT CHARACTER}", text[:longest]).encode()
    if len(encoded) <= longest and len(text) <= longest:
        return encoded.decode()
    return encoded[: longest - 4].decode(errors="ignore") + " ..."


def _read(content: bytes, kind: type[_Said]) -> _Said:
    try:
        # Not by msgspec alone: halves of surrogates are replaced, not refused.
        return msgspec.convert(json.loads(content), kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ReplyError(sane(str(error), _LONGEST_LINE)) from None
