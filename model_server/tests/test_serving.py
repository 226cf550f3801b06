"""One host: what a caller gets for loading, asking and unloading, and when things are away."""

import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from statistics import median

import pytest

from hosts import Host, eventually, running
from light_models import Gate, Shelf
from model_server import catalog as catalogs
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
    host: Host, shelf: Shelf, tmp_path: Path
) -> None:
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
            assert host.unload("elm", 1).status_code == 200
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
    saved = database.rename(database.with_suffix(".saved"))
    database.mkdir()
    for reference in ("champion", 1):
        assert host.answer("rose", reference) == "one"
    assert host.states() == {("rose", 1): "ready"}
    assert host.load("rose", 1).status_code == 503
    assert host.unload("rose", 1).status_code == 503
    assert host.answer("rose", 1) == "one"
    database.rmdir()
    saved.rename(database)
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
