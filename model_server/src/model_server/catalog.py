"""What shall be loaded: one table that all workers and hosts agree on, and that outlives them.

Every change raises the catalog's revision. Each host tells which revision it acts upon, so that
whoever changed something can wait until all hosts have seen it.
"""

import contextlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from threading import Lock, Timer
from typing import Any

import psycopg
from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    DateTime,
    Integer,
    MetaData,
    Select,
    String,
    Table,
    create_engine,
    delete,
    event,
    func,
    inspect,
    select,
    text,
    true,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, Engine, Row, make_url
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateTable

from model_server.errors import CatalogUnavailableError
from model_server.registry import ModelVersion, version_number

_METADATA = MetaData()
_NAME_LENGTH = 512
_ONLY_ROW = 1

CONNECT_SECONDS = 3
"""How long the database may take to accept a connection."""
TRANSACTION_SECONDS = 5
"""How long one transaction may take before its connection is cut."""
_HOST_IS_GONE = timedelta(seconds=10)

_MODELS = Table(
    "loaded_models",
    _METADATA,
    Column("name", String(_NAME_LENGTH), primary_key=True),
    Column("flavor", String(16), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("asked_as", String(_NAME_LENGTH), nullable=False),
    Column("since", DateTime(timezone=True), nullable=False),
)
_ALIASES = Table(
    "model_aliases",
    _METADATA,
    Column("name", String(_NAME_LENGTH), primary_key=True),
    Column("flavor", String(16), primary_key=True),
    Column("alias", String(_NAME_LENGTH), primary_key=True),
    Column("version", Integer, nullable=False),
    Column("problem", String, nullable=True),
)
_REVISION = Table(
    "catalog_revision",
    _METADATA,
    Column("id", Integer, primary_key=True),
    Column("revision", Integer, nullable=False),
)
_HOSTS = Table(
    "model_server_hosts",
    _METADATA,
    Column("host", String(64), primary_key=True),
    Column("revision", Integer, nullable=False),
    Column("seen", DateTime(timezone=True), nullable=False),
)

_CONTENTS: Select[Any] = (
    select(_REVISION.c.revision, *_MODELS.c, _ALIASES.c.alias, _ALIASES.c.problem)
    .select_from(
        _REVISION.outerjoin(_MODELS, true()).outerjoin(
            _ALIASES,
            (_ALIASES.c.name == _MODELS.c.name)
            & (_ALIASES.c.flavor == _MODELS.c.flavor)
            & (_ALIASES.c.version == _MODELS.c.version),
        )
    )
    .order_by(_MODELS.c.name, _MODELS.c.flavor, _MODELS.c.version, _ALIASES.c.alias)
)
"""The revision with each model and each of its aliases; a row without them where there are none."""

Key = tuple[str, str, int]
"""A model's name, its flavor and its version."""
AliasKey = tuple[str, str, str]
"""A model's name, its flavor and an alias."""


@dataclass(frozen=True)
class CatalogEntry:
    """One model version that shall be loaded with one flavor."""

    model: ModelVersion
    flavor: str
    asked_as: str
    since: datetime
    aliases: list[str] = field(default_factory=list)
    problem: str | None = None
    """Why an alias does not mean what MLflow says it means, though this version goes on."""

    @property
    def key(self) -> Key:
        """What the entry is found by."""
        return self.model.name, self.flavor, self.model.version

    def __str__(self) -> str:
        return f"{self.model} as {self.flavor}"


@dataclass(frozen=True)
class Contents:
    """All of the catalog at one revision."""

    revision: int
    entries: dict[Key, CatalogEntry]
    aliases: dict[AliasKey, int]

    def named(self, alias: AliasKey) -> CatalogEntry | None:
        """What an alias means."""
        name, flavor, _ = alias
        version = self.aliases.get(alias)
        return None if version is None else self.entries.get((name, flavor, version))


class Catalog:
    """The table of what shall be loaded."""

    def __init__(self, database_url: str) -> None:
        url = make_url(database_url)
        self._engine = _sqlite(url) if url.drivername == "sqlite" else _postgresql(url)
        self._insert: Any = (
            sqlite.insert if self._engine.dialect.name == "sqlite" else postgresql.insert
        )
        self._prepared = False
        self._preparing = Lock()

    def close(self) -> None:
        """Give up the connections."""
        self._engine.dispose()

    def revision(self) -> int:
        """A number that every change raises."""
        with self._transaction() as connection:
            return int(connection.execute(select(_REVISION.c.revision)).scalar_one())

    def contents(self) -> Contents:
        """All that shall be loaded, by name, flavor and version."""
        with self._transaction() as connection:
            # One statement, as it sees one moment: with several, a move between them would leave
            # an alias without its version.
            rows = connection.execute(_CONTENTS).all()
        by_model: dict[Key, list[Row[Any]]] = {}
        for row in rows:
            if row.name is not None:
                by_model.setdefault((row.name, row.flavor, row.version), []).append(row)
        entries = [_entry(found) for found in by_model.values()]
        return Contents(
            rows[0].revision,
            {entry.key: entry for entry in entries},
            {
                (entry.model.name, entry.flavor, alias): entry.model.version
                for entry in entries
                for alias in entry.aliases
            },
        )

    def record(
        self,
        model: ModelVersion,
        flavor: str,
        *,
        asked_as: str,
        instead_of: ModelVersion | None = None,
    ) -> int | None:
        """Remember that a model version shall be loaded; answers the new revision.

        An alias from now on means this version. Versions that nobody asks for any more, neither by
        number nor by an alias, are forgotten. With `instead_of`, an alias that does not mean that
        version any more, as it was unloaded or moved meanwhile, is let be; the answer is None.
        """
        with self._change() as connection:
            if instead_of and not _means(connection, flavor, asked_as, instead_of):
                return None
            same = _is(model.name, flavor, model.version)
            values = {"digest": model.digest, "asked_as": asked_as, "since": datetime.now(UTC)}
            known = connection.execute(select(_MODELS).where(*same)).first()
            if known is not None and known.digest == model.digest:
                # A number is the stronger wish: it keeps the version when an alias moves away.
                keeps = version_number(known.asked_as) is not None
                values["asked_as"] = (
                    asked_as if not keeps and version_number(asked_as) else known.asked_as
                )
                values["since"] = known.since
            key = {"name": model.name, "flavor": flavor, "version": model.version}
            self._upsert(connection, _MODELS, key, values)
            if version_number(asked_as) is None:
                alias = {"name": model.name, "flavor": flavor, "alias": asked_as}
                meaning = {"version": model.version, "problem": None}
                self._upsert(connection, _ALIASES, alias, meaning)
                _forget_unwanted(connection, model.name, flavor)
            return _raise_revision(connection)

    def note_problem(self, alias: AliasKey, problem: str | None) -> None:
        """Remember why an alias does not mean what MLflow says; None when that is over."""
        with self._change() as connection:
            changed = connection.execute(
                update(_ALIASES)
                .where(*_is_alias(*alias), _ALIASES.c.problem.is_distinct_from(problem))
                .values(problem=problem)
            )
            if changed.rowcount:
                _raise_revision(connection)

    def remove(self, key: Key) -> int:
        """Forget a model version and the aliases it was loaded by; answers the new revision."""
        name, flavor, version = key
        with self._change() as connection:
            connection.execute(
                delete(_ALIASES).where(
                    _ALIASES.c.name == name,
                    _ALIASES.c.flavor == flavor,
                    _ALIASES.c.version == version,
                )
            )
            connection.execute(delete(_MODELS).where(*_is(*key)))
            return _raise_revision(connection)

    def tell_seen(self, host: str, revision: int) -> None:
        """Tell the other hosts that this one acts upon a revision, and that it is alive."""
        with self._transaction() as connection:
            values = {"revision": revision, "seen": _now(connection)}
            self._upsert(connection, _HOSTS, {"host": host}, values)

    def is_seen_by_all(self, revision: int) -> bool:
        """Whether every host that is alive acts upon this revision, or a later one."""
        with self._transaction() as connection:
            behind = connection.scalar(
                select(func.count())
                .select_from(_HOSTS)
                .where(
                    _HOSTS.c.revision < revision, _HOSTS.c.seen > _now(connection) - _HOST_IS_GONE
                )
            )
        return not behind

    def _upsert(
        self, connection: Connection, table: Table, key: dict[str, Any], values: dict[str, Any]
    ) -> None:
        connection.execute(
            self._insert(table)
            .values(**key, **values)
            .on_conflict_do_update(index_elements=list(key), set_=values)
        )

    @contextmanager
    def _change(self) -> Iterator[Connection]:
        """A transaction that waits for every other change, so that none is made on old rows."""
        with self._transaction() as connection:
            connection.execute(
                update(_REVISION)
                .where(_REVISION.c.id == _ONLY_ROW)
                .values(revision=_REVISION.c.revision)
            )
            yield connection

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            self._prepare()
            with self._engine.begin() as connection:
                yield connection
        except (SQLAlchemyError, psycopg.Error) as error:
            # The driver's own text may name the account; the kind of the error is enough here.
            raise CatalogUnavailableError(
                f"The database of loaded models does not answer ({type(error).__name__})."
            ) from error

    def _prepare(self) -> None:
        with self._preparing:
            if self._prepared:
                return
            try:
                self._create_tables()
            except (IntegrityError, ProgrammingError):
                # PostgreSQL, when another worker creates them at the same moment.
                self._create_tables()
            self._prepared = True

    def _create_tables(self) -> None:
        with self._engine.begin() as connection:
            for table in _METADATA.sorted_tables:
                connection.execute(CreateTable(table, if_not_exists=True))
            columns = inspect(connection).get_columns(_ALIASES.name)
            if _ALIASES.c.problem.name not in {column["name"] for column in columns}:
                # Made by version 0.1.0.
                connection.execute(text("ALTER TABLE model_aliases ADD COLUMN problem VARCHAR"))
            connection.execute(
                self._insert(_REVISION)
                .values(id=_ONLY_ROW, revision=0)
                .on_conflict_do_nothing(index_elements=["id"])
            )


def _sqlite(url: URL) -> Engine:
    # Opening a file is cheap, and nothing is left open behind a thread that ended.
    return create_engine(
        url, poolclass=NullPool, connect_args={"timeout": float(TRANSACTION_SECONDS)}
    )


def _postgresql(url: URL) -> Engine:
    """Connections that live for one transaction, and no longer than that may take.

    A server that is stopped or behind a dead network accepts and then says nothing. No setting of
    the driver ends that wait for an answer, so the connection is cut from outside.
    """
    arguments: dict[str, Any] = {
        "connect_timeout": CONNECT_SECONDS,
        "options": f"-c statement_timeout={TRANSACTION_SECONDS * 1000}",
    }
    engine = create_engine(url, poolclass=NullPool, connect_args=arguments)
    timers: dict[int, Timer] = {}

    @event.listens_for(engine, "do_connect")
    def connect(
        _: object, __: object, positional: tuple[Any, ...], named: dict[str, Any]
    ) -> psycopg.Connection:
        connection = psycopg.connect(*positional, **named)
        timers[id(connection)] = timer = Timer(TRANSACTION_SECONDS, _cut, [connection])
        timer.daemon = True
        timer.start()
        return connection

    @event.listens_for(engine, "close")
    def close(connection: psycopg.Connection, _: object) -> None:
        timers.pop(id(connection)).cancel()

    return engine


def _cut(connection: psycopg.Connection) -> None:
    with (
        contextlib.suppress(OSError, psycopg.Error),
        socket.fromfd(connection.fileno(), socket.AF_INET, socket.SOCK_STREAM) as wire,
    ):
        wire.shutdown(socket.SHUT_RDWR)


def _now(connection: Connection) -> datetime:
    """The time of the database: hosts' own clocks may differ."""
    now: datetime = connection.execute(select(func.now())).scalar_one()
    return now


def _is(name: str, flavor: str, version: int) -> tuple[ColumnElement[bool], ...]:
    return (_MODELS.c.name == name, _MODELS.c.flavor == flavor, _MODELS.c.version == version)


def _is_alias(name: str, flavor: str, alias: str) -> tuple[ColumnElement[bool], ...]:
    return (_ALIASES.c.name == name, _ALIASES.c.flavor == flavor, _ALIASES.c.alias == alias)


def _means(connection: Connection, flavor: str, alias: str, model: ModelVersion) -> bool:
    meant = (
        select(_MODELS)
        .join(
            _ALIASES, (_MODELS.c.name == _ALIASES.c.name) & (_MODELS.c.flavor == _ALIASES.c.flavor)
        )
        .where(
            *_is_alias(model.name, flavor, alias),
            _ALIASES.c.version == model.version,
            *_is(model.name, flavor, model.version),
            _MODELS.c.digest == model.digest,
        )
    )
    return connection.execute(meant).first() is not None


def _raise_revision(connection: Connection) -> int:
    raised = connection.execute(
        update(_REVISION)
        .where(_REVISION.c.id == _ONLY_ROW)
        .values(revision=_REVISION.c.revision + 1)
        .returning(_REVISION.c.revision)
    )
    return int(raised.scalar_one())


def _forget_unwanted(connection: Connection, name: str, flavor: str) -> None:
    wanted = select(_ALIASES.c.version).where(_ALIASES.c.name == name, _ALIASES.c.flavor == flavor)
    rows = connection.execute(
        select(_MODELS).where(
            _MODELS.c.name == name, _MODELS.c.flavor == flavor, _MODELS.c.version.not_in(wanted)
        )
    ).all()
    for row in rows:
        if version_number(row.asked_as) is None:
            connection.execute(delete(_MODELS).where(*_is(row.name, row.flavor, row.version)))


def _entry(rows: list[Row[Any]]) -> CatalogEntry:
    """A model version, from the rows of its aliases or the one without any."""
    row = rows[0]
    since: datetime = row.since
    return CatalogEntry(
        model=ModelVersion(row.name, row.version, row.digest),
        flavor=row.flavor,
        asked_as=row.asked_as,
        # SQLite keeps no zone, and what was written is UTC; PostgreSQL answers in its own.
        since=since.astimezone(UTC) if since.tzinfo else since.replace(tzinfo=UTC),
        aliases=[each.alias for each in rows if each.alias is not None],
        problem=" ".join(each.problem for each in rows if each.problem) or None,
    )
