"""What runs on this host: start, watch and stop the runners of model versions.

Whatever a worker learns about a runner it writes into the runner's record, a small file beside the
socket, so that all workers of the host act alike. Records change under the lock of their model.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec

from model_server import metrics
from model_server.backoff import Backoff
from model_server.environments import Environments
from model_server.errors import (
    DeadlineExceededError,
    MemoryBudgetError,
    ModelNotLoadableError,
    ModelServerError,
)
from model_server.locks import exclusive, is_held, is_shared, shared
from model_server.processes import Processes
from model_server.registry import ModelRegistry, ModelVersion
from model_server.runners import Runner
from model_server.settings import PYTHON_VERSION, Settings

_LOG = logging.getLogger(__name__)

_MIB = 2**20
_STARTS = Backoff(first=1.0, longest=60.0)
"""A start costs this host's time only, and callers wait for it."""
_STABLE_SECONDS = 60.0
_REASON_SECONDS = 0.2
_PAUSE_SECONDS = 0.02
_PYTHON_OF_MODEL = re.compile(r"^\s+python_version:\s*['\"]?(\d+\.\d+)", re.MULTILINE)


@dataclass(frozen=True)
class RunnerRecord:
    """What the workers of this host know about one runner; times are seconds of the epoch."""

    name: str
    version: int
    digest: str
    flavor: str
    started: float | None = None
    """Since when it runs; None when it does not."""
    environment: str | None = None
    memory: int | None = None
    """Bytes that it used when it was started last."""
    resting: bool = False
    """Unloaded for want of use or of memory: the next request brings it back, nobody else."""
    failures: int = 0
    retry_at: float = 0.0
    problem: str | None = None

    @property
    def model(self) -> ModelVersion:
        """The model version that the runner is of."""
        return ModelVersion(self.name, self.version, self.digest)

    @property
    def model_and_flavor(self) -> tuple[ModelVersion, str]:
        """What one host runs once at most."""
        return self.model, self.flavor


