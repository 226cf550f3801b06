import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from threading import Thread
from typing import Self

import pytest
from sqlalchemy import create_engine, event, text

from model_server import catalog as catalogs
from model_server.catalog import Catalog
from model_server.errors import CatalogUnavailableError
from model_server.registry import ModelVersion

ONE = ModelVersion("iris", 1, "digest-1")
TWO = ModelVersion("iris", 2, "digest-2")
OLDER_TABLES = """
CREATE TABLE loaded_models (
    name VARCHAR, flavor VARCHAR, version INTEGER, digest VARCHAR, asked_as VARCHAR,
    since TIMESTAMP, problem VARCHAR, PRIMARY KEY (name, flavor, version)
);
CREATE TABLE model_aliases (
    name VARCHAR, flavor VARCHAR, alias VARCHAR, version INTEGER,
    PRIMARY KEY (name, flavor, alias)
);
INSERT INTO loaded_models
VALUES ('iris', 'pyfunc', 1, 'digest-1', 'champion', '2026-11-01 10:00:00.000000', NULL);
INSERT INTO model_aliases VALUES ('iris', 'pyfunc', 'champion', 1)
"""
CHAMPION = ("iris", "pyfunc", "champion")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'catalog.sqlite'}"


@pytest.fixture
def catalog(url: str) -> Catalog:
    return Catalog(url)


def test_what_is_recorded_is_there_for_others(catalog: Catalog, url: str) -> None:
    catalog.record(ONE, "pyfunc", asked_as="1")
    catalog.record(TWO, "sklearn", asked_as="champion")
    contents = Catalog(url).contents()
    assert [(entry.model, entry.flavor, entry.asked_as) for entry in contents.entries.values()] == [
        (ONE, "pyfunc", "1"),
        (TWO, "sklearn", "champion"),
    ]
    assert contents.aliases == {("iris", "sklearn", "champion"): 2}
    found = contents.entries["iris", "sklearn", 2]
    assert found.aliases == ["champion"]
    assert abs(datetime.now(UTC) - found.since) < timedelta(minutes=1)


def test_an_alias_means_the_version_loaded_last_by_it(catalog: Catalog) -> None:
    catalog.record(ONE, "pyfunc", asked_as="1")
    catalog.record(ONE, "pyfunc", asked_as="champion")
    catalog.record(TWO, "pyfunc", asked_as="champion")
    contents = catalog.contents()
    assert contents.aliases == {CHAMPION: 2}
    assert [entry.aliases for entry in contents.entries.values()] == [[], ["champion"]]


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        (["champion"], [2]),
        (["champion", "1"], [1, 2]),
        (["1", "champion"], [1, 2]),
        (["champion", "challenger"], [1, 2]),
    ],
)
def test_a_version_that_nobody_asks_for_any_more_is_forgotten(
    catalog: Catalog, asked: list[str], left: list[int]
) -> None:
    for reference in asked:
        catalog.record(ONE, "pyfunc", asked_as=reference)
    catalog.record(ONE, "sklearn", asked_as="champion")
    catalog.record(TWO, "pyfunc", asked_as="champion")
    kept = catalog.contents().entries
    assert [version for _, flavor, version in kept if flavor == "pyfunc"] == left
    # The other flavor's aliases are its own.
    assert ("iris", "sklearn", 1) in kept


def test_an_alias_moves_only_from_what_it_was_seen_to_mean(catalog: Catalog) -> None:
    assert catalog.record(TWO, "pyfunc", asked_as="champion", instead_of=ONE) is None
    assert catalog.contents().entries == {}
    catalog.record(ONE, "pyfunc", asked_as="champion")
    anew = ModelVersion("iris", 1, "made anew")
    assert catalog.record(TWO, "pyfunc", asked_as="champion", instead_of=anew) is None
    assert catalog.record(TWO, "sklearn", asked_as="champion", instead_of=ONE) is None
    assert catalog.record(TWO, "pyfunc", asked_as="champion", instead_of=ONE) is not None
    # Somebody slower has seen it mean the first one, too.
    three = ModelVersion("iris", 3, "digest-3")
    assert catalog.record(three, "pyfunc", asked_as="champion", instead_of=ONE) is None
    contents = catalog.contents()
    assert list(contents.entries) == [("iris", "pyfunc", 2)]
    champion = contents.named(CHAMPION)
    assert champion is not None
    assert champion.model == TWO
    assert contents.named(("iris", "pyfunc", "challenger")) is None


def test_what_is_read_while_an_alias_moves_is_of_one_moment(catalog: Catalog, url: str) -> None:
    models = [ONE, TWO]
    catalog.record(ONE, "pyfunc", asked_as="champion")
    mover = Catalog(url)

    def move(*_: object) -> None:
        models.reverse()
        mover.record(models[0], "pyfunc", asked_as="champion")

    # Before each question that the database is asked.
    event.listen(catalog._engine, "before_cursor_execute", move)
    contents = catalog.contents()
    champion = contents.named(CHAMPION)
    assert champion is not None
    assert [champion.model, champion.aliases] == [models[0], ["champion"]]
    assert list(contents.entries.values()) == [champion]
    assert contents.revision == mover.revision()


def test_recording_again_keeps_since_unless_the_model_was_made_anew(catalog: Catalog) -> None:
    catalog.record(ONE, "pyfunc", asked_as="1")
    (first,) = catalog.contents().entries.values()
    catalog.record(ONE, "pyfunc", asked_as="champion")
    (again,) = catalog.contents().entries.values()
    assert (again.since, again.asked_as) == (first.since, "1")
    catalog.record(ModelVersion("iris", 1, "another"), "pyfunc", asked_as="1")
    (anew,) = catalog.contents().entries.values()
    assert anew.since > first.since
    assert anew.model.digest == "another"


