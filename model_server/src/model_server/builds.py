"""Have a unit of systemd build what has no wheel, as a build runs the package's own code.

The unit, `odsp-model_builder`, answers a list of requirements with the wheels that its index lacks.
None of it is trusted: a wheel is a file of a wheel's name and no other, and is treated like one
from an index.
"""

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from model_server.errors import BuilderUnavailableError, ModelNotLoadableError
from model_server.replies import sane
from model_server.settings import Settings

BUILDER = Path("/run/odsp/model_builder.sock")

_LONGEST_HEADER = 2**18
_MOST_WHEELS = 200
_MOST_BYTES = 2**30
"""Of all wheels of one model."""
_CHUNK = 2**16
# Whatever else the name is, it is one of a file in the folder.
_WHEEL = re.compile(r"\w[\w.]*-\w[\w.!+]*(-\d[\w.]*)?-\w[\w.]*-\w[\w.]*-\w[\w.]*\.whl", re.ASCII)
_LONGEST_NAME = 200


class _Wheel(msgspec.Struct):
    name: str
    size: int


class _Header(msgspec.Struct):
    wheels: list[_Wheel] = []
    error: str | None = None


def build_wheels(
    settings: Settings,
    requirements: list[str],
    constraints: list[str],
    folder: Path,
    deadline: float,
    *,
    builder: Path = BUILDER,
) -> str | None:
    """Put the wheels that requirements lack into a folder; why not, if it says so, else None.

    Raises `TimeoutError` past the deadline (of `time.monotonic`), `BuilderUnavailableError` where
    the unit cannot be asked, `ModelNotLoadableError` for an answer that is none or half, and
    `OSError` where there is no room.
    """
    request = {
        "requirements": requirements,
        "constraints": constraints,
        "index_url": settings.index_url and settings.index_url.get_secret_value(),
        "wheels_dir": settings.wheels_dir and str(settings.wheels_dir),
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        answer = _Answer(connection, deadline)
        answer.ask(builder, json.dumps(request).encode() + b"\n")
        header = answer.header()
        if header.error is not None:
            return header.error
        for wheel in _checked(header.wheels):
            # "x": never over what is there, nor through a link.
            with (folder / wheel.name).open("xb") as file:
                for chunk in answer.chunks(wheel.size):
                    file.write(chunk)
    return None


def _checked(wheels: list[_Wheel]) -> list[_Wheel]:
    """The wheels, if all of them are such as an index may have."""
    for wheel in wheels:
        if len(wheel.name) > _LONGEST_NAME or not _WHEEL.fullmatch(wheel.name):
            raise _refused(f"the file {sane(wheel.name, _LONGEST_NAME)!r}, which is no wheel")
        if wheel.size <= 0:
            raise _refused(f"the wheel {wheel.name} with {wheel.size} bytes")
    if len({wheel.name for wheel in wheels}) < len(wheels):
        raise _refused("a wheel twice")
    if len(wheels) > _MOST_WHEELS:
        raise _refused(f"{len(wheels)} wheels; {_MOST_WHEELS} are allowed")
    total = sum(wheel.size for wheel in wheels)
    if total > _MOST_BYTES:
        raise _refused(f"wheels of {total} bytes; {_MOST_BYTES} are allowed")
    return wheels


class _Answer:
    """What comes by a connection until the deadline."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline
        self._read = bytearray()

    def ask(self, builder: Path, request: bytes) -> None:
        """Send the request."""
        try:
            self._connection.settimeout(self._seconds())
            self._connection.connect(str(builder))
            self._connection.sendall(request)
        except TimeoutError:
            raise
        except OSError as error:
            raise _away(error) from error

    def header(self) -> _Header:
        """The first line."""
        more = b""
        while b"\n" not in more:
            if len(self._read) > _LONGEST_HEADER:
                raise _refused("a line without an end")
            self._read += (more := self._more())
        line, _, self._read = self._read.partition(b"\n")
        try:
            return msgspec.convert(json.loads(line), _Header)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise _refused("what is no answer") from None

    def chunks(self, size: int) -> Iterator[bytes]:
        """So many of the bytes that follow."""
        while size:
            data = bytes(self._read) or self._more()
            yield data[:size]
            self._read = bytearray(data[size:])
            size -= min(len(data), size)

    def _more(self) -> bytes:
        try:
            self._connection.settimeout(self._seconds())
            data = self._connection.recv(_CHUNK)
        except TimeoutError:
            raise
        except OSError as error:
            # A Unix socket is reset by who closes it without having read all that was sent: the
            # unit could not start, and has built nothing. Later it can only end.
            raise _away(error) from error
        if not data:
            raise ModelNotLoadableError(
                "The model's requirements cannot be built; odsp-model_builder ended, perhaps for "
                "want of memory, before it had answered; raise model_server_model_memory_max, or "
                "publish wheels."
            )
        return data

    def _seconds(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def _away(error: OSError) -> BuilderUnavailableError:
    return BuilderUnavailableError(
        f"Packages cannot be built; odsp-model_builder does not answer ({error}): see "
        "journalctl --unit 'odsp-model_builder*' on the model server's host."
    )


def _refused(what: str) -> ModelNotLoadableError:
    return ModelNotLoadableError(
        f"The model's requirements cannot be built; odsp-model_builder sent {what}."
    )
