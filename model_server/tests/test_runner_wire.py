import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_server.runner import wire

_FRAMES = st.lists(
    st.tuples(st.sampled_from([wire.PREDICT, wire.INFER, wire.ANSWER]), st.binary(max_size=300))
)


@given(frames=_FRAMES, data=st.data())
def test_frames_arrive_as_they_were_sent_however_they_are_cut(
    frames: list[tuple[bytes, bytes]], data: st.DataObject
) -> None:
    sent = b"".join(wire.pack(kind, content) for kind, content in frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)))))
    reader = wire.FrameReader()
    received = []
    for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
        received += reader.feed(sent[start:end])
    assert received == frames


@given(rows=st.integers(0, 2**32 - 1), body=st.binary())
def test_an_answer_says_how_many_rows_it_is_about(rows: int, body: bytes) -> None:
    ((kind, content),) = wire.FrameReader().feed(wire.pack_answer(rows, body))
    assert kind == wire.ANSWER
    assert wire.unpack_answer(content) == (rows, body)


@pytest.mark.parametrize("length", [0, wire.LARGEST_CONTENT + 2, 2**32 - 1])
def test_a_frame_that_cannot_be_is_refused_by_its_length(length: int) -> None:
    """Before anything of it has come, so nothing is kept for it."""
    with pytest.raises(wire.FrameError, match=str(length)):
        wire.FrameReader().feed(length.to_bytes(4, "big"))


def test_nobody_sends_more_than_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "LARGEST_CONTENT", 3)
    assert wire.pack(wire.ANSWER, b"abc") == b"\0\0\0\4+abc"
    with pytest.raises(wire.FrameError, match="4 bytes is larger"):
        wire.pack(wire.ANSWER, b"abcd")


def test_one_frame_is_waited_for() -> None:
    here, there = socket.socketpair()
    with here, there:
        here.sendall(wire.pack(wire.PREDICT, 100_000 * b"x"))
        assert wire.receive(there) == (wire.PREDICT, 100_000 * b"x")
        here.sendall(wire.pack(wire.PREDICT, b"cut off")[:-1])
        here.close()
        with pytest.raises(EOFError):
            wire.receive(there)
