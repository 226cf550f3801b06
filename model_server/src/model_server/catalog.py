"""What shall be loaded: one table that all workers and hosts agree on, and that outlives them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from threading import Lock

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    DateTime,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    delete,
    insert,
    select,
    update,
)
from sqlalchemy.engine import Row, make_url
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateTable

from model_server.errors import CatalogUnavailableError
from model_server.registry import ModelVersion

_METADATA = MetaData()
_NAME_LENGTH = 512

_MODELS = Table(
    "loaded_models",
    _METADATA,
    Column("name", String(_NAME_LENGTH), primary_key=True),
    Column("flavor", String(16), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("asked_as", String(_NAME_LENGTH), nullable=False),
    Column("since", DateTime(timezone=True), nullable=False),
    Column("problem", String, nullable=True),
)
_ALIASES = Table(
    "model_aliases",
    _METADATA,
    Column("name", String(_NAME_LENGTH), primary_key=True),
    Column("flavor", String(16), primary_key=True),
    Column("alias", String(_NAME_LENGTH), primary_key=True),
    Column("version", Integer, nullable=False),
)


@dataclass(frozen=True)
class CatalogEntry:
    """One model version that shall be loaded with one flavor."""

    model: ModelVersion
    flavor: str
    asked_as: str
    since: datetime
    problem: str | None = None
    aliases: list[str] = field(default_factory=list)


class Catalog:
    """The table of what shall be loaded."""

    def __init__(self, database_url: str) -> None:
        url = make_url(database_url)
        if url.drivername == "sqlite":
            # Opening a file is cheap, and nothing is left open behind a thread that ended.
            self._engine = create_engine(url, poolclass=NullPool, connect_args={"timeout": 30})
        else:
            self._engine = create_engine(
                url, pool_pre_ping=True, connect_args={"connect_timeout": 5}
            )
        self._prepared = False
        self._preparing = Lock()

    def close(self) -> None:
        """Give up the connections."""
        self._engine.dispose()

    def entries(self) -> list[CatalogEntry]:
        """All that shall be loaded, by name, flavor and version."""
        with self._transaction() as connection:
            rows = connection.execute(
                select(_MODELS).order_by(_MODELS.c.name, _MODELS.c.flavor, _MODELS.c.version)
            ).all()
            aliases = connection.execute(select(_ALIASES).order_by(_ALIASES.c.alias)).all()
        by_model: dict[tuple[str, str, int], list[str]] = {}
        for row in aliases:
            by_model.setdefault((row.name, row.flavor, row.version), []).append(row.alias)
        return [_entry(row, by_model.get((row.name, row.flavor, row.version), [])) for row in rows]

    def find(self, name: str, flavor: str, version: int) -> CatalogEntry | None:
        """The entry of one model version."""
        with self._transaction() as connection:
            row = connection.execute(select(_MODELS).where(*_is(name, flavor, version))).first()
            if row is None:
                return None
            aliases = connection.scalars(
                select(_ALIASES.c.alias)
                .where(
                    _ALIASES.c.name == name,
                    _ALIASES.c.flavor == flavor,
                    _ALIASES.c.version == version,
                )
                .order_by(_ALIASES.c.alias)
            ).all()
        return _entry(row, list(aliases))

    def version_of(self, name: str, flavor: str, alias: str) -> int | None:
        """The version that an alias was loaded as."""
        with self._transaction() as connection:
            return connection.scalar(
                select(_ALIASES.c.version).where(
                    _ALIASES.c.name == name,
                    _ALIASES.c.flavor == flavor,
                    _ALIASES.c.alias == alias,
                )
            )

    def record(self, model: ModelVersion, flavor: str, *, asked_as: str, alias: bool) -> None:
        """Remember that a model version is loaded; an alias from now on means this version."""
        with self._transaction() as connection:
            same = _is(model.name, flavor, model.version)
            known = connection.scalar(select(_MODELS.c.digest).where(*same))
            if known == model.digest:
                connection.execute(update(_MODELS).where(*same).values(problem=None))
            else:
                connection.execute(delete(_MODELS).where(*same))
                connection.execute(
                    insert(_MODELS).values(
                        name=model.name,
                        flavor=flavor,
                        version=model.version,
                        digest=model.digest,
                        asked_as=asked_as,
                        since=datetime.now(UTC),
                    )
                )
            if alias:
                connection.execute(
                    delete(_ALIASES).where(
                        _ALIASES.c.name == model.name,
                        _ALIASES.c.flavor == flavor,
                        _ALIASES.c.alias == asked_as,
                    )
                )
                connection.execute(
                    insert(_ALIASES).values(
                        name=model.name, flavor=flavor, alias=asked_as, version=model.version
                    )
                )

    def note_problem(self, entry: CatalogEntry, problem: str | None) -> None:
        """Remember why something that shall be loaded is not; None when that is over."""
        with self._transaction() as connection:
            connection.execute(
                update(_MODELS)
                .where(*_is(entry.model.name, entry.flavor, entry.model.version))
                .values(problem=problem)
            )

    def remove(self, name: str, flavor: str, version: int) -> None:
        """Forget a model version and the aliases it was loaded by."""
        with self._transaction() as connection:
            connection.execute(
                delete(_ALIASES).where(
                    _ALIASES.c.name == name,
                    _ALIASES.c.flavor == flavor,
                    _ALIASES.c.version == version,
                )
            )
            connection.execute(delete(_MODELS).where(*_is(name, flavor, version)))

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            self._prepare()
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
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


def _is(name: str, flavor: str, version: int) -> tuple[ColumnElement[bool], ...]:
    return (_MODELS.c.name == name, _MODELS.c.flavor == flavor, _MODELS.c.version == version)


def _entry(row: Row[tuple[object, ...]], aliases: list[str]) -> CatalogEntry:
    since: datetime = row.since
    return CatalogEntry(
        model=ModelVersion(row.name, row.version, row.digest),
        flavor=row.flavor,
        asked_as=row.asked_as,
        # SQLite keeps no zone, and what was written is UTC; PostgreSQL answers in its own.
        since=since.astimezone(UTC) if since.tzinfo else since.replace(tzinfo=UTC),
        problem=row.problem,
        aliases=aliases,
    )
