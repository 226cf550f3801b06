"""What Prometheus reads: one set of counters for all workers of the service.

Each worker counts in a file of its own and any of them tells the sum, that of ended workers
included (prometheus-client's multiprocess mode). Labels are routes, statuses and loaded models:
nothing that a caller can invent.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from model_server.processes import start_time
from model_server.schemas import LoadedModel

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric

_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
_PREFIX = "metrics-"
_MODEL = ("model", "version", "flavor")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class _Counters:
    registry: "CollectorRegistry"
    requests: "Counter"
    prediction_seconds: "Histogram"
    rows: "Counter"
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
        Counter(
            "model_server_loads",
            "Loads asked for, by how they ended.",
            ("outcome",),
            registry=registry,
        ),
        Counter(
            "model_server_runner_crashes",
            "Model processes that ended by themselves, to be started again.",
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


def count_prediction(model: str, version: int, flavor: str, rows: int, seconds: float) -> None:
    """A loaded model has predicted."""
    histogram, counter = _prediction_metrics(model, version, flavor)
    histogram.observe(seconds)
    counter.inc(rows)


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
    """A model's process has ended by itself."""
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
        for metric in _counted().collect():
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


def _counted() -> "CollectorRegistry":
    from prometheus_client import CollectorRegistry  # noqa: PLC0415
    from prometheus_client.multiprocess import (  # noqa: PLC0415
        MultiProcessCollector,
        mark_process_dead,
    )

    directory = os.environ.get(_DIRECTORY)
    if directory is None:
        return _counters().registry
    for file in Path(directory).glob("gauge_live*_*.db"):
        process = int(file.stem.rpartition("_")[2])
        if not Path(f"/proc/{process}").exists():
            mark_process_dead(process, directory)  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    MultiProcessCollector(registry, directory)  # type: ignore[no-untyped-call]
    return registry


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
def _prediction_metrics(model: str, version: int, flavor: str) -> "tuple[Histogram, Counter]":
    labels = (model, str(version), flavor)
    return _counters().prediction_seconds.labels(*labels), _counters().rows.labels(*labels)
