"""What the programs of the proof share: INPUTS to read, links to prove, facts to leave."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

INPUTS: dict[str, Any] = {}
SECRET = ""
_OUTPUT = sys.stdout
_RECORD = "\x1e"


class BrokenLinkError(Exception):
    """A link does not hold; the text says what was seen. Names the component at fault, if known."""

    def __init__(self, text: str, role: str = "", host: str = "") -> None:
        super().__init__(text)
        self.role, self.host = role, host


@dataclass
class Proof:
    """A link while it is being proved."""

    detail: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def tell(**record: object) -> None:
    """Hand a record to the module that runs this program."""
    print(_RECORD + json.dumps(record), file=_OUTPUT, flush=True)


def tell_facts(**facts: object) -> None:
    """Leave facts for the programs after this one."""
    tell(facts=facts)


def sentence(error: BaseException) -> str:
    """Return an error as one line."""
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, BrokenLinkError) else f"{type(error).__name__}: "
    return (kind + text)[:400]


@contextmanager
def prove(
    name: str, role: str, behind: list[str] | None = None, stop: bool = True
) -> Iterator[Proof]:
    """Time a link and tell whether it holds; a broken one ends the program unless stop is false.

    role is the component the link ends at, behind are all it leads through, in order of dependency.
    """
    proof, started = Proof(), time.monotonic()
    link: dict[str, Any] = {"name": name, "role": role, "behind": behind or [role]}
    try:
        yield proof
    except Exception as error:  # noqa: BLE001 - whatever goes wrong, the link does not hold
        link |= {"ok": False, "detail": sentence(error)}
        if isinstance(error, BrokenLinkError) and error.role:
            link |= {"role": error.role, "host": error.host, "behind": [error.role]}
    else:
        link |= {"ok": True, "detail": proof.detail}
    link["ms"] = round((time.monotonic() - started) * 1000)
    tell(links=[link])
    if stop and not link["ok"]:
        raise SystemExit(0)
