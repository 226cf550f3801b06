"""One host: what a caller gets for loading, asking and unloading, and when things are away."""

import os
import re
import resource
import signal
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from threading import Event

import pytest

from hosts import Host, eventually, runners_of, running
from light_models import Gate, Shelf
from model_server import catalog as catalogs
from model_server import host as hosting
from model_server import serving
from model_server.backoff import Backoff
from model_server.settings import Settings


@pytest.fixture
def host(light: Settings, shelf: Shelf) -> Iterator[Host]:
    shelf.put("rose", 1, "one")
    shelf.point("rose", "champion", 1)
    with running(light) as (host,):
        yield host


@pytest.fixture
def database(light: Settings) -> Path:
    assert light.database_url is not None
    return Path(light.database_url.get_secret_value().removeprefix("sqlite:///"))


def test_the_first_use_loads_and_an_unload_ends_it(host: Host, shelf: Shelf) -> None:
    assert host.listing() == []
    assert host.answer("rose", "champion") == "one"
    (entry,) = host.listing()
    assert entry.pop("memory_bytes") > 2**20
    assert entry.pop("since")
    assert (host.settings.sockets / entry.pop("runner")).is_socket()
    assert entry == {
        "model_name": "rose",
        "model_flavor": "pyfunc",
        "model_version_or_alias": "champion",
        "version": 1,
        "aliases": ["champion"],
        "state": "ready",
        "problem": None,
    }
    assert host.answer("rose", 1) == "one"
    assert len(host.runners()) == 1
    assert host.unload("rose", 1).json()["state"] == "unloaded"
    assert host.runners() == {}
    assert host.listing() == []
    assert host.unload("rose", 1).status_code == 404
    assert host.unload("rose", "champion").status_code == 404
    # The next use is a first one again.
    shelf.point("rose", "champion", None)
    assert host.answer("rose", "champion") == 404
    assert host.answer("rose", 1) == "one"


def test_loading_what_is_loaded_changes_nothing(host: Host) -> None:
    first = host.load("rose", 1).json()
    runners = host.runners()
    again = host.load("rose", 1).json()
    assert (again["since"], again["state"]) == (first["since"], "ready")
    assert host.runners() == runners


def test_a_version_made_anew_takes_the_place_of_the_old_one(host: Host, shelf: Shelf) -> None:
    host.load("rose", 1)
    shelf.put("rose", 1, "another one")
    shelf.registry.created += 1
    assert host.answer("rose", 1) == "one"
    assert host.load("rose", 1).json()["state"] == "ready"
    assert host.answer("rose", 1) == "another one"
    assert len(host.runners()) == 1


def test_a_model_that_cannot_be_loaded_leaves_nothing(host: Host, shelf: Shelf) -> None:
    shelf.put("weed", 1, "no", load="raise RuntimeError('it has no roots')")
    answer = host.ask("weed", 1)
    assert answer.status_code == 422
    assert "it has no roots" in answer.json()["detail"]
    assert host.listing() == []
    eventually(host.runners, wanted={})
    # Mended, it is loaded at once.
    shelf.put("weed", 1, "yes")
    shelf.registry.created += 1
    assert host.answer("weed", 1) == "yes"


def test_what_cannot_be_loaded_is_told_to_callers_and_not_tried_by_each_of_them(
    host: Host, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosting, "_STARTS", Backoff(first=20, longest=60))
    starts = tmp_path / "starts"
    failing = f"open({str(starts)!r}, 'a').write('+'); raise RuntimeError('it has no roots')"
    shelf.put("weed", 1, "no", load=failing)
    first = host.ask("weed", 1)
    assert "it has no roots" in first.json()["detail"]
    # For longer than the keeper takes to end what nobody wants.
    until = time.monotonic() + 4
    while time.monotonic() < until:
        again = host.ask("weed", 1)
        assert (again.status_code, again.json()) == (422, first.json())
        assert 2 < int(again.headers["retry-after"]) <= 20
        time.sleep(0.1)
    assert starts.read_text() == "+"
    # Whoever asks for the load has reason to believe that it works now.
    assert host.load("weed", 1).status_code == 422
    assert starts.read_text() == "++"
    assert host.listing() == []


def test_a_model_that_answers_nobody_is_ended_and_comes_back(
    light: Settings, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosting, "_STARTS", Backoff(first=60, longest=60))
    shelf.put("oak", 1, "oak", predict="while 'hang' in rows: pass")
    with running(light.model_copy(update={"predict_timeout_seconds": 3})) as (host,):
        assert host.answer("oak", 1) == "oak"
        (hung,) = host.runners()
        assert host.answer("oak", 1) == "oak"
        assert host.ask("oak", 1, "hang").status_code == 504
        # Once may be a question that is too large; whoever comes next waits in vain, too.
        assert hung in host.runners()
        assert host.ask("oak", 1).status_code == 504
        eventually(host.states, wanted={("oak", 1): "failed"})
        (entry,) = host.listing()
        told = re.search(r"was ended (\(no answer for (\d+) seconds\))", entry["problem"])
        assert told
        assert int(told[2]) >= 6
        refused = host.ask("oak", 1)
        assert refused.status_code == 503
        assert told[1] in refused.json()["detail"]
        assert 2 <= int(refused.headers["retry-after"]) <= 60
        eventually(lambda: hung in host.runners(), wanted=False)
        # The pause is over.
        monkeypatch.setattr(hosting.RunnerRecord, "is_paused", False)
        eventually(lambda: host.answer("oak", 1), wanted="oak")


