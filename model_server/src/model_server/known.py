"""What a host knows of the catalog: one file for all its workers, and a counter in shared memory.

Predictions read nothing else. The file is written whenever the catalog was read and had changed;
the counter tells every worker, for the cost of reading eight bytes of memory, that its copy is old.
A host that starts while the database is away goes on with the file.
"""

import mmap
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from model_server.catalog import AliasKey, CatalogEntry, Contents
from model_server.locks import exclusive

_COUNT = struct.Struct("=Q")
_LOCK_SECONDS = 10.0


class _File(msgspec.Struct):
    """The catalog's contents as JSON has them: keys are names only."""

    revision: int
    entries: list[CatalogEntry]
    aliases: list[tuple[AliasKey, int]]


class KnownCatalog:
    """The file and the counter, as one worker sees them."""

    def __init__(self, file: Path, runtime_dir: Path) -> None:
        self._file = file
        self._lock = runtime_dir / "known.lock"
        runtime_dir.mkdir(parents=True, exist_ok=True)
        counter = os.open(runtime_dir / "known.count", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            # Never shorter than it is for a worker that has it mapped.
            if os.fstat(counter).st_size < _COUNT.size:
                os.ftruncate(counter, _COUNT.size)
            self._memory = mmap.mmap(counter, _COUNT.size)
        finally:
            os.close(counter)
        # The count and the copy of that count change together, whichever thread is faster.
        self._copy: tuple[int, Contents | None] = (-1, None)

    def current(self) -> Contents | None:
        """What this host knows now; None if it never knew anything."""
        (count,) = _COUNT.unpack_from(self._memory)
        seen, known = self._copy
        if count != seen:
            # The count first: a file that is newer still is read once more, never missed.
            known = _read(self._file)
            self._copy = count, known
        return known

    def refresh(
        self, read: Callable[[], Contents], is_ready: Callable[[CatalogEntry], bool]
    ) -> Contents:
        """Make the catalog's contents, read now, what this host knows.

        An alias that means another version now keeps its old one here until `is_ready` says that
        the new one runs on this host, so that no caller waits for it or meets its failure.
        """
        with exclusive(self._lock, time.monotonic() + _LOCK_SECONDS, "the list of models"):
            # Read under the lock, so that nobody puts older contents in the place of newer ones.
            contents = read()
            before = self.current()
            now = Contents(contents.revision, dict(contents.entries), dict(contents.aliases))
            if before is not None:
                _hold_over(before, now, is_ready)
            if now != before:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                partial = self._file.with_suffix(".partial")
                partial.write_bytes(_to_json(now))
                partial.replace(self._file)
                (count,) = _COUNT.unpack_from(self._memory)
                _COUNT.pack_into(self._memory, 0, count + 1)
        return contents


def _hold_over(before: Contents, now: Contents, is_ready: Callable[[CatalogEntry], bool]) -> None:
    for alias in now.aliases:
        old, new = before.named(alias), now.named(alias)
        if old is None or new is None or old.model == new.model:
            continue
        if not is_ready(new) and is_ready(old):
            now.aliases[alias] = old.model.version
            now.entries.setdefault(old.key, old)


def _read(file: Path) -> Contents | None:
    """What the file says; None where there is none, it was cut short or another version's.

    One that cannot be read now, for want of file descriptors, is an OSError.
    """
    try:
        said = msgspec.json.decode(file.read_bytes(), type=_File)
    except (FileNotFoundError, ValueError, msgspec.DecodeError):
        return None
    return Contents(said.revision, {entry.key: entry for entry in said.entries}, dict(said.aliases))


def _to_json(known: Contents) -> bytes:
    file = _File(known.revision, list(known.entries.values()), list(known.aliases.items()))
    return msgspec.json.encode(file)
