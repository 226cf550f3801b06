import socket

import pytest

from model_server.runner import wire


def test_a_frame_arrives_as_it_was_sent() -> None:
    here, there = socket.socketpair()
    with here, there:
        here.sendall(wire.pack(wire.STOP) + wire.pack(wire.PREDICT, b'{"data": []}'))
        assert wire.receive(there) == (wire.STOP, b"")
        assert wire.receive(there) == (wire.PREDICT, b'{"data": []}')
        here.sendall(wire.pack(wire.PREDICT, b"cut off")[:-1])
        here.close()
        with pytest.raises(EOFError):
            wire.receive(there)


def test_a_frame_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_LARGEST_CONTENT", 3)
    assert wire.pack(wire.ANSWER, b"abc") == b"\0\0\0\4+abc"
    with pytest.raises(ValueError, match="larger than a frame"):
        wire.pack(wire.ANSWER, b"abcd")
