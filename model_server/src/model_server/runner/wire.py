"""The frames on the socket between an HTTP worker and a runner.

A frame is four bytes of length (big endian), one byte that says what it is, and its content. A
worker may send many frames before it reads; a connection's answers come in the order of its
questions. JSON is passed on without looking into it. A kind whose content changes gets another
letter: a worker of one version and a runner of another refuse each other, and never misread.
"""

import struct
from collections.abc import Iterator, Mapping

DESCRIBE = b"D"
"""Answered once the model is loaded and warm, or with the reason why it is not."""
PREDICT = b"P"
"""The content is the body of a native prediction request."""
INFER = b"I"
"""The content is the body of an inference request of the Open Inference Protocol."""

ANSWER = b"="
"""To `PREDICT` and `INFER`: two numbers, four bytes each (big endian), then JSON for the caller.

The first number is that of the caller's rows. The second one is told by the first answer of each
call of the model: all the rows that the call was about. It is 0 in the call's other answers."""
DESCRIPTION = b"d"
"""To `DESCRIBE`: an object with `inputs`, `outputs`, `flavor` and `batching`."""
REFUSAL = b"-"
"""The content is an object with `kind`, `message` and, where loading failed, `lines`."""

INPUT_ERROR = "input"
MODEL_ERROR = "model"
LOAD_ERROR = "load"

LARGEST_CONTENT = 2**30
"""Bytes; nobody sends more, and whoever is sent more hangs up."""
FROM_RUNNER = {ANSWER: 128 * 2**20, DESCRIPTION: 2**20, REFUSAL: 2**20}
"""All that a runner sends, and the largest content of each. A worker keeps an answer whole and has
other callers: four times the largest question, by default, is enough for any sensible one."""

MOST_JOINED_ROWS = 4096
"""Of a call of the model for several callers together."""

_LENGTH = struct.Struct("!I")
_ROWS = struct.Struct("!II")


class FrameError(Exception):
    """What came is no frame, or is larger than a frame may be."""


def pack(kind: bytes, content: bytes = b"") -> bytes:
    """The bytes of a frame."""
    if len(content) > FROM_RUNNER.get(kind, LARGEST_CONTENT):
        raise FrameError(f"a content of {len(content)} bytes is larger than a frame may be")
    return _LENGTH.pack(len(content) + 1) + kind + content


def pack_answer(rows: int, call_rows: int, body: bytes) -> bytes:
    """The bytes of an answer to a prediction."""
    return pack(ANSWER, _ROWS.pack(rows, call_rows) + body)


def unpack_answer(content: bytes, asked: int) -> tuple[int, int, bytes]:
    """The caller's rows, the call's and the body of an answer to a question of so many bytes.

    Raises `FrameError` for numbers that cannot be: a row is at least a byte.
    """
    if len(content) < _ROWS.size:
        raise FrameError("an answer has at least eight bytes")
    rows, call_rows = _ROWS.unpack_from(content)
    if rows > asked or (call_rows and not rows <= call_rows <= max(rows, MOST_JOINED_ROWS)):
        raise FrameError(f"{asked} bytes cannot be {rows} rows in a call of {call_rows}")
    return rows, call_rows, content[_ROWS.size :]


class FrameReader:
    """Makes frames of bytes, however they are cut into pieces.

    With `largest`, only frames of its kinds, and of contents no larger than it says.
    """

    def __init__(self, largest: Mapping[bytes, int] | None = None) -> None:
        self._largest = largest
        self._rest = bytearray()

    def feed(self, piece: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Take what came; kind and content of each frame that is now complete.

        Raises `FrameError` behind the last good one.
        """
        source: bytes | bytearray = piece
        if self._rest:
            self._rest += piece
            source = self._rest
        start = 0
        while len(source) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(source, start)
            content = start + _LENGTH.size + 1
            self._check(length, bytes(source[content - 1 : content]))
            end = content + length - 1
            if len(source) < end:
                break
            yield bytes(source[content - 1 : content]), bytes(source[content:end])
            start = end
        if source is self._rest:
            del self._rest[:start]
        else:
            self._rest += source[start:]

    def _check(self, length: int, kind: bytes) -> None:
        """Refuse a frame before it has come; of its kind, the byte may not be there yet."""
        largest = LARGEST_CONTENT
        if kind and self._largest is not None:
            if kind not in self._largest:
                raise FrameError(f"there is no frame {kind!r} from this side")
            largest = self._largest[kind]
        if not 0 < length <= largest + 1:
            raise FrameError(f"a frame cannot have a length of {length} bytes")
