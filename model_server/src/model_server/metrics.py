"""What Prometheus reads: one set of counters for all workers of the service.

Each worker counts in files of its own and any of them tells the sum (prometheus-client's
multiprocess mode), with what ended workers have counted, which is kept in files of all of them.
Labels are routes, statuses and loaded models:
nothing that a caller can invent.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from model_server.errors import DeadlineExceededError
from model_server.locks import exclusive, shared
from model_server.processes import start_time
from model_server.schemas import LoadedModel

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric

_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
_PREFIX = "metrics-"
_LOCK = "lock"
_MODEL = ("model", "version", "flavor")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BATCH_ROWS = tuple(2**power for power in range(13))


@dataclass(frozen=True)
class _Counters:
    registry: "CollectorRegistry"
    requests: "Counter"
    prediction_seconds: "Histogram"
    rows: "Counter"
    batch_rows: "Histogram"
    loads: "Counter"
    crashes: "Counter"
    workers: "Gauge"


@cache
def _counters() -> _Counters:
    # Imported not before the first worker counts: it decides then whether it counts in files.
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram  # noqa: PLC0415

    registry = CollectorRegistry()
    return _Counters(
        registry,
        Counter(
            "model_server_requests", "Answered requests.", ("route", "status"), registry=registry
        ),
        Histogram(
            "model_server_prediction_seconds",
            "From a prediction request to its answer, of those that were answered with 200.",
            _MODEL,
            buckets=_SECONDS,
            registry=registry,
        ),
        Counter("model_server_rows", "Predicted rows.", _MODEL, registry=registry),
        Histogram(
            "model_server_batch_rows",
            "Rows of each call of a model, in which requests that came together are one.",
            _MODEL,
            buckets=_BATCH_ROWS,
            registry=registry,
        ),
        Counter(
            "model_server_loads",
            "Loads asked for, by how they ended.",
            ("outcome",),
            registry=registry,
        ),
        Counter(
            "model_server_runner_crashes",
            "Model processes that ended by themselves or answered nobody, to be started again.",
            registry=registry,
        ),
        Gauge(
            "model_server_workers", "HTTP workers.", multiprocess_mode="livesum", registry=registry
        ),
    )


def share_metrics(runtime_dir: Path, service: int) -> None:
    """Let this process count for the whole service: the process `service` and its children.

    To be asked before anything is counted. What an earlier service has counted is removed.
    """
    directory = runtime_dir / f"{_PREFIX}{service}-{start_time(service)}"
    directory.mkdir(parents=True, exist_ok=True)
    for other in runtime_dir.glob(f"{_PREFIX}*"):
        process, _, started = other.name.removeprefix(_PREFIX).partition("-")
        if str(start_time(int(process))) != started:
            shutil.rmtree(other, ignore_errors=True)
    os.environ[_DIRECTORY] = str(directory)


def count_worker() -> None:
    """This process is an HTTP worker from now on."""
    _counters().workers.set(1)


def count_request(route: str, status: int) -> None:
    """A request was answered; `route` is one of the application's own."""
    _request_counter(route, status).inc()


def count_prediction(
    model: str, version: int, flavor: str, rows: int, seconds: float, *, call_rows: int
) -> None:
    """A loaded model has predicted; `call_rows` is not 0 for one request of each of its calls."""
    latencies, counter, batches = _prediction_metrics(model, version, flavor)
    latencies.observe(seconds)
    counter.inc(rows)
    if call_rows:
        batches.observe(call_rows)


@contextmanager
def counted_load() -> Iterator[None]:
    """A load, by how it ends."""
    try:
        yield
    except BaseException:
        _counters().loads.labels("failed").inc()
        raise
    _counters().loads.labels("loaded").inc()


def count_crash() -> None:
    """A model's process has ended by itself, or was ended as it answered nobody."""
    _counters().crashes.inc()


def exposition(loaded: Sequence[LoadedModel] | None) -> bytes:
    """The text format; `loaded` is None where nobody can tell now what is loaded."""
    from prometheus_client import generate_latest  # noqa: PLC0415

    return generate_latest(_Exposition(loaded))


