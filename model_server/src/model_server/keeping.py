"""Keep what runs on this host equal to what shall run.

Every HTTP worker has a keeper; the one that holds the host's lock leads, and another one goes on
when it dies. The leader reads the catalog, starts and stops runners, follows aliases in the
registry and tidies, each in a thread of its own: one that waits for something that is away holds up
none of the others.
"""

import contextlib
import fcntl
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from threading import Event, Lock, Thread

from model_server.backoff import Backoff
from model_server.catalog import AliasKey, Catalog, CatalogEntry, Contents, Key
from model_server.environments import Environments
from model_server.errors import (
    CatalogUnavailableError,
    ModelServerError,
    RegistryRefusedError,
    RegistryUnavailableError,
)
from model_server.host import ModelHost, RunnerRecord
from model_server.known import KnownCatalog
from model_server.locks import exclusive
from model_server.registry import ModelRegistry, ModelVersion
from model_server.settings import Settings

_LOG = logging.getLogger(__name__)

_LEAD_SECONDS = 1.0
_READ_SECONDS = 1.0
_RUN_SECONDS = 1.0
_FOLLOW_SECONDS = 2.0
_IDLE_SECONDS = 1.0
_TIDY_SECONDS = 3600.0
_SEEN_SECONDS = 4.0
_STOP_SECONDS = 1.0
_STARTS_AT_ONCE = 4
_STOPS_AT_ONCE = 4
_DEPLOYMENTS_AT_ONCE = 4
_QUESTIONS_AT_ONCE = 8
_DEPLOYMENTS = Backoff(first=5.0, longest=300.0)
"""Longer than for starts: nobody waits, as the old version answers."""
_DAY = 86400.0


_Work = Key | tuple[AliasKey, ModelVersion]
"""What a start or stop, or a deployment, is of."""


@dataclass(frozen=True)
class _Refused:
    """A version that an alias means in MLflow and that could not be started."""

    model: ModelVersion
    failures: int
    retry_at: float


