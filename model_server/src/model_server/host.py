"""What runs on this host: start, watch and stop the runners of model versions.

Whatever a worker learns about a runner it writes into the runner's record, a small file beside the
socket, so that all workers of the host act alike. Records change under the lock of their model.
"""

import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from model_server import metrics
from model_server.backoff import Backoff
from model_server.environments import Environments
from model_server.errors import (
    DeadlineExceededError,
    MemoryBudgetError,
    ModelNotLoadableError,
    ModelNotReadyError,
    ModelServerError,
    name_of,
    named,
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
_REMEMBERED_SECONDS = 60.0
"""How long after its pause a failure counts that nobody has asked to mend."""
_REASON_SECONDS = 0.2
_PAUSE_SECONDS = 0.02
_PYTHON_OF_MODEL = re.compile(r"^\s+python_version:\s*['\"]?(\d+\.\d+)", re.MULTILINE)


@dataclass(frozen=True)
class RunnerRecord:
    """What the workers of this host know about one runner.

    Times are those of `time.monotonic()`: one clock for all processes of a host, which nobody sets.
    """

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
    error: str | None = None
    """By its name in `errors`, what the start failed with; None for a crash or a bug."""

    @property
    def model(self) -> ModelVersion:
        """The model version that the runner is of."""
        return ModelVersion(self.name, self.version, self.digest)

    @property
    def model_and_flavor(self) -> tuple[ModelVersion, str]:
        """What one host runs once at most."""
        return self.model, self.flavor

    @property
    def is_paused(self) -> bool:
        """Whether it is too early for another try."""
        return self.pause_left() > 0

    def has_failed(self) -> bool:
        """Whether it does not run because its start failed, or because it crashed."""
        return self.started is None and self.failures > 0

    def pause_left(self) -> float:
        """In how many seconds it may be tried again."""
        return self.retry_at - time.monotonic()

    def is_remembered(self) -> bool:
        """Whether it is kept for its failure, so that callers are told and pauses grow."""
        return self.has_failed() and self.pause_left() > -_REMEMBERED_SECONDS


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

    def refuse_failed(self, model: ModelVersion, flavor: str) -> None:
        """Raise what its last start failed with, until it is time to try again."""
        record = self.record(model, flavor)
        if record is None or not record.has_failed() or not record.is_paused:
            return
        error = (
            ModelNotReadyError(f"The process does not run for now. {record.problem}")
            if record.error is None
            else named(record.error, str(record.problem))
        )
        error.retry_after = record.pause_left()
        raise error

    def memory(self, model: ModelVersion, flavor: str) -> int | None:
        """Bytes that a running runner uses."""
        return self.runner(model, flavor).memory()

    def touch(self, model: ModelVersion, flavor: str, *, answered: float | None = None) -> None:
        """Note that somebody uses it now and, by `time.monotonic`, when it has answered."""
        with contextlib.suppress(OSError):
            _mark(self._path(model, flavor, "used"), time.monotonic())
            if answered is not None:
                _mark(self._path(model, flavor, "answered"), answered)

    def last_used(self, model: ModelVersion, flavor: str) -> float:
        """When somebody used it last, by `time.monotonic`."""
        return self._touched(model, flavor, "used")

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
            self.touch(model, flavor, answered=time.monotonic())
            record = replace(
                record,
                started=time.monotonic(),
                environment=str(environment),
                memory=self.memory(model, flavor),
                resting=False,
                retry_at=0.0,
                problem=None,
                error=None,
            )
            # One after the other: of two that start at once and do not both fit, one is kept.
            with exclusive(self._folder / "memory.lock", deadline, "the memory of another model"):
                self._make_room(record, others_may_go=asked)
                self._write(record)
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
            elif isinstance(error, ModelServerError):
                record = replace(record, error=name_of(error))
                error.retry_after = record.pause_left()
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
        for kind in ("json", "used", "answered"):
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
        _tell_crash(record, reason)
        return record

    def end_silent(self, model: ModelVersion, flavor: str, seconds: float) -> None:
        """End a process that has answered no worker for so long, and note why it does not run.

        Needs no lock: while somebody else changes the runner, nothing is done.
        """
        since = time.monotonic() - seconds
        with (
            contextlib.suppress(DeadlineExceededError),
            self.changing(model, flavor, 0.0),
        ):
            record = self.record(model, flavor)
            if record is None or record.started is None:
                return
            # Noted also when it was started, as it says then that it is loaded.
            if self._touched(model, flavor, "answered") > since:
                return
            reason = f"no answer for {seconds:.0f} seconds"
            record = _failed(record, f"The process of {model} as {flavor} was ended ({reason}).")
            # Before it ends, so that its callers are told why.
            self._write(record)
            _tell_crash(record, reason)
            self.runner(model, flavor).kill()

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
            # Whoever takes them at this moment uses them, or has given them their own name by now.
            with (
                contextlib.suppress(DeadlineExceededError, FileNotFoundError),
                exclusive(lock, 0.0, "the model's files"),
            ):
                if files.stat().st_mtime < oldest:
                    # Under another name first: half of a model is never used.
                    stale = Path(tempfile.mkdtemp(prefix=f"{digest}.partial-", dir=folder))
                    files.rename(stale)
                    shutil.rmtree(stale, ignore_errors=True)

    def environments_in_use(self, wanted: set[ModelVersion]) -> set[Path]:
        """The environments of all runners that run, or may any moment, and of those of `wanted`.

        After a reboot there are no records, and an environment's time is the one of a start long
        ago.
        """
        found = {Path(record.environment) for record in self.records() if record.environment}
        for model in wanted:
            with contextlib.suppress(ModelNotLoadableError):
                found.add(self._environments.environment_for(self.files(model)))
        return found

    def _touched(self, model: ModelVersion, flavor: str, kind: str) -> float:
        try:
            return self._path(model, flavor, kind).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _is_idle(self, record: RunnerRecord, seconds: float) -> bool:
        return time.monotonic() - self.last_used(record.model, record.flavor) > seconds

    def _lives(self, record: RunnerRecord) -> bool:
        return self._processes.is_running(self.runner(record.model, record.flavor).name)

    def _start(self, model: ModelVersion, flavor: str, deadline: float) -> Path:
        files = self.files(model)
        with exclusive(files.with_suffix(".lock"), deadline, f"the files of {model}"):
            if not files.exists():
                self._fetch(model, files, deadline)
            # Its time tells when it was used last.
            os.utime(files)
        try:
            python = self._environments.python_for(files, deadline)
            self.runner(model, flavor).start(python, files, deadline)
        except ModelNotLoadableError as error:
            saved = _saved_python(files)
            if saved in {None, PYTHON_VERSION}:
                raise
            # First, as the lines of uv or of the process come last.
            raise ModelNotLoadableError(
                f"It was stored by Python {saved} and this server has {PYTHON_VERSION}, which may "
                f"be why: {error}"
            ) from error
        return python.parents[1]

    def _fetch(self, model: ModelVersion, files: Path, deadline: float) -> None:
        try:
            self._registry.fetch(model, files, deadline)
        except TimeoutError:
            raise DeadlineExceededError(
                f"The files of {model} could not be fetched from MLflow within "
                f"{self._settings.load_timeout_seconds:g} seconds."
            ) from None

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
        partial.write_bytes(msgspec.json.encode(record))
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


def _mark(file: Path, moment: float) -> None:
    file.touch()
    os.utime(file, (moment, moment))


def _failed(record: RunnerRecord, problem: str) -> RunnerRecord:
    now = time.monotonic()
    stable = record.started is not None and now - record.started > _STABLE_SECONDS
    failures = 1 if stable else record.failures + 1
    retry_at = now + _STARTS.pause(failures)
    return replace(
        record,
        started=None,
        failures=failures,
        retry_at=retry_at,
        problem=problem,
        error=None,
    )


def _tell_crash(record: RunnerRecord, reason: str) -> None:
    metrics.count_crash()
    _LOG.warning(
        "runner crashed",
        extra={
            "model": str(record.model),
            "flavor": record.flavor,
            "reason": reason,
            "failures": record.failures,
        },
    )


def _read(path: Path) -> RunnerRecord | None:
    """A record; None where there is none, it was cut short or another version's.

    What is there and cannot be read now, for want of file descriptors, is an OSError: a runner that
    is taken for one that never was would be started anew.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunnerRecord)
    except (FileNotFoundError, ValueError, msgspec.DecodeError):
        return None


def _saved_python(files: Path) -> str | None:
    try:
        found = _PYTHON_OF_MODEL.search((files / "MLmodel").read_text())
    except (OSError, UnicodeDecodeError):
        return None
    return found.group(1) if found else None
