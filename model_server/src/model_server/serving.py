"""Load, ask, list and unload models: what the API does, without HTTP."""

import asyncio
import logging
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event, Thread

from model_server.catalog import Catalog, CatalogEntry
from model_server.environments import Environments
from model_server.errors import (
    CatalogUnavailableError,
    ModelNotLoadableError,
    ModelNotLoadedError,
    ModelServerError,
    RunnerEndedError,
)
from model_server.processes import ChildProcesses, Processes, serving
from model_server.registry import ModelRegistry, ModelVersion, version_number
from model_server.runner import wire
from model_server.runners import Runner, RunnerNotRunningError
from model_server.schemas import LoadedModel, ModelFlavor, ModelState
from model_server.settings import PYTHON_VERSION, Settings

_LOG = logging.getLogger(__name__)

_LOADS_AT_ONCE = 8
_RETRY_SECONDS = 2.0
_PYTHON_OF_MODEL = re.compile(r"^\s+python_version:\s*['\"]?(\d+\.\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Predicted:
    """The JSON body of an answer, and what it is about."""

    body: bytes
    version: int
    rows: int


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
        self._settings = settings
        self._catalog = catalog
        self._registry = registry
        self._environments = environments
        self._processes = processes or ChildProcesses(settings)
        self._runners: dict[tuple[str, str, int], Runner] = {}
        self._under_way: dict[tuple[str, ...], asyncio.Future[LoadedModel | None]] = {}
        self._threads = ThreadPoolExecutor(_LOADS_AT_ONCE, thread_name_prefix="load")
        self._stopping = Event()
        self._restored = Event()
        self._held = ExitStack()

    def start(self) -> None:
        """Begin to bring back, in the background, what shall be loaded."""
        self._held.enter_context(serving(self._settings))
        Thread(target=self._restore, name="restore", daemon=True).start()

    def stop(self) -> None:
        """Let go of everything; the runners end when no worker is left."""
        self._stopping.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for runner in self._runners.values():
            runner.close()
        self._registry.close()
        self._catalog.close()
        self._held.close()

    def is_ready(self) -> bool:
        """Whether this worker has tried to bring back everything that shall be loaded."""
        return self._restored.is_set()

    async def load(self, name: str, flavor: ModelFlavor, version_or_alias: str) -> LoadedModel:
        """Load what the registry means by a version or alias now."""
        loaded = await self._once(
            ("load", name, flavor, version_or_alias),
            partial(self._load, name, flavor, version_or_alias),
        )
        if loaded is None:
            raise AssertionError("a load ends with a model or an error")
        return loaded

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
        version = version_number(version_or_alias)
        if version is None:
            version = await asyncio.to_thread(
                self._catalog.version_of, name, flavor, version_or_alias
            )
        if version is not None:
            try:
                return await self._ask(name, flavor, version, body, kind)
            except RunnerNotRunningError:
                revived = await self._once(
                    ("revive", name, flavor, str(version)),
                    partial(self._revive, name, flavor, version),
                )
                if revived is None:
                    version = None
        if version is None:
            version = (await self.load(name, flavor, version_or_alias)).version
        try:
            return await self._ask(name, flavor, version, body, kind)
        except RunnerNotRunningError:
            raise RunnerEndedError(
                f"Model {name!r} version {version} was unloaded, or ended, before it was asked."
            ) from None

    async def unload(self, name: str, flavor: ModelFlavor, version_or_alias: str) -> LoadedModel:
        """Unload for every worker: the process is gone when this returns."""
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, self._unload, name, flavor, version_or_alias
        )

    async def loaded_models(self) -> list[LoadedModel]:
        """All that is, or shall be, loaded."""
        return await asyncio.to_thread(
            lambda: [self._seen(entry) for entry in self._catalog.entries()]
        )

    async def _ask(
        self, name: str, flavor: str, version: int, body: bytes, kind: bytes
    ) -> Predicted:
        key = (name, flavor, version)
        runner = self._runners.get(key) or self._runner(*key)
        try:
            self._runners[key] = runner
            rows, answer = await runner.predict(body, kind)
        except (RunnerNotRunningError, RunnerEndedError):
            if self._runners.get(key) is runner:
                del self._runners[key]
                runner.close()
            raise
        return Predicted(answer, version, rows)

    async def _once(
        self, key: tuple[str, ...], function: Callable[[], LoadedModel | None]
    ) -> LoadedModel | None:
        """Share one run of a slow function among all who want it at the same time."""
        future = self._under_way.get(key)
        if future is None:
            future = asyncio.get_running_loop().run_in_executor(self._threads, function)
            self._under_way[key] = future
            future.add_done_callback(partial(self._forget, key))
        return await asyncio.shield(future)

    def _forget(self, key: tuple[str, ...], future: asyncio.Future[LoadedModel | None]) -> None:
        del self._under_way[key]
        if not future.cancelled():
            # Looked at, even when every caller has gone.
            future.exception()

    def _load(self, name: str, flavor: str, version_or_alias: str) -> LoadedModel:
        deadline = self._deadline()
        model = self._registry.resolve(name, version_or_alias)
        runner = self._runner(name, flavor, model.version)
        with runner.changing(deadline):
            known = self._catalog.find(name, flavor, model.version)
            if known is None or known.model != model:
                # Not loaded, or loaded from a version that was deleted and made anew.
                runner.stop()
            self._run(runner, model, deadline)
            try:
                self._catalog.record(
                    model,
                    flavor,
                    asked_as=version_or_alias,
                    alias=version_number(version_or_alias) is None,
                )
                entry = self._catalog.find(name, flavor, model.version)
            except CatalogUnavailableError:
                if known is None:
                    runner.stop()
                raise
        if entry is None:
            raise ModelNotLoadedError(f"{model} was unloaded at the same moment.")
        _LOG.info("model loaded", extra={"model": str(model), "flavor": flavor})
        return self._seen(entry, changing=False)

    def _revive(self, name: str, flavor: str, version: int) -> LoadedModel | None:
        """Start again what shall be loaded; None when it shall not be any more."""
        deadline = self._deadline()
        runner = self._runner(name, flavor, version)
        with runner.changing(deadline):
            entry = self._catalog.find(name, flavor, version)
            if entry is None:
                return None
            try:
                self._run(runner, entry.model, deadline)
            except ModelServerError as error:
                self._catalog.note_problem(entry, str(error))
                raise
            if entry.problem is not None:
                self._catalog.note_problem(entry, None)
        return self._seen(replace(entry, problem=None), changing=False)

    def _run(self, runner: Runner, model: ModelVersion, deadline: float) -> None:
        if runner.is_running():
            return
        files = self._files(model)
        if not files.exists():
            self._registry.fetch(model, files)
        python = self._environments.python_for(files, deadline)
        try:
            runner.start(python, files, deadline)
        except ModelNotLoadableError as error:
            saved = _saved_python(files)
            if saved in {None, PYTHON_VERSION}:
                raise
            raise ModelNotLoadableError(
                f"{error} It was stored by Python {saved} and this server has {PYTHON_VERSION}, "
                "which may be why."
            ) from error

    def _unload(self, name: str, flavor: ModelFlavor, version_or_alias: str) -> LoadedModel:
        deadline = self._deadline()
        missing = f"Model {name!r} is not loaded as {flavor} by {version_or_alias!r}."
        version = version_number(version_or_alias)
        if version is None:
            version = self._catalog.version_of(name, flavor, version_or_alias)
        if version is None:
            raise ModelNotLoadedError(missing)
        runner = self._runner(name, flavor, version)
        with runner.changing(deadline):
            entry = self._catalog.find(name, flavor, version)
            if entry is None:
                raise ModelNotLoadedError(missing)
            runner.stop()
            self._catalog.remove(name, flavor, version)
            if all(other.model != entry.model for other in self._catalog.entries()):
                shutil.rmtree(self._files(entry.model), ignore_errors=True)
        _LOG.info("model unloaded", extra={"model": str(entry.model), "flavor": flavor})
        return self._seen(entry, state="unloaded")

    def _restore(self) -> None:
        while not self._stopping.is_set():
            try:
                entries = self._catalog.entries()
                break
            except CatalogUnavailableError as error:
                _LOG.warning("cannot restore models yet", extra={"reason": str(error)})
                self._stopping.wait(_RETRY_SECONDS)
        else:
            return
        for entry in entries:
            if self._stopping.is_set():
                return
            try:
                self._revive(entry.model.name, entry.flavor, entry.model.version)
            except ModelServerError as error:
                _LOG.warning(
                    "model not restored",
                    extra={
                        "model": str(entry.model),
                        "flavor": entry.flavor,
                        "reason": str(error),
                    },
                )
            except Exception:  # noqa: BLE001  a bug with one model must not keep others away
                _LOG.exception("model not restored", extra={"model": str(entry.model)})
        self._restored.set()

    def _seen(
        self, entry: CatalogEntry, *, changing: bool | None = None, state: ModelState | None = None
    ) -> LoadedModel:
        """An entry of the catalog with what its process is doing."""
        runner = self._runner(entry.model.name, entry.flavor, entry.model.version)
        running = state is None and runner.is_running()
        if state is None:
            if running:
                state = "ready"
            elif runner.is_changing() if changing is None else changing:
                state = "loading"
            else:
                state = "failed" if entry.problem else "stopped"
        return LoadedModel(
            model_name=entry.model.name,
            model_flavor=entry.flavor,
            model_version_or_alias=entry.asked_as,
            version=entry.model.version,
            aliases=entry.aliases,
            state=state,
            since=entry.since,
            memory_bytes=runner.memory() if running else None,
            problem=entry.problem if state == "failed" else None,
        )

    def _runner(self, name: str, flavor: str, version: int) -> Runner:
        return Runner(self._settings, self._processes, name, flavor, version)

    def _files(self, model: ModelVersion) -> Path:
        return self._settings.state_dir / "models" / model.digest

    def _deadline(self) -> float:
        return time.monotonic() + self._settings.load_timeout_seconds


def _saved_python(files: Path) -> str | None:
    try:
        found = _PYTHON_OF_MODEL.search((files / "MLmodel").read_text())
    except (OSError, UnicodeDecodeError):
        return None
    return found.group(1) if found else None
