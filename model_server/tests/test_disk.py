import os
from pathlib import Path

import pytest

from model_server.disk import write_out


def test_a_folder_is_written_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    opened = len(list(Path("/proc/self/fd").iterdir()))
    write_out(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == opened
    with pytest.raises(FileNotFoundError):
        write_out(tmp_path / "missing")


def test_a_disk_that_takes_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No folder of this machine can be written out through this descriptor.
    monkeypatch.setattr(os, "open", lambda *_: 2**20)
    monkeypatch.setattr(os, "close", lambda _: None)
    with pytest.raises(OSError, match="Bad file descriptor") as raised:
        write_out(tmp_path)
    assert raised.value.filename == str(tmp_path)