class ModelHost:
    """The runners of one host, as each of its workers sees them."""

    def __init__(
        self,
        settings: Settings,
        processes: Processes,
        registry: ModelRegistry,
        environments: Environments,
    ) -> None:
        self._settings = settings
        self._processes = processes
        self._registry = registry
        self._environments = environments
        self._folder = settings.sockets

    def runner(self, model: ModelVersion, flavor: str) -> Runner:
        """The runner of a model version, whether it runs or not."""
        return Runner(self._settings, self._processes, model.name, flavor, model.version)

    def changing(
        self, model: ModelVersion, flavor: str, deadline: float
    ) -> contextlib.AbstractContextManager[None]:
        """The lock to hold while a model version is started or stopped on this host."""
        return exclusive(self._path(model, flavor, "lock"), deadline, f"{model} as {flavor}")

    def is_changing(self, model: ModelVersion, flavor: str) -> bool:
        """Whether some worker is starting or stopping it."""
        return is_held(self._path(model, flavor, "lock"))

    def answering(
        self, model: ModelVersion, flavor: str
    ) -> contextlib.AbstractContextManager[None]:
        """Keep a model version from making room for others, as it answers for one to come."""
        return shared(self._path(model, flavor, "answering"))

    def is_running(self, model: ModelVersion, flavor: str) -> bool:
        """Whether it is loaded and its process lives."""
        record = self.record(model, flavor)
        return record is not None and record.started is not None and self._lives(record)

    def is_started(self, model: ModelVersion, flavor: str) -> bool:
        """Whether it was loaded, as far as anybody knows; its socket is there before it is."""
        record = self.record(model, flavor)
        return record is not None and record.started is not None

    def record(self, model: ModelVersion, flavor: str) -> RunnerRecord | None:
        """What is known about a runner; None if it was never started here."""
        record = _read(self._path(model, flavor, "json"))
        # A version that was deleted and made anew has the old one's number, and its runner's name.
        return record if record is not None and record.model == model else None

    def records(self) -> list[RunnerRecord]:
        """What is known about all runners."""
        found = (_read(path) for path in sorted(self._folder.glob("*.json")))
        return [record for record in found if record is not None]

    def memory(self, model: ModelVersion, flavor: str) -> int | None:
        """Bytes that a running runner uses."""
        return self.runner(model, flavor).memory()

    def touch(self, model: ModelVersion, flavor: str) -> None:
        """Note that somebody uses it now."""
        used = self._path(model, flavor, "used")
        with contextlib.suppress(OSError):
            used.touch()

    def last_used(self, model: ModelVersion, flavor: str) -> float:
        """When somebody used it last, in seconds of the epoch."""
        try:
            return self._path(model, flavor, "used").stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def start(self, model: ModelVersion, flavor: str, deadline: float, *, asked: bool) -> None:
        """Have it running: fetch its files, build its environment, start and warm its process.

        Needs the lock. With `asked`, somebody waits for this model now, and others may have to
        go for it where the memory budget says so.
        """
        record = self.record(model, flavor)
        if record is None:
            self.stop(model, flavor)
            record = RunnerRecord(model.name, model.version, model.digest, flavor)
        elif record.started is not None and self._lives(record):
            return
        before, record = record, replace(record, started=None)
        try:
            # Nobody takes what is being started for what ran before.
            self._write(record)
            self._make_room(record, others_may_go=asked)
            environment = self._start(model, flavor, deadline)
            self.touch(model, flavor)
            record = replace(
                record,
                started=time.time(),
                environment=str(environment),
                memory=self.memory(model, flavor),
                resting=False,
                retry_at=0.0,
                problem=None,
            )
            self._write(record)
            self._make_room(record, others_may_go=asked)
        except Exception as error:
            # The reason is told and the pause kept, also where nothing can be ended now.
            with contextlib.suppress(ModelServerError, OSError):
                self.runner(model, flavor).stop()
            expected = isinstance(error, (ModelServerError, OSError))
            problem = str(error) if expected else f"The model server failed: {error!r}."
            record = _failed(replace(record, started=before.started), problem)
            if isinstance(error, MemoryBudgetError):
                # It would not fit any better in a minute; whoever asks for it tries again.
                record = replace(record, failures=0, resting=True)
            with contextlib.suppress(OSError):
                self._write(record)
            raise

    def stop(self, model: ModelVersion, flavor: str, *, resting: bool = False) -> None:
        """End its process, answers under way first. Needs the lock."""
        self.runner(model, flavor).stop()
        record = self.record(model, flavor)
        if resting and record is not None:
            self._write(replace(record, started=None, resting=True, failures=0, retry_at=0.0))
            return
        for kind in ("json", "used"):
            self._path(model, flavor, kind).unlink(missing_ok=True)

    def note_end(
        self, model: ModelVersion, flavor: str, patience: float = 0.0
    ) -> RunnerRecord | None:
        """Note that a process which shall run does not, if so; the record after that.

        Needs no lock: while somebody else changes the runner, nothing is noted. Whoever saw its
        socket close has the `patience` (in seconds) to see the process end.
        """
        deadline = time.monotonic() + patience
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.changing(model, flavor, deadline))
            except DeadlineExceededError:
                return self.record(model, flavor)
            record = self.record(model, flavor)
            if record is None or record.started is None:
                return record
            while self._lives(record):
                if time.monotonic() >= deadline:
                    return record
                time.sleep(_PAUSE_SECONDS)
            reason = self._reason(model, flavor)
            record = _failed(record, f"The process of {model} as {flavor} ended ({reason}).")
            self._write(record)
        metrics.count_crash()
        _LOG.warning(
            "runner crashed",
            extra={
                "model": str(model),
                "flavor": flavor,
                "reason": reason,
                "failures": record.failures,
            },
        )
        return record

    def forget_starts(self) -> None:
        """Begin anew: what ended with the service that was here before has not crashed."""
        for record in self.records():
            # While workers are replaced, there may be none for a moment; the runners go on.
            started = record.started if self._lives(record) else None
            self._write(replace(record, started=started, failures=0, retry_at=0.0, problem=None))

    def unload_idle(self, seconds: float) -> None:
        """Rest what nobody has used for so long."""
        for record in self.records():
            if record.started is None or not self._is_idle(record, seconds):
                continue
            # Whoever changes it now uses it; it is not waited for.
            with (
                contextlib.suppress(DeadlineExceededError),
                self.changing(record.model, record.flavor, 0.0),
            ):
                if self._is_idle(record, seconds):
                    self.stop(record.model, record.flavor, resting=True)
                    _LOG.info(
                        "idle model unloaded",
                        extra={"model": str(record.model), "flavor": record.flavor},
                    )

    def files(self, model: ModelVersion) -> Path:
        """Where the model's files lie."""
        return self._settings.state_dir / "models" / model.digest

    def remove_unused_files(self, wanted: set[str], oldest: float) -> None:
        """Remove models' files used last before `oldest` (of the epoch), but none of `wanted`."""
        folder = self._settings.state_dir / "models"
        for files in folder.iterdir() if folder.exists() else []:
            digest = files.name.partition(".")[0]
            if not files.is_dir() or digest in wanted:
                continue
            lock = (folder / digest).with_suffix(".lock")
            # Whoever takes them at this moment uses them.
            with (
                contextlib.suppress(DeadlineExceededError),
                exclusive(lock, 0.0, "the model's files"),
            ):
                if files.stat().st_mtime < oldest:
                    # Under another name first: half of a model is never used.
                    stale = Path(tempfile.mkdtemp(prefix=f"{digest}.partial-", dir=folder))
                    files.rename(stale)
                    shutil.rmtree(stale, ignore_errors=True)

    def environments_in_use(self) -> set[Path]:
        """The environments of all runners that run, or may any moment."""
        return {Path(record.environment) for record in self.records() if record.environment}

    def _is_idle(self, record: RunnerRecord, seconds: float) -> bool:
        return time.time() - self.last_used(record.model, record.flavor) > seconds

    def _lives(self, record: RunnerRecord) -> bool:
        return self._processes.is_running(self.runner(record.model, record.flavor).name)

    def _start(self, model: ModelVersion, flavor: str, deadline: float) -> Path:
        files = self.files(model)
        with exclusive(files.with_suffix(".lock"), deadline, f"the files of {model}"):
            if not files.exists():
                self._registry.fetch(model, files)
            # Its time tells when it was used last.
            os.utime(files)
        python = self._environments.python_for(files, deadline)
        try:
            self.runner(model, flavor).start(python, files, deadline)
        except ModelNotLoadableError as error:
            saved = _saved_python(files)
            if saved in {None, PYTHON_VERSION}:
                raise
            raise ModelNotLoadableError(
                f"{error} It was stored by Python {saved} and this server has {PYTHON_VERSION}, "
                "which may be why."
            ) from error
        return python.parents[1]

    def _make_room(self, record: RunnerRecord, *, others_may_go: bool) -> None:
        """Keep the memory budget, now that a runner is there or, by its last size, will be."""
        budget = self._settings.memory_budget
        if not budget or not record.memory:
            return
        others = [
            other
            for other in self.records()
            if other.started is not None and other.model_and_flavor != record.model_and_flavor
        ]
        sizes = {other: self.memory(other.model, other.flavor) or 0 for other in others}
        if others_may_go and self._settings.memory_policy == "unload_least_recent":
            others.sort(key=lambda other: self.last_used(other.model, other.flavor))
            while others and record.memory <= budget < record.memory + sum(sizes.values()):
                other = others.pop(0)
                if is_shared(self._path(other.model, other.flavor, "answering")):
                    continue
                if self._rest(other):
                    del sizes[other]
        free = max(budget - sum(sizes.values()), 0)
        if record.memory > free:
            raise MemoryBudgetError(
                f"The memory for models, {budget // _MIB} MiB, has {free // _MIB} MiB left, and "
                f"{record.model} as {record.flavor} needs {record.memory // _MIB}; unload others."
            )

    def _rest(self, record: RunnerRecord) -> bool:
        try:
            # Whoever is being changed now is not waited for: two starts could wait for each other.
            with self.changing(record.model, record.flavor, 0.0):
                self.stop(record.model, record.flavor, resting=True)
        except DeadlineExceededError:
            return False
        _LOG.info(
            "model unloaded to make room",
            extra={"model": str(record.model), "flavor": record.flavor},
        )
        return True

    def _reason(self, model: ModelVersion, flavor: str) -> str:
        """Why its process ended; whoever started it may take a moment to see that."""
        patience = time.monotonic() + _REASON_SECONDS
        while (reason := self.runner(model, flavor).ended()) is None:
            if time.monotonic() > patience:
                return "nobody saw why"
            time.sleep(_PAUSE_SECONDS)
        return reason

    def _path(self, model: ModelVersion, flavor: str, kind: str) -> Path:
        return self._folder / f"{self.runner(model, flavor).name}.{kind}"

    def _write(self, record: RunnerRecord) -> None:
        path = self._path(record.model, record.flavor, "json")
        # Not under one name for all: two workers may write different records of one runner.
        partial = path.with_suffix(f".{secrets.token_hex(4)}")
        partial.write_text(json.dumps(asdict(record)))
        partial.replace(path)


@contextmanager
def being_a_worker(folder: Path, begin: Callable[[], None]) -> Iterator[None]:
    """Be one of the service's workers; the first one of them calls `begin`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "workers.lock").open("ab") as file:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            begin()
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def _failed(record: RunnerRecord, problem: str) -> RunnerRecord:
    now = time.time()
    stable = record.started is not None and now - record.started > _STABLE_SECONDS
    failures = 1 if stable else record.failures + 1
    retry_at = now + _STARTS.pause(failures)
    return replace(record, started=None, failures=failures, retry_at=retry_at, problem=problem)


def _read(path: Path) -> RunnerRecord | None:
    """A record; None where there is none, it was cut short or another version's."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunnerRecord)
    except (OSError, ValueError, msgspec.DecodeError):
        return None


def _saved_python(files: Path) -> str | None:
    try:
        found = _PYTHON_OF_MODEL.search((files / "MLmodel").read_text())
    except (OSError, UnicodeDecodeError):
        return None
    return found.group(1) if found else None
