"""The frames on the socket between an HTTP worker and a runner.

A frame is four bytes of length (big endian), one byte that says what it is, and its content. A
worker sends one frame and reads one back; it passes JSON on without looking into it.
"""

import socket
import struct

DESCRIBE = b"D"
"""Answered as soon as the model is loaded, or with the reason why it is not."""
PREDICT = b"P"
"""The content is the body of the HTTP request."""
STOP = b"S"
"""Answered at once; the runner ends when the requests before it are answered."""

ANSWER = b"+"
"""The content is the body of the HTTP response."""
REFUSAL = b"-"
"""The content is an object with `kind` and `message`."""

INPUT_ERROR = "input"
MODEL_ERROR = "model"

HEADER = struct.Struct("!I")
_LARGEST_CONTENT = 2**32 - 2


def pack(kind: bytes, content: bytes = b"") -> bytes:
    """The bytes of a frame."""
    if len(content) > _LARGEST_CONTENT:
        raise ValueError("the content is larger than a frame can be")
    return HEADER.pack(len(content) + 1) + kind + content


def receive(connection: socket.socket) -> tuple[bytes, bytes]:
    """Read one frame: its kind and content."""
    (length,) = HEADER.unpack(_exactly(connection, HEADER.size))
    frame = _exactly(connection, length)
    return frame[:1], frame[1:]


def _exactly(connection: socket.socket, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        piece = connection.recv(min(count - len(received), 1 << 20))
        if not piece:
            raise EOFError
        received += piece
    return bytes(received)
