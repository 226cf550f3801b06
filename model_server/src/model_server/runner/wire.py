"""The frames on the socket between an HTTP worker and a runner.

A frame is four bytes of length (big endian), one byte that says what it is, and its content. A
worker may send many frames before it reads; a connection's answers come in the order of its
questions. JSON is passed on without looking into it.
"""

import socket
import struct

DESCRIBE = b"D"
"""Answered once the model is loaded and warm, or with the reason why it is not."""
PREDICT = b"P"
"""The content is the body of a native prediction request."""
INFER = b"I"
"""The content is the body of an inference request of the Open Inference Protocol."""

ANSWER = b"+"
"""The content is four bytes with the number of rows (big endian), then JSON for the caller."""
REFUSAL = b"-"
"""The content is an object with `kind`, `message` and, where loading failed, `lines`."""

INPUT_ERROR = "input"
MODEL_ERROR = "model"
LOAD_ERROR = "load"

LARGEST_CONTENT = 2**30
"""Bytes; nobody sends more, and whoever is sent more hangs up."""

_LENGTH = struct.Struct("!I")
_PIECE = 1 << 16


class FrameError(Exception):
    """What came is no frame, or is larger than a frame may be."""


def pack(kind: bytes, content: bytes = b"") -> bytes:
    """The bytes of a frame."""
    if len(content) > LARGEST_CONTENT:
        raise FrameError(f"a content of {len(content)} bytes is larger than a frame may be")
    return _LENGTH.pack(len(content) + 1) + kind + content


def pack_answer(rows: int, body: bytes) -> bytes:
    """The bytes of an answer to a prediction."""
    return pack(ANSWER, _LENGTH.pack(rows) + body)


def unpack_answer(content: bytes) -> tuple[int, bytes]:
    """The number of rows and the body of an answer to a prediction."""
    return _LENGTH.unpack_from(content)[0], content[_LENGTH.size :]


class FrameReader:
    """Makes frames of bytes, however they are cut into pieces."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, piece: bytes) -> list[tuple[bytes, bytes]]:
        """Take what came; kind and content of each frame that is now complete."""
        source: bytes | bytearray = piece
        if self._rest:
            self._rest += piece
            source = self._rest
        frames = []
        start = 0
        while len(source) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(source, start)
            if not 0 < length <= LARGEST_CONTENT + 1:
                raise FrameError(f"a frame cannot have a length of {length} bytes")
            content = start + _LENGTH.size + 1
            end = content + length - 1
            if len(source) < end:
                break
            frames.append((bytes(source[content - 1 : content]), bytes(source[content:end])))
            start = end
        if source is self._rest:
            del self._rest[:start]
        else:
            self._rest += source[start:]
        return frames


def receive(connection: socket.socket) -> tuple[bytes, bytes]:
    """Wait for one frame where only one is to come: its kind and content."""
    reader = FrameReader()
    while piece := connection.recv(_PIECE):
        for frame in reader.feed(piece):
            return frame
    raise EOFError
