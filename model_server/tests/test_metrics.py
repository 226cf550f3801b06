"""The counters, in processes as the workers of a service are."""

import os
import struct
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from threading import Barrier

import pytest
from prometheus_client.parser import text_string_to_metric_families

from model_server import metrics
from model_server.schemas import LoadedModel

_WORKER = """
    import os
    import sys
    from pathlib import Path
    from model_server import metrics
    metrics.share_metrics(Path(sys.argv[1]), os.getppid())
    metrics.count_worker()
    metrics.count_request("/{a}/{b}", 200)
    metrics.count_prediction("rose", 1, "pyfunc", 5, 0.003, call_rows=8)
    metrics.count_prediction("rose", 1, "pyfunc", 3, 0.003, call_rows=0)
    metrics.count_prediction("rose", 2, "pyfunc", 1, 0.003, call_rows=1)
    metrics.count_crash()
    try:
        with metrics.counted_load():
            pass
        with metrics.counted_load():
            raise ValueError
    except ValueError:
        pass
    print("counted", flush=True)
    for line in sys.stdin:
        print(metrics.exposition(None).decode(), end="", flush=True)
        print("END", flush=True)
"""


class Worker:
    """A process that counts as a worker does."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_WORKER), folder],
            env={"PYTHONPATH": str(Path(metrics.__file__).parents[1])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "counted\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def samples(self) -> dict[tuple[str, ...], float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print("tell", file=self.process.stdin, flush=True)
        text = "".join(iter(self.process.stdout.readline, "END\n"))
        return _samples(text)


def _samples(text: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _loaded(version: int, memory: int | None = 5) -> LoadedModel:
    return LoadedModel(
        model_name="rose",
        model_flavor="pyfunc",
        model_version_or_alias="1",
        version=version,
        aliases=[],
        state="ready" if memory else "failed",
        since=datetime.now(UTC),
        memory_bytes=memory,
        problem=None,
        runner="0123456789abcdef-p",
    )


# A file of counters without any: how many bytes of it are used, and four more.
_NOTHING = struct.pack("=ii", 8, 0)

# Labels are told by their alphabet: flavor, model, version.
_ROSE = ("pyfunc", "rose", "1")


def _batches(samples: dict[tuple[str, ...], float]) -> dict[int, float]:
    """How many calls had so many rows or less."""
    return {
        most: samples["model_server_batch_rows_bucket", "pyfunc", f"{most}.0", "rose", "1"]
        for most in (4, 8, 16, 4096)
    }


def test_workers_count_together_and_what_one_counted_outlives_it(tmp_path: Path) -> None:
    first, second = Worker(tmp_path), Worker(tmp_path)
    try:
        for worker in (first, second):
            samples = worker.samples()
            assert samples["model_server_requests_total", "/{a}/{b}", "200"] == 2
            assert samples["model_server_loads_total", "loaded"] == 2
            assert samples["model_server_loads_total", "failed"] == 2
            assert samples["model_server_runner_crashes_total",] == 2
            assert samples["model_server_workers",] == 2
            assert samples["model_server_rows_total", *_ROSE] == 16
            # Two requests in each call.
            assert samples["model_server_prediction_seconds_count", *_ROSE] == 4
            assert _batches(samples) == {4: 0, 8: 2, 16: 2, 4096: 2}
            assert samples["model_server_batch_rows_sum", *_ROSE] == 16
        first.kill()
        third = Worker(tmp_path)
        third.kill()
        samples = second.samples()
        assert samples["model_server_requests_total", "/{a}/{b}", "200"] == 3
        assert samples["model_server_workers",] == 1
    finally:
        first.kill()
        second.kill()


def test_a_file_that_a_worker_has_only_begun_is_left_out(tmp_path: Path) -> None:
    worker = Worker(tmp_path)
    try:
        (folder,) = tmp_path.iterdir()
        with subprocess.Popen(["true"]) as ended:
            ended.wait()
        for process in (os.getpid(), ended.pid):
            for kind in ("counter", "histogram", "gauge_livesum"):
                (folder / f"{kind}_{process}.db").touch()
        assert worker.samples()["model_server_rows_total", *_ROSE] == 8
    finally:
        worker.kill()


def test_what_ended_workers_have_counted_takes_no_more_files(tmp_path: Path) -> None:
    last = Worker(tmp_path)
    try:
        (folder,) = tmp_path.iterdir()
        own = set(folder.glob("*.db"))
        for ended in (1, 2, 3):
            Worker(tmp_path).kill()
            for _ in range(2):
                samples = last.samples()
                assert samples["model_server_workers",] == 1
                assert samples["model_server_requests_total", "/{a}/{b}", "200"] == 1 + ended
                assert samples["model_server_rows_total", *_ROSE] == 8 * (1 + ended)
                assert samples["model_server_prediction_seconds_count", *_ROSE] == 2 * (1 + ended)
                assert samples["model_server_batch_rows_sum", *_ROSE] == 8 * (1 + ended)
                assert _batches(samples) == {4: 0, 8: 1 + ended, 16: 1 + ended, 4096: 1 + ended}
            others = {file.name for file in set(folder.glob("*.db")) - own}
            assert others == {"counter_ended.db", "histogram_ended.db"}
    finally:
        last.kill()


def test_workers_that_are_asked_at_once_may_see_the_same_worker_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    together = Barrier(4)

    def ask(_: int) -> bytes:
        together.wait(60)
        return metrics.exposition(None)

    interval = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(interval))
    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(4) as threads:
        for _ in range(20):
            for gone in range(50):
                (tmp_path / f"gauge_livesum_{2**30 + gone}.db").write_bytes(_NOTHING)
            assert len(list(threads.map(ask, range(4)))) == 4
            assert list(tmp_path.glob("gauge*")) == []


def test_an_earlier_services_counters_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Put back afterwards.
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")
    (tmp_path / "metrics-1-1").mkdir()
    (tmp_path / "metrics-999999999-1").mkdir()
    metrics.share_metrics(tmp_path, os.getppid())
    (left,) = tmp_path.iterdir()
    assert os.environ["PROMETHEUS_MULTIPROC_DIR"] == str(left)
    assert left.name.startswith(f"metrics-{os.getppid()}-")


def test_only_loaded_models_are_told() -> None:
    metrics.count_prediction("rose", 1, "pyfunc", 5, 0.003, call_rows=5)
    metrics.count_prediction("rose", 2, "pyfunc", 1, 0.003, call_rows=1)
    rows = ("model_server_rows_total", "pyfunc", "rose")
    everything = _samples(metrics.exposition(None).decode())
    assert everything[*rows, "1"] >= 5
    assert everything[*rows, "2"] >= 1
    samples = _samples(metrics.exposition([_loaded(1), _loaded(3, memory=None)]).decode())
    assert samples[*rows, "1"] >= 5
    assert (*rows, "2") not in samples
    assert samples["model_server_models", "pyfunc", "rose", "ready", "1"] == 1
    assert samples["model_server_models", "pyfunc", "rose", "failed", "3"] == 1
    assert samples["model_server_model_memory_bytes", "pyfunc", "rose", "1"] == 5
    assert ("model_server_model_memory_bytes", "pyfunc", "rose", "3") not in samples
