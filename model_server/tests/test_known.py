import resource
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread, current_thread
from typing import Any

import pytest

from model_server.catalog import CatalogEntry, Contents
from model_server.known import KnownCatalog
from model_server.registry import ModelVersion

SINCE = datetime(2026, 11, 1, tzinfo=UTC)
CHAMPION = ("iris", "pyfunc", "champion")


def _entry(version: int, digest: str = "digest", *aliases: str) -> CatalogEntry:
    return CatalogEntry(
        ModelVersion("iris", version, digest), "pyfunc", "champion", SINCE, list(aliases)
    )


def _contents(revision: int, *entries: CatalogEntry) -> Contents:
    aliases = {
        (entry.model.name, entry.flavor, alias): entry.model.version
        for entry in entries
        for alias in entry.aliases
    }
    return Contents(revision, {entry.key: entry for entry in entries}, aliases)


@pytest.fixture
def workers(tmp_path: Path) -> list[KnownCatalog]:
    return [_worker(tmp_path), _worker(tmp_path)]


def _worker(tmp_path: Path) -> KnownCatalog:
    return KnownCatalog(tmp_path / "state" / "known.json", tmp_path / "run")


def _learn(worker: KnownCatalog, contents: Contents, *running: int) -> None:
    worker.refresh(lambda: contents, lambda entry: entry.model.version in running)


def test_what_one_worker_learns_all_know_at_once(
    workers: list[KnownCatalog], tmp_path: Path
) -> None:
    here, there = workers
    assert here.current() is None
    assert there.current() is None
    for revision in range(40):
        _learn(here, _contents(revision, _entry(revision, "digest", "champion")))
        known = there.current()
        assert known is not None
        assert known == here.current()
        assert known.aliases == {CHAMPION: revision}
        assert known.entries[("iris", "pyfunc", revision)].since == SINCE
    # A worker that comes later, and one after a restart of the machine, knows it too.
    assert _worker(tmp_path).current() == here.current()
    (tmp_path / "run" / "known.count").unlink()
    assert _worker(tmp_path).current() == here.current()


def test_a_thread_that_is_slower_leaves_nothing_old_behind(tmp_path: Path) -> None:
    older_read, newer_began, older_ended = Event(), Event(), Event()
    older: Thread | None = None
    newer: Thread | None = None

    class Interleaved(KnownCatalog):
        """Whoever read the older file stores it after the first store of the newer one."""

        def __setattr__(self, attribute: str, value: Any) -> None:
            if current_thread() is older:
                older_read.set()
                assert newer_began.wait(60)
            super().__setattr__(attribute, value)
            if current_thread() is newer:
                newer_began.set()
                assert older_ended.wait(60)

    writer = _worker(tmp_path)
    reader = Interleaved(tmp_path / "state" / "known.json", tmp_path / "run")
    _learn(writer, _contents(1, _entry(1)))
    older = Thread(target=reader.current)
    older.start()
    assert older_read.wait(60)
    _learn(writer, _contents(2, _entry(2)))
    newer = Thread(target=reader.current)
    newer.start()
    older.join()
    older_ended.set()
    newer.join()
    known = reader.current()
    assert known is not None
    assert known.revision == 2


def test_asking_again_reads_no_file(workers: list[KnownCatalog]) -> None:
    here, _ = workers
    _learn(here, _contents(1, _entry(1)))
    known = here.current()
    assert known is not None
    assert here.current() is known


def test_an_alias_keeps_its_old_version_until_the_new_one_runs_here(
    workers: list[KnownCatalog],
) -> None:
    here, there = workers
    _learn(here, _contents(1, _entry(1, "digest", "champion")), 1)
    moved = _contents(2, _entry(2, "digest", "champion"))
    _learn(here, moved, 1)
    known = there.current()
    assert known is not None
    assert known.aliases == {CHAMPION: 1}
    assert {version for _, _, version in known.entries} == {1, 2}
    _learn(there, moved, 1, 2)
    known = here.current()
    assert known is not None
    assert known.aliases == {CHAMPION: 2}
    assert {version for _, _, version in known.entries} == {2}


def test_an_alias_does_not_wait_for_an_old_version_that_does_not_run_either(
    workers: list[KnownCatalog],
) -> None:
    here, _ = workers
    _learn(here, _contents(1, _entry(1, "digest", "champion")), 1)
    _learn(here, _contents(2, _entry(2, "digest", "champion")))
    known = here.current()
    assert known is not None
    assert known.aliases == {CHAMPION: 2}


def test_an_unloaded_alias_is_gone_at_once(workers: list[KnownCatalog]) -> None:
    here, there = workers
    _learn(here, _contents(1, _entry(1, "digest", "champion")), 1)
    _learn(here, _contents(2), 1)
    known = there.current()
    assert known is not None
    assert (known.entries, known.aliases) == ({}, {})


def test_a_file_that_cannot_be_opened_now_is_read_once_it_can_be(
    workers: list[KnownCatalog],
) -> None:
    """Else no model would be known until the next one is loaded or unloaded."""
    here, there = workers
    _learn(here, _contents(1, _entry(1)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Less than are open now: some may be closed meanwhile, of those below none.
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            there.current()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert there.current() == here.current()


@pytest.mark.parametrize(
    "content", ["", "[]", "7", '{"revision": 1}', '{"revision": 1, "entries": [{"model": "iris"}]}']
)
def test_a_file_that_was_cut_short_or_is_another_versions_is_as_none(
    workers: list[KnownCatalog], tmp_path: Path, content: str
) -> None:
    here, _ = workers
    _learn(here, _contents(1, _entry(1)))
    (tmp_path / "state" / "known.json").write_text(content)
    later = _worker(tmp_path)
    assert later.current() is None
    # It is written anew.
    _learn(later, _contents(1, _entry(1)))
    known = here.current()
    assert known is not None
    assert known.entries.keys() == {("iris", "pyfunc", 1)}
