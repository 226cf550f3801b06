"""Load, ask, list and unload models: what the API does, without HTTP."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from model_server import metrics
from model_server.catalog import Catalog, CatalogEntry
from model_server.environments import Environments
from model_server.errors import (
    CatalogUnavailableError,
    DeadlineExceededError,
    ModelNotLoadedError,
    ModelNotReadyError,
    ModelServerError,
    RunnerEndedError,
    RunnerHangsError,
)
from model_server.host import ModelHost, RunnerRecord, being_a_worker
from model_server.keeping import Keeper
from model_server.known import KnownCatalog
from model_server.processes import ChildProcesses, Processes, serving
from model_server.registry import ModelRegistry, ModelVersion, version_number
from model_server.runner import wire
from model_server.runners import Runner, RunnerNotRunningError
from model_server.schemas import LoadedModel, ModelFlavor, ModelState
from model_server.settings import Settings

_LOG = logging.getLogger(__name__)

_AT_ONCE = {"resolve": 8, "load": 8, "revive": 8, "unload": 8, "list": 8, "end": 4}
"""How many of each kind of work, in threads of their own: none waits for a slower kind."""
_TOUCH_SECONDS = 1.0
_HOSTS_SECONDS = 5.0
_END_SECONDS = 0.3
_TRIES = 3


@dataclass(frozen=True)
class Predicted:
    """The JSON for the caller, and what it took to make it."""

    body: bytes
    version: int
    rows: int
    call_rows: int
    """Of the model's call, which other requests may have been part of; 0 where one of them tells.
    """


class _Handle:
    """This worker's connections to one runner, which tells the host while they are used."""

    def __init__(self, runner: Runner, touch: Callable[..., None]) -> None:
        self.runner = runner
        self._touch = touch
        self._told = 0.0
        self._under_way = 0
        self._used = False
        self._timer: asyncio.TimerHandle | None = None

    async def predict(self, body: bytes, kind: bytes) -> tuple[int, int, bytes]:
        """Ask the runner; until it answers it counts as used."""
        self._under_way += 1
        self.note_use()
        try:
            return await self.runner.predict(body, kind)
        finally:
            self._under_way -= 1

    def note_use(self) -> None:
        """Tell of a use now, and of those that follow each second at most."""
        self._used = True
        if self._timer is None:
            self._tell()

    def close(self) -> None:
        """Give up the connections when the last answer has come."""
        self._used = False
        self.runner.close()

    def _tell(self) -> None:
        self._timer = None
        if self._used:
            answered = self.runner.answered()
            self._touch(answered=answered if answered > self._told else None)
            self._told = answered
            # What is under way now is told of after its end once more.
            self._used = self._under_way > 0
            self._timer = asyncio.get_running_loop().call_later(_TOUCH_SECONDS, self._tell)