def test_a_slow_model_that_answers_the_callers_of_another_worker_goes_on(
    light: Settings, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Workers tell of answers far more often than a prediction may take, as with real settings.
    monkeypatch.setattr(serving, "_TOUCH_SECONDS", 0.05)
    shelf.put("oak", 1, "oak", predict="import time; time.sleep(0.6)")
    settings = light.model_copy(update={"predict_timeout_seconds": 1})
    # More rows than go together with those of others.
    rows = {"data": 1025 * ["a"]}
    done = Event()
    with running(settings, settings) as (worker, other), ThreadPoolExecutor(4) as threads:
        worker.load("oak", 1)
        before = worker.runners()

        def ask() -> set[int]:
            statuses = set()
            while not done.is_set():
                statuses.add(other._client.post("/oak/1", json=rows).status_code)
            return statuses

        asking = [threads.submit(ask) for _ in range(4)]
        try:
            time.sleep(1)
            statuses = [worker._client.post("/oak/1", json=rows).status_code for _ in range(4)]
        finally:
            done.set()
        assert 504 in statuses
        assert {status for job in asking for status in job.result()} <= {200, 504}
        assert worker.runners() == before
        eventually(lambda: worker.answer("oak", 1), wanted="oak")


@contextmanager
def _no_file_can_be_opened() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Less than are open now: some may be closed meanwhile, of those below none.
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_worker_without_descriptors_takes_no_model_for_one_that_never_ran(host: Host) -> None:
    host.load("rose", 1)
    # The list of models is known, but nobody has asked the runner yet.
    assert host.states() == {("rose", 1): "ready"}
    before = host.runners()
    with _no_file_can_be_opened():
        answer = host.ask("rose", 1)
    assert answer.status_code == 503
    assert "too many connections" in answer.json()["detail"]
    assert int(answer.headers["retry-after"]) >= 1
    assert host.answer("rose", 1) == "one"
    assert host.runners() == before


def test_an_unload_does_not_wait_for_a_start_that_takes_long(
    light: Settings, shelf: Shelf, gate: Gate
) -> None:
    shelf.put("oak", 1, "oak", load=gate.load)
    settings = light.model_copy(update={"startup_seconds": 1})
    with running(settings) as (host,), ThreadPoolExecutor(1) as threads:
        loading = threads.submit(host.load, "oak", 1)
        gate.open()
        loading.result()
        (runner,) = host.runners()
        os.kill(runner, signal.SIGKILL)
        held = gate.wait()
        began = time.monotonic()
        answer = host.unload("oak", 1)
        assert time.monotonic() - began < 20
        assert answer.status_code == 200
        assert answer.json()["state"] == "unloaded"
        assert "its process ends when that is done" in answer.json()["problem"]
        assert host.listing() == []
        assert host.unload("oak", 1).status_code == 404
        os.close(held)
        eventually(host.runners, wanted={})


def test_many_first_users_share_one_start_and_hold_up_nobody(
    host: Host, shelf: Shelf, gate: Gate, tmp_path: Path
) -> None:
    starts = tmp_path / "starts"
    shelf.put("oak", 1, "oak", load=f"open({str(starts)!r}, 'a').write('+'); {gate.load}")
    host.load("rose", 1)
    with ThreadPoolExecutor(8) as threads:
        asking = [threads.submit(host.answer, "oak", 1) for _ in range(8)]
        held = gate.wait()
        assert host.answer("rose", 1) == "one"
        assert host.states() == {("rose", 1): "ready"}
        os.close(held)
        assert [job.result() for job in asking] == 8 * ["oak"]
    assert starts.read_text() == "+"


def test_slow_loads_hold_up_neither_a_crash_nor_an_unload(
    host: Host, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However long it takes until it is asked; the pause is over when it has been.
    monkeypatch.setattr(hosting, "_STARTS", Backoff(first=60, longest=60))
    waiting, enough = tmp_path / "waiting", tmp_path / "enough"
    wait = f"""
        import time
        open({str(waiting)!r}, "a").write("+")
        while not os.path.exists({str(enough)!r}):
            time.sleep(0.05)
        """
    names = [f"oak{number}" for number in range(8)]
    for name in names:
        shelf.put(name, 1, "oak", load=wait)
    shelf.put("elm", 1, "elm")
    host.load("elm", 1)
    others = host.runners().keys()
    host.load("rose", 1)
    (runner,) = host.runners().keys() - others
    with ThreadPoolExecutor(len(names)) as threads:
        loads = [threads.submit(host.load, name, 1) for name in names]
        try:
            eventually(lambda: waiting.exists() and waiting.read_text(), wanted=8 * "+")
            os.kill(runner, signal.SIGKILL)
            eventually(lambda: runner in host.runners(), wanted=False)
            answer = host.ask("rose", 1)
            assert answer.status_code == 503
            assert "SIGKILL" in answer.json()["detail"]
            monkeypatch.setattr(hosting.RunnerRecord, "is_paused", False)
            assert host.unload("elm", 1).status_code == 200
            assert host.answer("nothing", 1) == 404
            eventually(lambda: host.answer("rose", 1), wanted="one")
            assert not any(load.done() for load in loads)
        finally:
            enough.touch()
        assert [load.result().status_code for load in loads] == 8 * [200]


def test_whoever_waits_too_long_for_a_model_that_comes_back_is_told_so(
    light: Settings, shelf: Shelf, gate: Gate
) -> None:
    shelf.put("oak", 1, "oak", load=gate.load)
    with running(light) as (host,), ThreadPoolExecutor(1) as threads:
        loading: Future[object] = threads.submit(host.load, "oak", 1)
        gate.open()
        loading.result()
    # Else, it could outlive the pause between the two.
    eventually(lambda: runners_of(light), wanted={})
    with running(light.model_copy(update={"startup_seconds": 0.5})) as (host,):
        held = gate.wait()
        answer = host.ask("oak", 1)
        assert answer.status_code == 503
        assert "still being started" in answer.json()["detail"]
        assert int(answer.headers["retry-after"]) >= 1
        assert host.states() == {("oak", 1): "loading"}
        assert not host.is_ready()
        os.close(held)
        eventually(host.is_ready)
        assert host.answer("oak", 1) == "oak"


def test_the_registry_may_be_away_once_a_model_is_loaded(host: Host, shelf: Shelf) -> None:
    host.load("rose", "champion")
    shelf.registry.close()
    for reference in ("champion", 1):
        assert host.answer("rose", reference) == "one"
    assert host.states() == {("rose", 1): "ready"}
    assert host.answer("oak", 1) == 503
    answer = host.load("rose", "champion")
    assert answer.status_code == 503
    assert "does not answer" in answer.json()["detail"]


def test_the_database_may_be_away_once_a_model_is_loaded(host: Host, database: Path) -> None:
    host.load("rose", "champion")
    saved, nowhere = database.with_suffix(".saved"), database.with_suffix(".link")
    saved.hardlink_to(database)
    nowhere.symlink_to(database.parent / "away" / database.name)
    # At once: between two steps, somebody could make a new one.
    nowhere.replace(database)
    for reference in ("champion", 1):
        assert host.answer("rose", reference) == "one"
    assert host.states() == {("rose", 1): "ready"}
    assert host.load("rose", 1).status_code == 503
    assert host.unload("rose", 1).status_code == 503
    assert host.answer("rose", 1) == "one"
    saved.replace(database)
    assert host.unload("rose", 1).status_code == 200


def test_a_database_that_hangs_holds_up_no_prediction(
    light: Settings, shelf: Shelf, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.put("rose", 1, "one")
    monkeypatch.setattr(catalogs, "TRANSACTION_SECONDS", 1)
    with running(light) as (host,):
        host.load("rose", 1)
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            began = time.monotonic()
            assert host.unload("rose", 1).status_code == 503
            assert time.monotonic() - began < 25
            took = []
            until = time.monotonic() + 2
            while time.monotonic() < until:
                began = time.monotonic()
                assert host.answer("rose", 1) == "one"
                took.append(time.monotonic() - began)
            # One that waits for the database takes a second; one alone may meet a busy machine.
            assert median(took) < 0.5
        assert host.unload("rose", 1).status_code == 200


def test_a_database_that_hangs_holds_up_no_scrape(
    light: Settings, shelf: Shelf, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.put("rose", 1, "one")
    monkeypatch.setattr(catalogs, "TRANSACTION_SECONDS", 30)
    with running(light) as (host,), ThreadPoolExecutor(42) as threads:
        host.load("rose", 1)
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            # Those who want the list wait for the database, and nobody for them.
            lists = [threads.submit(host.listing) for _ in range(40)]
            time.sleep(0.5)
            # Not as long as the database may take.
            metrics = threads.submit(host.metrics).result(timeout=20)
            assert 'model_server_models{flavor="pyfunc",model="rose"' in metrics
            ready = threads.submit(host.described, "rose", "/ready").result(timeout=20)
            assert ready.status_code == 200
            assert not any(one.done() for one in lists)
        assert all(len(one.result()) == 1 for one in lists)


def test_an_index_that_is_away_can_be_tried_again(host: Host, shelf: Shelf) -> None:
    shelf.put("oak", 1, "oak", requirements="far-away")
    answer = host.load("oak", 1)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert "index does not answer" in answer.json()["detail"]


def test_a_full_disk_is_said_and_harms_no_loaded_model(host: Host, shelf: Shelf) -> None:
    host.load("rose", 1)
    shelf.put("oak", 1, "oak", requirements="too-big")
    answer = host.load("oak", 1)
    assert answer.status_code == 507
    assert "disk is full" in answer.json()["detail"]
    assert host.answer("rose", 1) == "one"
    assert host.states() == {("rose", 1): "ready"}
