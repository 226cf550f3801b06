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
    received: list[tuple[bytes, bytes]] = []
    for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
        received += reader.feed(sent[start:end])
    assert received == frames


_ROWS = st.integers(0, 5000) | st.integers(0, 2**32 - 1)


@given(rows=_ROWS, call_rows=st.just(0) | _ROWS, asked=_ROWS, body=st.binary())
def test_an_answer_says_how_many_rows_it_is_about(
    rows: int, call_rows: int, asked: int, body: bytes
) -> None:
    """And its call, if they can be: more rows than its own bytes, and a caller has lied."""
    ((kind, content),) = wire.FrameReader().feed(wire.pack_answer(rows, call_rows, body))
    assert kind == wire.ANSWER
    possible = {0, rows, *range(rows, wire.MOST_JOINED_ROWS + 1)}
    if rows <= asked and call_rows in possible:
        assert wire.unpack_answer(content, asked) == (rows, call_rows, body)
    else:
        with pytest.raises(wire.FrameError, match=f"{rows} rows in a call of {call_rows}"):
            wire.unpack_answer(content, asked)


@pytest.mark.parametrize("length", [0, wire.LARGEST_CONTENT + 2, 2**32 - 1])
def test_a_frame_that_cannot_be_is_refused_by_its_length(length: int) -> None:
    """Before anything of it has come, so nothing is kept for it."""
    with pytest.raises(wire.FrameError, match=str(length)):
        list(wire.FrameReader().feed(length.to_bytes(4, "big")))


@pytest.mark.parametrize("kind", [*wire.FROM_RUNNER, wire.PREDICT])
def test_a_worker_takes_only_so_much_of_a_runner(kind: bytes) -> None:
    """A frame is refused by its first five bytes; what came before it is not lost."""
    reader = wire.FrameReader(wire.FROM_RUNNER)
    largest = wire.FROM_RUNNER.get(kind, 0)
    good = wire.pack(wire.REFUSAL, b"no")
    frames = reader.feed(good + (largest + 2).to_bytes(4, "big") + kind)
    assert next(frames) == (wire.REFUSAL, b"no")
    with pytest.raises(wire.FrameError, match=str(largest + 2) if largest else "no frame b'P'"):
        next(frames)
    if largest:
        reader = wire.FrameReader(wire.FROM_RUNNER)
        assert list(reader.feed((largest + 1).to_bytes(4, "big") + kind)) == []


def test_nobody_sends_more_than_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "LARGEST_CONTENT", 3)
    monkeypatch.setitem(wire.FROM_RUNNER, wire.ANSWER, 2)
    assert wire.pack(wire.PREDICT, b"abc") == b"\0\0\0\4Pabc"
    assert wire.pack(wire.ANSWER, b"ab") == b"\0\0\0\3=ab"
    for kind, content in ((wire.PREDICT, b"abcd"), (wire.ANSWER, b"abc")):
        with pytest.raises(wire.FrameError, match=f"{len(content)} bytes is larger"):
            wire.pack(kind, content)


def test_an_answer_without_its_rows_is_none() -> None:
    with pytest.raises(wire.FrameError, match="eight bytes"):
        wire.unpack_answer(b"1234567", 100)