def test_what_is_wrong_with_an_alias_is_told_until_it_moves(catalog: Catalog) -> None:
    catalog.record(ONE, "pyfunc", asked_as="champion")
    catalog.record(ONE, "pyfunc", asked_as="challenger")
    before = catalog.revision()
    catalog.note_problem(CHAMPION, "Champion is gone.")
    catalog.note_problem(CHAMPION, "Champion is gone.")
    assert catalog.revision() == before + 1
    catalog.note_problem(("iris", "pyfunc", "challenger"), "Challenger is broken.")
    (entry,) = catalog.contents().entries.values()
    assert entry.problem == "Challenger is broken. Champion is gone."
    catalog.record(TWO, "pyfunc", asked_as="champion")
    assert [entry.problem for entry in catalog.contents().entries.values()] == [
        "Challenger is broken.",
        None,
    ]


def test_removing_forgets_the_aliases_too(catalog: Catalog) -> None:
    catalog.record(ONE, "pyfunc", asked_as="champion")
    catalog.record(TWO, "pyfunc", asked_as="2")
    catalog.remove(("iris", "pyfunc", 1))
    contents = catalog.contents()
    assert list(contents.entries) == [("iris", "pyfunc", 2)]
    assert contents.aliases == {}


def test_every_change_raises_the_revision(catalog: Catalog) -> None:
    revisions = [
        catalog.record(ONE, "pyfunc", asked_as="champion"),
        catalog.record(TWO, "pyfunc", asked_as="champion"),
        catalog.remove(("iris", "pyfunc", 2)),
    ]
    assert revisions == [1, 2, 3]
    assert catalog.revision() == catalog.contents().revision == 3


def test_a_change_can_be_waited_for_on_every_host_that_lives(
    catalog: Catalog, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert catalog.is_seen_by_all(7)
    catalog.tell_seen("here", 7)
    Catalog(url).tell_seen("there", 6)
    assert not catalog.is_seen_by_all(7)
    Catalog(url).tell_seen("there", 8)
    assert catalog.is_seen_by_all(7)
    assert not catalog.is_seen_by_all(8)
    monkeypatch.setattr(catalogs, "_HOST_IS_GONE", timedelta(0))
    assert catalog.is_seen_by_all(8)


def test_a_host_whose_clock_is_wrong_is_waited_for_like_any_other(
    catalog: Catalog, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) - timedelta(hours=1)

    with monkeypatch.context() as there:
        there.setattr(catalogs, "datetime", Late)
        Catalog(url).tell_seen("there", 6)
    assert not catalog.is_seen_by_all(7)


def test_many_workers_may_begin_and_load_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # However long the disk takes for all of them.
    monkeypatch.setattr(catalogs, "TRANSACTION_SECONDS", 60)

    def work(number: int) -> None:
        Catalog(url).record(
            ModelVersion("iris", number % 4, "digest"), "pyfunc", asked_as=str(number % 4)
        )

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(16)))
    contents = Catalog(url).contents()
    assert (len(contents.entries), contents.revision) == (4, 16)


def test_a_catalog_of_an_older_version_is_taken_over(url: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in OLDER_TABLES.split(";"):
            connection.execute(text(statement))
    engine.dispose()
    catalog = Catalog(url)
    (entry,) = catalog.contents().entries.values()
    assert (entry.model, entry.aliases, entry.problem) == (ONE, ["champion"], None)
    catalog.record(TWO, "pyfunc", asked_as="champion")
    assert list(catalog.contents().entries) == [("iris", "pyfunc", 2)]


def test_an_unreachable_database_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CatalogUnavailableError, match="does not answer"):
        Catalog(f"sqlite:///{tmp_path}/missing/catalog.sqlite").contents()
    postgres = Catalog("postgresql+psycopg://me:hidden@127.0.0.1:1/x")
    with pytest.raises(CatalogUnavailableError) as raised:
        postgres.contents()
    assert "hidden" not in str(raised.value)


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that accepts and then says nothing, as a stopped one does."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server.getsockname()[1]


@pytest.fixture
def mute() -> Iterator[int]:
    """The port of a server that lets everybody in and then answers no question."""
    # Authentication is fine; a process id and key; ready for a query.
    welcome = b"R\0\0\0\x08\0\0\0\0" + b"K\0\0\0\x0c\0\0\0\x01\0\0\0\x01" + b"Z\0\0\0\x05I"
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def serve() -> None:
            guests = []
            while True:
                try:
                    guest, _ = server.accept()
                except OSError:
                    break
                guests.append(guest)
                if int.from_bytes(guest.recv(4)) == 8:
                    # Whether it speaks TLS: no.
                    guest.sendall(b"N")
                    guest.recv(4)
                guest.sendall(welcome)
            for guest in guests:
                guest.close()

        thread = Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("server", ["silent", "mute"])
def test_a_database_that_hangs_is_given_up_in_seconds(
    server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = request.getfixturevalue(server)
    monkeypatch.setattr(catalogs, "TRANSACTION_SECONDS", 1)
    # libpq takes less than two seconds for two.
    monkeypatch.setattr(catalogs, "CONNECT_SECONDS", 2)
    began = time.monotonic()
    with pytest.raises(CatalogUnavailableError, match="does not answer"):
        Catalog(f"postgresql+psycopg://me:hidden@127.0.0.1:{port}/x").contents()
    # Without the limits it would be for ever.
    assert time.monotonic() - began < 20