class _Exposition:
    """What the workers counted, of the models that are loaded now, and those models."""

    def __init__(self, loaded: Sequence[LoadedModel] | None) -> None:
        self._loaded = loaded

    def collect(self) -> Iterator["Metric"]:
        known = None
        if self._loaded is not None:
            known = {(model.model_name, str(model.version)) for model in self._loaded}
        for metric in _counted():
            if known is not None:
                # Those of models that are not loaded any more would only become more.
                metric.samples = [
                    sample
                    for sample in metric.samples
                    if "model" not in sample.labels
                    or (sample.labels["model"], sample.labels["version"]) in known
                ]
            yield metric
        if self._loaded is not None:
            yield from _models(self._loaded)


def _counted() -> list["Metric"]:
    """What all workers of the service have counted, ended ones included."""
    from prometheus_client.multiprocess import MultiProcessCollector  # noqa: PLC0415

    directory = os.environ.get(_DIRECTORY)
    if directory is None:
        return list(_counters().registry.collect())
    _fold_ended_workers(Path(directory))
    with shared(Path(directory, _LOCK)):
        files = [str(file) for file in Path(directory).glob("*.db") if _has_begun(file)]
        return list(MultiProcessCollector.merge(files))  # type: ignore[no-untyped-call]


def _has_begun(file: Path) -> bool:
    """Whether its worker has come as far as to count; a file is empty while it is made."""
    return file.stat().st_size > 0


def _fold_ended_workers(directory: Path) -> None:
    """Add what ended workers have counted to one file, as each reload leaves files of them."""
    if not _of_ended_workers(directory):
        return
    # Whoever reads the files now does without; the next one comes soon.
    with suppress(DeadlineExceededError), exclusive(directory / _LOCK, 0.0, "the counters"):
        files = _of_ended_workers(directory)
        for kind in ("counter", "histogram"):
            _add_up(
                directory / f"{kind}_ended.db",
                [file for file in files if file.name.startswith(f"{kind}_") and _has_begun(file)],
            )
        # What is left of a gauge counts living workers only.
        for file in files:
            file.unlink()


def _of_ended_workers(directory: Path) -> list[Path]:
    """Their files, each with the process's number at the end of its name."""
    found = ((file, file.stem.rpartition("_")[2]) for file in directory.glob("*.db"))
    return [
        file for file, process in found if process.isdigit() and not Path("/proc", process).exists()
    ]


def _add_up(total: Path, files: list[Path]) -> None:
    from prometheus_client.mmap_dict import MmapedDict  # noqa: PLC0415

    partial = total.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    if total.exists():
        shutil.copyfile(total, partial)
    values = MmapedDict(str(partial))  # type: ignore[no-untyped-call]
    for file in files:
        for key, value, _, _ in MmapedDict.read_all_values_from_file(file):  # type: ignore[no-untyped-call]
            before, _ = values.read_value(key)  # type: ignore[no-untyped-call]
            values.write_value(key, before + value, 0.0)  # type: ignore[no-untyped-call]
    values.close()  # type: ignore[no-untyped-call]
    partial.replace(total)


def _models(loaded: Sequence[LoadedModel]) -> Iterator["Metric"]:
    from prometheus_client.core import GaugeMetricFamily  # noqa: PLC0415

    states = GaugeMetricFamily(
        "model_server_models",
        "Models that are loaded, or shall be.",
        labels=[*_MODEL, "state"],
    )
    memory = GaugeMetricFamily(
        "model_server_model_memory_bytes", "Memory of a model's process.", labels=_MODEL
    )
    for model in loaded:
        labels = [model.model_name, str(model.version), model.model_flavor]
        states.add_metric([*labels, model.state], 1)
        if model.memory_bytes is not None:
            memory.add_metric(labels, model.memory_bytes)
    yield states
    yield memory


# Looking up labels costs more than counting.
@lru_cache(maxsize=1024)
def _request_counter(route: str, status: int) -> "Counter":
    return _counters().requests.labels(route, str(status))


@lru_cache(maxsize=1024)
def _prediction_metrics(
    model: str, version: int, flavor: str
) -> "tuple[Histogram, Counter, Histogram]":
    labels = (model, str(version), flavor)
    counters = _counters()
    return (
        counters.prediction_seconds.labels(*labels),
        counters.rows.labels(*labels),
        counters.batch_rows.labels(*labels),
    )