class Keeper:
    """One worker's part in keeping the host as it shall be."""

    def __init__(
        self,
        settings: Settings,
        *,
        catalog: Catalog,
        known: KnownCatalog,
        registry: ModelRegistry,
        environments: Environments,
        host: ModelHost,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._known = known
        self._registry = registry
        self._environments = environments
        self._host = host
        self._stopping = Event()
        self._threads: list[Thread] = []
        # Each in threads of their own: what has crashed comes back during slow deployments.
        self._starts = ThreadPoolExecutor(_STARTS_AT_ONCE, thread_name_prefix="start")
        self._stops = ThreadPoolExecutor(_STOPS_AT_ONCE, thread_name_prefix="stop")
        self._deployments = ThreadPoolExecutor(_DEPLOYMENTS_AT_ONCE, thread_name_prefix="deploy")
        self._under_way: dict[_Work, Future[None]] = {}
        self._changing = Lock()
        # What the registry said about aliases, and what came of it.
        self._following = Lock()
        self._meant: dict[AliasKey, ModelVersion] = {}
        self._unwanted: set[RunnerRecord] = set()
        self._refused: dict[AliasKey, _Refused] = {}
        self._noted: dict[AliasKey, str | None] = {}
        self._told: tuple[int, float] = (-1, 0.0)
        self._troubles: dict[str, str] = {}

    def start(self) -> None:
        """Begin to lead as soon as no other worker of this host does."""
        self._run_thread("lead", self._lead)

    def stop(self) -> None:
        """Let go; starts under way end with the worker."""
        # Nobody begins anything any more, and waits with the lock for threads that need it to end.
        with self._changing:
            self._stopping.set()
        for threads in (self._starts, self._stops, self._deployments):
            threads.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + _STOP_SECONDS
        for thread in self._threads:
            # One that waits for something that is away is left to end with the process.
            thread.join(max(deadline - time.monotonic(), 0))

    def is_ready(self) -> bool:
        """Whether everything that had to run here was tried once since the service started.

        What is loaded later makes a host no less ready for all that it serves already.
        """
        if self._ready_once.exists():
            return True
        known = self._known.current()
        if known is None or not self._read_once.exists():
            return False
        records = (self._host.record(entry.model, entry.flavor) for entry in known.entries.values())
        ready = all(
            record is not None and (record.started or record.resting or record.failures)
            for record in records
        )
        if ready:
            self._ready_once.touch()
        return ready

    def forget_service(self) -> None:
        """Called by the first worker: what is left is of a service that has ended."""
        for once in (self._read_once, self._ready_once):
            once.unlink(missing_ok=True)
        self._host.forget_starts()

    def refresh(self) -> Contents:
        """Read the catalog, and act upon what it says now, in every worker of this host."""
        contents = self._known.refresh(self._catalog.contents, self._is_ready)
        self._tell_seen(contents.revision)
        return contents

    def wait_for_hosts(self, revision: int, seconds: float) -> None:
        """Wait until every host acts upon a revision; a host that does not, no longer than this."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(CatalogUnavailableError):
            while not self._catalog.is_seen_by_all(revision):
                if time.monotonic() > deadline or self._stopping.wait(0.1):
                    return

    @property
    def _read_once(self) -> Path:
        return self._settings.sockets / "known.read"

    @property
    def _ready_once(self) -> Path:
        return self._settings.sockets / "ready"

    def _lead(self) -> None:
        with (self._settings.sockets / "keeper.lock").open("ab") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if self._stopping.wait(_LEAD_SECONDS):
                        return
            loops: list[tuple[str, float, Callable[[], None]]] = [
                ("read", _READ_SECONDS, self._read),
                ("run", _RUN_SECONDS, self._run),
                ("follow", _FOLLOW_SECONDS, self._follow),
                ("tidy", _TIDY_SECONDS, self._tidy),
            ]
            if self._settings.idle_unload_seconds:
                loops.append(("idle", _IDLE_SECONDS, self._unload_idle))
            for name, seconds, function in loops:
                self._run_thread(name, partial(self._every, name, seconds, function))
            self._stopping.wait()

    def _run_thread(self, name: str, function: Callable[[], None]) -> None:
        thread = Thread(target=function, name=f"keeper-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _every(self, name: str, seconds: float, function: Callable[[], None]) -> None:
        while not self._stopping.is_set():
            try:
                function()
            except (ModelServerError, OSError) as error:
                self._warn_once(name, str(error))
            except Exception:  # noqa: BLE001  a bug with one thing must not keep all others from being kept
                _LOG.exception("the keeper failed", extra={"part": name})
            else:
                self._troubles.pop(name, None)
            self._stopping.wait(seconds)

    def _warn_once(self, part: str, reason: str) -> None:
        if self._troubles.get(part) != reason:
            self._troubles[part] = reason
            _LOG.warning("the keeper cannot go on", extra={"part": part, "reason": reason})

    def _read(self) -> None:
        try:
            known = self._known.current()
            if known is None or self._is_outdated(known):
                self.refresh()
            else:
                self._tell_seen(known.revision)
        finally:
            self._read_once.touch()

    def _is_outdated(self, known: Contents) -> bool:
        if not self._read_once.exists() or known.revision != self._catalog.revision():
            return True
        # An alias that was held over until its new version runs here.
        return any(
            alias in entry.aliases and known.aliases[name, flavor, alias] != entry.model.version
            for (name, flavor, _), entry in known.entries.items()
            for alias in entry.aliases
        )

    def _tell_seen(self, revision: int) -> None:
        told, when = self._told
        if told != revision or time.monotonic() - when > _SEEN_SECONDS:
            self._catalog.tell_seen(self._host_id, revision)
            self._told = revision, time.monotonic()

    @cached_property
    def _host_id(self) -> str:
        """A name of this host that no other host has, whatever they are called."""
        file = self._settings.state_dir / "host"
        with exclusive(file.with_suffix(".lock"), time.monotonic() + 5, "the host's name"):
            if not file.exists():
                file.write_text(secrets.token_hex(16))
            return file.read_text()

    def _run(self) -> None:
        """Start what shall run and does not; stop what runs and shall not."""
        known = self._known.current()
        if known is None:
            return
        # Before anybody asks: what another host loads a moment later does not count.
        self.is_ready()
        for entry in known.entries.values():
            if self._should_start(entry):
                self._begin(self._starts, entry.key, partial(self._start, entry))
        unwanted = {
            record
            for record in self._host.records()
            if not _is_wanted(record, known)
            and not record.is_remembered()
            and not self._host.is_changing(record.model, record.flavor)
        }
        # What was unwanted a moment ago as well: callers that had looked it up have asked by now.
        for record in unwanted & self._unwanted:
            key = record.name, record.flavor, record.version
            self._begin(self._stops, key, partial(self._stop, record))
        self._unwanted = unwanted

    def _should_start(self, entry: CatalogEntry) -> bool:
        record = self._host.record(entry.model, entry.flavor)
        if record is None:
            return True
        if record.started is not None:
            record = self._host.note_end(entry.model, entry.flavor)
        if record is None or record.started is not None or record.resting:
            return False
        return not record.is_paused

    def _begin(self, threads: ThreadPoolExecutor, key: _Work, function: Callable[[], None]) -> None:
        with self._changing:
            if key in self._under_way or self._stopping.is_set():
                return
            future = self._under_way[key] = threads.submit(function)
        # Without the lock: where it has ended by now, this is the thread that calls.
        future.add_done_callback(partial(self._finished, key))

    def _finished(self, key: _Work, future: Future[None]) -> None:
        with self._changing:
            self._under_way.pop(key, None)
        if future.cancelled() or (error := future.exception()) is None:
            return
        if isinstance(error, (ModelServerError, OSError)):
            _LOG.warning("model not started", extra={"model": str(key), "reason": str(error)})
        else:
            _LOG.error("model not started", extra={"model": str(key)}, exc_info=error)

    def _start(self, entry: CatalogEntry) -> None:
        deadline = self._deadline()
        with self._host.changing(entry.model, entry.flavor, deadline):
            if self._wanted(entry):
                self._host.start(entry.model, entry.flavor, deadline, asked=False)

    def _wanted(self, entry: CatalogEntry) -> bool:
        known = self._known.current()
        now = known.entries.get(entry.key) if known else None
        return now is not None and now.model == entry.model

    def _stop(self, record: RunnerRecord) -> None:
        deadline = self._deadline()
        with self._host.changing(record.model, record.flavor, deadline):
            known = self._known.current()
            same = self._host.record(record.model, record.flavor) is not None
            if known is not None and same and not _is_wanted(record, known):
                self._host.stop(record.model, record.flavor)
                _LOG.info(
                    "unwanted model unloaded",
                    extra={"model": str(record.model), "flavor": record.flavor},
                )

    def _follow(self) -> None:
        """Ask the registry what the aliases in use mean now, about several at once.

        What goes wrong with one of them is noted, and no matter of the others.
        """
        known = self._known.current()
        if known is None:
            return
        flavors: dict[tuple[str, str], list[str]] = {}
        for name, flavor, alias in known.aliases:
            flavors.setdefault((name, alias), []).append(flavor)
        questions = deque(
            [(name, flavor, alias) for flavor in kinds] for (name, alias), kinds in flavors.items()
        )
        troubles: list[Exception] = []
        asking = [
            Thread(target=self._ask_registry, args=[questions, troubles], daemon=True)
            for _ in range(min(_QUESTIONS_AT_ONCE, len(questions)))
        ]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        for told in (self._meant, self._refused, self._noted):
            for gone in told.keys() - known.aliases.keys():
                told.pop(gone, None)
        if troubles:
            raise troubles[0]

    def _ask_registry(self, questions: deque[list[AliasKey]], troubles: list[Exception]) -> None:
        """Ask until no question is left; the aliases of one question differ in the flavor only."""
        while not self._stopping.is_set():
            try:
                aliases = questions.popleft()
            except IndexError:
                return
            try:
                self._follow_one(aliases)
            except RegistryUnavailableError as error:
                # It would not answer the other ones either.
                questions.clear()
                troubles.append(error)
            except Exception as error:  # noqa: BLE001  told when all have been asked
                troubles.append(error)

    def _follow_one(self, aliases: list[AliasKey]) -> None:
        name, _, alias = aliases[0]
        refusal: RegistryRefusedError | None = None
        meant: ModelVersion | ModelServerError
        try:
            meant = self._registry.resolve(name, alias)
        except RegistryUnavailableError:
            raise
        except RegistryRefusedError as error:
            meant = refusal = error
        except ModelServerError as error:
            meant = error
        with self._following:
            for one in aliases:
                self._act_upon(one, meant)
        if refusal:
            raise refusal

    def _act_upon(self, alias: AliasKey, meant: ModelVersion | ModelServerError) -> None:
        known = self._known.current()
        entry = known.named(alias) if known else None
        if entry is None:
            return
        if entry.problem is None:
            # Where nothing is noted, there is nothing to take back.
            self._noted.setdefault(alias, None)
        if isinstance(meant, ModelServerError):
            self._note(alias, f"{meant} Version {entry.model.version} goes on.")
            return
        self._meant[alias] = meant
        if meant == entry.model:
            self._refused.pop(alias, None)
            self._note(alias, None)
            return
        refused = self._refused.get(alias)
        waits = refused and refused.model == meant and time.monotonic() < refused.retry_at
        if not waits:
            # Beside the deployment of another version that the alias has meant meanwhile.
            deploy = partial(self._deploy, alias, entry.model, meant)
            self._begin(self._deployments, (alias, meant), deploy)

    def _note(self, alias: AliasKey, problem: str | None) -> None:
        if alias not in self._noted or self._noted[alias] != problem:
            self._catalog.note_problem(alias, problem)
            self.refresh()
            self._noted[alias] = problem

    def _deploy(self, alias: AliasKey, old: ModelVersion, new: ModelVersion) -> None:
        """Start and warm what an alias means now beside the old one, then move the traffic."""
        deadline = self._deadline()
        name, flavor, asked_as = alias
        # Another host may have moved it already, while this one keeps to the old version.
        entry = self._catalog.contents().named(alias)
        if entry is None:
            return
        recorded = entry.model
        try:
            with (
                self._host.answering(old, flavor),
                self._host.changing(new, flavor, deadline),
            ):
                self._host.start(new, flavor, deadline, asked=True)
                if self._registry.resolve(name, asked_as) != new:
                    # Moved on, or back, while this one was loading; nobody gets to see it.
                    return
                moved = recorded != new and self._catalog.record(
                    new, flavor, asked_as=asked_as, instead_of=recorded
                )
                self.refresh()
        except (ModelServerError, OSError) as error:
            self._refuse(alias, old, new, error)
            raise
        if moved:
            _LOG.info(
                "alias moved",
                extra={
                    "model": name,
                    "flavor": flavor,
                    "alias": asked_as,
                    "from": old.version,
                    "version": new.version,
                },
            )

    def _refuse(
        self, alias: AliasKey, old: ModelVersion, new: ModelVersion, error: Exception
    ) -> None:
        """Try a version again after a pause, and say why it is not the one that answers."""
        with self._following:
            if self._meant.get(alias) != new:
                return
            before = self._refused.get(alias)
            failures = before.failures + 1 if before and before.model == new else 1
            retry_at = time.monotonic() + _DEPLOYMENTS.pause(failures)
            self._refused[alias] = _Refused(new, failures, retry_at)
            self._note(
                alias,
                f"Alias {alias[2]!r} means version {new.version} in MLflow, which cannot be "
                f"loaded; version {old.version} goes on. {error}",
            )

    def _unload_idle(self) -> None:
        self._host.unload_idle(self._settings.idle_unload_seconds)

    def _tidy(self) -> None:
        """Remove model files and environments that nobody has used for long."""
        known = self._known.current()
        if known is None:
            return
        kept = self._settings.environment_keep_days * _DAY
        # What was taken a moment ago for a start is not known as used yet.
        oldest = time.time() - max(kept, self._settings.load_timeout_seconds)
        wanted = {entry.model for entry in known.entries.values()}
        self._environments.remove_unused(self._host.environments_in_use(wanted), oldest)
        self._host.remove_unused_files({model.digest for model in wanted}, oldest)

    def _is_ready(self, entry: CatalogEntry) -> bool:
        return self._host.is_running(entry.model, entry.flavor)

    def _deadline(self) -> float:
        return time.monotonic() + self._settings.load_timeout_seconds


def _is_wanted(record: RunnerRecord, known: Contents) -> bool:
    entry = known.entries.get((record.name, record.flavor, record.version))
    return entry is not None and entry.model == record.model
