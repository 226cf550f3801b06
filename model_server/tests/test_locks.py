import time
from pathlib import Path

import pytest

from model_server.errors import DeadlineExceededError
from model_server.locks import exclusive, is_held


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    lock = tmp_path / "some" / "model.lock"
    assert not is_held(lock)
    with exclusive(lock, time.monotonic() + 1, "a model"):
        assert is_held(lock)
        with (
            pytest.raises(DeadlineExceededError, match="busy with a model"),
            exclusive(lock, time.monotonic() + 0.1, "a model"),
        ):
            pytest.fail("held twice")
    assert not is_held(lock)