class ModelServing:
    """One worker's view of the models; the truth is in the catalog and in the processes."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        registry: ModelRegistry,
        environments: Environments,
        processes: Processes | None = None,
    ) -> None:
        processes = processes or ChildProcesses(settings)
        self._settings = settings
        self._catalog = catalog
        self._registry = registry
        self._known = KnownCatalog(settings.state_dir / "known.json", settings.sockets)
        self._host = ModelHost(settings, processes, registry, environments)
        self._keeper = Keeper(
            settings,
            catalog=catalog,
            known=self._known,
            registry=registry,
            environments=environments,
            host=self._host,
        )
        self._handles: dict[tuple[ModelVersion, str], _Handle] = {}
        self._under_way: dict[tuple[str, ...], asyncio.Future[Any]] = {}
        self._threads = {
            kind: ThreadPoolExecutor(number, thread_name_prefix=kind)
            for kind, number in _AT_ONCE.items()
        }
        self._held = ExitStack()

    def start(self) -> None:
        """Begin to bring back, in the background, what shall be loaded."""
        self._held.enter_context(serving(self._settings))
        self._held.enter_context(
            being_a_worker(self._settings.sockets, self._keeper.forget_service)
        )
        self._keeper.start()

    def stop(self) -> None:
        """Let go of everything; the runners end when no worker is left."""
        self._keeper.stop()
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)
        for handle in self._handles.values():
            handle.close()
        self._registry.close()
        self._catalog.close()
        self._held.close()

    def is_ready(self) -> bool:
        """Whether everything that shall be loaded was tried to be brought back."""
        return self._keeper.is_ready()

    async def load(self, name: str, flavor: ModelFlavor, version_or_alias: str) -> LoadedModel:
        """Load what the registry means by a version or alias now, however often that failed."""
        entry = await self._load_once(name, flavor, version_or_alias, insist=True)
        return await asyncio.to_thread(self._seen, entry)

    async def predict(
        self,
        name: str,
        flavor: ModelFlavor,
        version_or_alias: str,
        body: bytes,
        *,
        kind: bytes = wire.PREDICT,
    ) -> Predicted:
        """Answer a prediction request, loading the model first where it is not."""
        for _ in range(_TRIES):
            entry = self._find(name, flavor, version_or_alias)
            if entry is None:
                entry = await self._load_once(name, flavor, version_or_alias, insist=False)
            handle = self._handle(entry)
            if not handle.runner.is_connected() and not self._host.is_started(
                entry.model, entry.flavor
            ):
                await self._revive(entry)
            try:
                rows, call_rows, answer = await handle.predict(body, kind)
            except RunnerNotRunningError:
                await self._note_end(entry)
                await self._revive(entry)
            except RunnerEndedError as error:
                record = await self._note_end(entry)
                crashed = record is None or not record.resting
                if crashed and self._find(name, flavor, version_or_alias) == entry:
                    error.retry_after = record.pause_left() if record else None
                    raise
                # It ended for want of use or of memory, or because something else is meant now.
            except RunnerHangsError as error:
                self._end_silent(entry, error)
                raise
            else:
                return Predicted(answer, entry.model.version, rows, call_rows)
        raise RunnerEndedError(f"Model {name!r} was changed again and again while it was asked.")

    async def unload(self, name: str, flavor: ModelFlavor, version_or_alias: str) -> LoadedModel:
        """Unload for every worker of every host: the process is gone here when this returns."""
        return await asyncio.get_running_loop().run_in_executor(
            self._threads["unload"], self._unload, name, flavor, version_or_alias
        )

    async def loaded_models(self) -> list[LoadedModel]:
        """All that is, or shall be, loaded."""
        # Never shared: a list that was begun before a change does not tell of it.
        return await asyncio.get_running_loop().run_in_executor(self._threads["list"], self._list)

    async def known_models(self) -> list[LoadedModel] | None:
        """All that is, or shall be, loaded as far as this host knows; asks no database.

        None where it never knew.
        """
        known = self._known.current()
        if known is None:
            return None
        return await asyncio.to_thread(
            lambda: [self._seen(entry) for entry in known.entries.values()]
        )

    async def describe(
        self, name: str, flavor: ModelFlavor, version_or_alias: str
    ) -> tuple[LoadedModel, dict[str, Any]]:
        """What a loaded model takes and gives; loads nothing, but wakes what rests."""
        entry = self._find(name, flavor, version_or_alias)
        if entry is None:
            raise _not_loaded(name, flavor, version_or_alias)
        handle = self._handle(entry)
        runner = handle.runner
        not_ready = ModelNotReadyError(f"{_capital(entry)} does not run at this moment.")
        if not runner.is_connected() and not self._host.is_started(entry.model, entry.flavor):
            record = self._host.record(entry.model, entry.flavor)
            if record is None or not record.resting:
                raise not_ready
            # Callers who wait until it is ready before they ask would wait for ever.
            await self._revive(entry)
        try:
            handle.note_use()
            description = await runner.describe()
        except RunnerNotRunningError:
            raise not_ready from None
        except RunnerHangsError as error:
            self._end_silent(entry, error)
            raise
        return await asyncio.to_thread(self._seen, entry), description

    def versions(self, name: str, flavor: ModelFlavor) -> list[int]:
        """The versions of a model that are, or shall be, loaded; asks nobody."""
        known = self._known.current()
        entries = known.entries if known else {}
        return sorted(version for its, kind, version in entries if (its, kind) == (name, flavor))

    def highest(self, name: str, flavor: ModelFlavor) -> int | None:
        """The highest version of a model that answers here, else that shall be loaded, if any."""
        known = self._known.current()
        found = {
            version: entry
            for (its, kind, version), entry in (known.entries if known else {}).items()
            if (its, kind) == (name, flavor)
        }
        downwards = sorted(found, reverse=True)
        return next(
            (version for version in downwards if self._answers(found[version])),
            downwards[0] if downwards else None,
        )

    def _answers(self, entry: CatalogEntry) -> bool:
        """Whether it runs here, or rests until it is asked."""
        if self._handle(entry).runner.is_connected():
            return True
        record = self._host.record(entry.model, entry.flavor)
        return record is not None and (record.started is not None or record.resting)

    def _find(self, name: str, flavor: str, version_or_alias: str) -> CatalogEntry | None:
        known = self._known.current()
        if known is None:
            return None
        version = version_number(version_or_alias)
        if version is None:
            return known.named((name, flavor, version_or_alias))
        return known.entries.get((name, flavor, version))

    def _handle(self, entry: CatalogEntry) -> _Handle:
        key = entry.model, entry.flavor
        handle = self._handles.get(key)
        if handle is None:
            self._let_go()
            touch = partial(self._host.touch, *key)
            handle = self._handles[key] = _Handle(self._host.runner(*key), touch)
        return handle

    def _let_go(self) -> None:
        """Close the connections to what is not loaded any more."""
        known = self._known.current()
        wanted = (
            {(entry.model, entry.flavor) for entry in known.entries.values()} if known else set()
        )
        for key in self._handles.keys() - wanted:
            self._handles.pop(key).close()

    async def _note_end(self, entry: CatalogEntry) -> RunnerRecord | None:
        record: RunnerRecord | None = await self._once(
            ("end", "note", *map(str, entry.key)),
            partial(self._host.note_end, entry.model, entry.flavor, _END_SECONDS),
        )
        return record

    def _end_silent(self, entry: CatalogEntry, error: RunnerHangsError) -> None:
        """Have a process ended that does not answer; nobody waits for that."""

        def end() -> None:
            try:
                self._host.end_silent(entry.model, entry.flavor, error.seconds)
            except (ModelServerError, OSError) as trouble:
                extra = {"model": str(entry.model), "reason": str(trouble)}
                _LOG.warning("silent runner not ended", extra=extra)

        self._begin(("unload", "silent", *map(str, entry.key)), end)

    async def _revive(self, entry: CatalogEntry) -> None:
        """Wait a while for what shall run here and does not, unless it has failed."""
        await self._once(
            ("end", "refuse", *map(str, entry.key)), partial(self._refuse_failed, entry)
        )
        try:
            async with asyncio.timeout(self._settings.startup_seconds):
                await self._once(
                    ("revive", *map(str, entry.key), entry.model.digest),
                    partial(self._start, entry),
                )
        except TimeoutError:
            raise ModelNotReadyError(f"{_capital(entry)} is still being started.") from None

    async def _load_once(
        self, name: str, flavor: ModelFlavor, version_or_alias: str, *, insist: bool
    ) -> CatalogEntry:
        """Load it; unless one insists, what has failed is left alone for a while."""
        # In threads of its own: whoever asks for what is not there waits for no load.
        model: ModelVersion = await self._once(
            ("resolve", name, version_or_alias), partial(self._resolve, name, version_or_alias)
        )
        if not insist:
            self._host.refuse_failed(model, flavor)
        entry: CatalogEntry = await self._once(
            ("load", name, flavor, version_or_alias, model.digest, str(insist)),
            partial(self._load, model, flavor, version_or_alias, insist=insist),
        )
        return entry

    async def _once(self, key: tuple[str, ...], function: Callable[[], Any]) -> Any:
        """Share one run of a slow function among all who want it at the same time.

        The key begins with the kind of work.
        """
        return await asyncio.shield(self._begin(key, function))

    def _begin(self, key: tuple[str, ...], function: Callable[[], Any]) -> asyncio.Future[Any]:
        future = self._under_way.get(key)
        if future is None:
            future = asyncio.get_running_loop().run_in_executor(self._threads[key[0]], function)
            self._under_way[key] = future
            future.add_done_callback(partial(self._forget, key))
        return future

    def _forget(self, key: tuple[str, ...], future: asyncio.Future[Any]) -> None:
        del self._under_way[key]
        if not future.cancelled():
            # Looked at, even when every caller has gone.
            future.exception()

    def _resolve(self, name: str, version_or_alias: str) -> ModelVersion:
        try:
            return self._registry.resolve(name, version_or_alias)
        except ModelServerError:
            with metrics.counted_load():
                raise

    def _load(
        self, model: ModelVersion, flavor: str, version_or_alias: str, *, insist: bool
    ) -> CatalogEntry:
        with metrics.counted_load():
            return self._load_uncounted(model, flavor, version_or_alias, insist=insist)

    def _load_uncounted(
        self, model: ModelVersion, flavor: str, version_or_alias: str, *, insist: bool
    ) -> CatalogEntry:
        deadline = time.monotonic() + self._settings.load_timeout_seconds
        # Before the long way: without the catalog, it would be for nothing.
        known = self._catalog.contents().entries.get((model.name, flavor, model.version))
        with self._host.changing(model, flavor, deadline):
            if not insist:
                # While this one waited, another worker may have tried it.
                self._host.refuse_failed(model, flavor)
            self._host.start(model, flavor, deadline, asked=True)
            try:
                self._catalog.record(model, flavor, asked_as=version_or_alias)
                contents = self._keeper.refresh()
            except (CatalogUnavailableError, OSError):
                if known is None:
                    self._host.stop(model, flavor)
                raise
        entry = contents.entries.get((model.name, flavor, model.version))
        if entry is None:
            raise ModelNotLoadedError(f"{_capital(model)} was unloaded at the same moment.")
        _LOG.info("model loaded", extra={"model": str(model), "flavor": flavor})
        return entry

    def _start(self, entry: CatalogEntry) -> None:
        """Start what shall run here, for somebody who waits for it."""
        self._refuse_failed(entry)
        deadline = time.monotonic() + self._settings.load_timeout_seconds
        with self._host.changing(entry.model, entry.flavor, deadline):
            self._refuse_failed(entry)
            known = self._known.current()
            now = known.entries.get(entry.key) if known else None
            if now is not None and now.model == entry.model:
                self._host.start(entry.model, entry.flavor, deadline, asked=True)

    def _refuse_failed(self, entry: CatalogEntry) -> None:
        """Nobody waits for what has failed: the keeper tries it again, with pauses."""
        record = self._host.note_end(entry.model, entry.flavor)
        if record is not None and record.has_failed():
            error = ModelNotReadyError(f"{_capital(entry)} does not run for now. {record.problem}")
            error.retry_after = record.pause_left()
            raise error

    def _unload(self, name: str, flavor: ModelFlavor, version_or_alias: str) -> LoadedModel:
        deadline = time.monotonic() + self._settings.startup_seconds
        contents = self._catalog.contents()
        version = version_number(version_or_alias)
        if version is None:
            version = contents.aliases.get((name, flavor, version_or_alias))
        entry = contents.entries.get((name, flavor, version)) if version is not None else None
        if entry is None:
            raise _not_loaded(name, flavor, version_or_alias)
        revision = self._catalog.remove(entry.key)
        self._keeper.refresh()
        problem = None
        try:
            with self._host.changing(entry.model, flavor, deadline):
                if self._catalog_has_it_again(entry):
                    raise ModelNotLoadedError(
                        f"{_capital(entry)} was loaded again at the same moment."
                    )
                self._host.stop(entry.model, flavor)
        except DeadlineExceededError:
            # A start under way, which may take long; then the keeper ends what nobody wants.
            problem = "It is being started at this moment; its process ends when that is done."
        self._keeper.wait_for_hosts(revision, _HOSTS_SECONDS)
        _LOG.info("model unloaded", extra={"model": str(entry.model), "flavor": flavor})
        unloaded = self._seen(entry, state="unloaded")
        return unloaded.model_copy(update={"problem": problem}) if problem else unloaded

    def _catalog_has_it_again(self, entry: CatalogEntry) -> bool:
        known = self._known.current()
        return known is not None and entry.key in known.entries

    def _list(self) -> list[LoadedModel]:
        try:
            entries = self._keeper.refresh().entries
        except (ModelServerError, OSError):
            known = self._known.current()
            if known is None:
                raise
            entries = known.entries
        return [self._seen(entry) for entry in entries.values()]

    def _seen(self, entry: CatalogEntry, state: ModelState | None = None) -> LoadedModel:
        """An entry of the catalog with what its process does on this host."""
        record = None if state else self._host.record(entry.model, entry.flavor)
        memory = None
        if record is not None and record.started is not None:
            memory = self._host.memory(entry.model, entry.flavor)
        problem = entry.problem
        if state is None:
            if memory is not None:
                state = "ready"
            elif record is not None and record.failures:
                state = "failed"
                problem = record.problem or problem
            elif record is not None and record.resting:
                state = "stopped"
                problem = record.problem or problem
            else:
                state = "loading"
        return LoadedModel(
            model_name=entry.model.name,
            model_flavor=entry.flavor,
            model_version_or_alias=entry.asked_as,
            version=entry.model.version,
            aliases=entry.aliases,
            state=state,
            since=entry.since,
            memory_bytes=memory,
            problem=problem,
            runner=self._host.runner(entry.model, entry.flavor).name,
        )


def _not_loaded(name: str, flavor: str, version_or_alias: str) -> ModelNotLoadedError:
    return ModelNotLoadedError(f"Model {name!r} is not loaded as {flavor} by {version_or_alias!r}.")


def _capital(what: CatalogEntry | ModelVersion) -> str:
    text = str(what)
    return text[:1].upper() + text[1:]
