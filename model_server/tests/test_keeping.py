"""What runs becomes what shall run: over hosts, crashes, restarts and moved aliases."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Event
from typing import Any

import pytest

from hosts import Host, eventually, runners_of, running
from light_models import Gate, Shelf
from model_server import catalog as catalogs
from model_server import host as hosting
from model_server import keeping, serving
from model_server.backoff import Backoff
from model_server.locks import exclusive
from model_server.settings import Settings


@pytest.fixture
def host(light: Settings, shelf: Shelf) -> Iterator[Host]:
    shelf.put("rose", 1, "one")
    with running(light) as (host,):
        yield host


@pytest.fixture
def hosts(light: Settings, shelf: Shelf, tmp_path: Path) -> Iterator[list[Host]]:
    """Two hosts with one catalog."""
    shelf.put("rose", 1, "one")
    with running(light, _another(light, tmp_path)) as hosts:
        for host in hosts:
            eventually(host.is_ready)
        yield hosts


def _another(light: Settings, tmp_path: Path) -> Settings:
    return light.model_copy(
        update={
            "state_dir": tmp_path / "state of another",
            "runtime_dir": tmp_path / "r2",
        }
    )


def _count(host: Host) -> int:
    return len(host.runners())


def _kill(host: Host) -> int:
    (process,) = host.runners()
    os.kill(process, signal.SIGKILL)
    eventually(lambda: process in host.runners(), wanted=False)
    return process


# Several hosts.


def test_what_one_host_loads_the_other_one_serves(hosts: list[Host]) -> None:
    here, there = hosts
    assert here.load("rose", 1).status_code == 200
    # At once: who comes first waits for it.
    assert there.answer("rose", 1) == "one"
    eventually(lambda: [host.states() for host in hosts], wanted=2 * [{("rose", 1): "ready"}])


def test_the_other_host_starts_it_before_anybody_asks(hosts: list[Host]) -> None:
    here, there = hosts
    here.load("rose", 1)
    assert [entry["version"] for entry in there.listing()] == [1]
    eventually(lambda: len(there.runners()), wanted=1)


def test_two_hosts_may_load_the_same_at_once(hosts: list[Host]) -> None:
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda n: hosts[n % 2].load("rose", 1), range(8)))
    assert [answer.status_code for answer in answers] == 8 * [200]
    assert [len(host.runners()) for host in hosts] == [1, 1]


def test_unloaded_on_one_host_it_is_never_answered_on_the_other(
    hosts: list[Host], shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = hosts
    here.load("rose", 1)
    assert there.answer("rose", 1) == "one"
    # A busy machine may keep the other host for longer than an unload waits, or a living one has.
    monkeypatch.setattr(serving, "_HOSTS_SECONDS", 60)
    monkeypatch.setattr(catalogs, "_HOST_IS_GONE", timedelta(minutes=1))
    # From now on, whoever answers "one" is an old runner: the first use again gets a new model.
    shelf.registry.versions.clear()
    assert here.unload("rose", 1).json()["state"] == "unloaded"
    assert [there.answer("rose", 1) for _ in range(40)] == 40 * [404]
    assert there.listing() == []
    eventually(there.runners, wanted={})


def test_a_load_on_one_host_makes_no_other_one_less_ready(
    hosts: list[Host], shelf: Shelf, gate: Gate
) -> None:
    here, there = hosts
    shelf.put("oak", 1, "oak", load=gate.load)
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(here.load, "oak", 1)
        gate.open()
        assert loading.result().status_code == 200
    held = gate.wait()
    assert there.states() == {("oak", 1): "loading"}
    assert there.is_ready()
    os.close(held)


def test_an_alias_moves_on_both_hosts_without_a_failed_request(
    hosts: list[Host], shelf: Shelf
) -> None:
    shelf.put("rose", 2, "two")
    shelf.point("rose", "champion", 1)
    hosts[0].load("rose", "champion")
    for host in hosts:
        assert host.answer("rose", "champion") == "one"
    all_ask, moved = Barrier(5), Event()

    def ask(host: Host) -> list[str]:
        answers = [host.answer("rose", "champion")]
        all_ask.wait(60)
        while not moved.is_set():
            answers.append(host.answer("rose", "champion"))
        # The last answer may be of before.
        return [*answers, host.answer("rose", "champion")]

    with ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(ask, host) for host in 2 * hosts]
        all_ask.wait(60)
        shelf.point("rose", "champion", 2)
        try:
            for host in hosts:
                eventually(partial(host.answer, "rose", "champion"), wanted="two")
            # Until the old version has gone, too.
            for host in hosts:
                eventually(host.states, wanted={("rose", 2): "ready"})
                eventually(partial(_count, host), wanted=1)
        finally:
            moved.set()
    for answers in [job.result() for job in asking]:
        assert set(answers) == {"one", "two"}
        # Never back again.
        assert answers == sorted(answers)


def test_without_a_version_the_highest_one_that_runs_on_the_host_answers(
    hosts: list[Host], shelf: Shelf, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = hosts
    here.load("rose", 1)
    eventually(there.states, wanted={("rose", 1): "ready"})
    first = there.runners().keys()
    shelf.put("rose", 2, "two", load=gate.load)
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(here.load, "rose", 2)
        gate.open()
        assert loading.result().status_code == 200
    held = gate.wait()
    assert [host.infer("rose") for host in hosts] == ["two", "one"]
    os.close(held)
    eventually(lambda: there.infer("rose"), wanted="two")
    monkeypatch.setattr(hosting, "_STARTS", Backoff(first=60, longest=60))
    (second,) = there.runners().keys() - first
    os.kill(second, signal.SIGKILL)
    eventually(lambda: there.infer("rose"), wanted="one")


# Crashes.


def test_a_crashed_runner_comes_back_and_callers_do_not_wait(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.load("rose", 1)
    # However long it takes until it is asked; the pause is over when it has been.
    monkeypatch.setattr(hosting, "_STARTS", Backoff(first=60, longest=60))
    _kill(host)
    began = time.monotonic()
    answer = host.ask("rose", 1)
    # Nobody waits for what has failed; for what is being started, they would wait this long.
    assert time.monotonic() - began < host.settings.startup_seconds
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    monkeypatch.setattr(hosting.RunnerRecord, "is_paused", False)
    eventually(lambda: host.answer("rose", 1), wanted="one")
    assert host.states() == {("rose", 1): "ready"}


def test_a_crashed_runner_comes_back_before_anybody_asks(host: Host) -> None:
    host.load("rose", 1)
    old = _kill(host)
    eventually(lambda: len(host.runners()), wanted=1)
    assert old not in host.runners()


def test_work_that_has_ended_before_its_keeper_looks_holds_up_no_other(
    light: Settings, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads may be as fast as that, above all with little to do."""

    class Fast(ThreadPoolExecutor):
        def submit(self, *arguments: Any, **named: Any) -> Future[Any]:
            future = super().submit(*arguments, **named)
            wait([future])
            return future

    monkeypatch.setattr(keeping, "ThreadPoolExecutor", Fast)
    shelf.put("rose", 1, "one")
    with running(light) as (host,):
        host.load("rose", 1)
        for _ in range(2):
            _kill(host)
            eventually(lambda: len(host.runners()), wanted=1)


def test_a_runner_that_crashes_again_and_again_is_started_more_and_more_seldom(
    host: Host, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = tmp_path / "starts"
    shelf.put("nettle", 1, "ouch", load=f"open({str(starts)!r}, 'a').write('+')")
    host.load("nettle", 1)
    for _ in range(2):
        assert host.ask("nettle", 1, "kill").status_code == 503
        eventually(lambda: host.answer("nettle", 1), wanted="ouch")
    # The third pause would be one of four seconds, which a busy machine may need for this.
    monkeypatch.setattr(hosting, "_STARTS", Backoff(first=15, longest=60))
    killed = host.ask("nettle", 1, "kill")
    assert killed.status_code == 503
    assert "it is started again after a pause" in killed.json()["detail"]
    assert 2 < int(killed.headers["retry-after"]) <= 60
    (entry,) = host.listing()
    assert entry["state"] == "failed"
    assert "ended (SIGKILL)" in entry["problem"]
    answer = host.ask("nettle", 1)
    assert answer.status_code == 503
    assert "ended (SIGKILL)" in answer.json()["detail"]
    assert 2 < int(answer.headers["retry-after"]) <= 60
    assert starts.read_text() == "+++"


def test_a_clock_that_is_set_ends_no_model_and_prolongs_no_pause(
    light: Settings, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.put("rose", 1, "one")
    true = time.time
    with running(light.model_copy(update={"idle_unload_seconds": 3600})) as (host,):
        host.load("rose", 1)
        (runner,) = host.runners()
        monkeypatch.setattr(time, "time", lambda: true() + 2 * 86400)
        until = time.monotonic() + 3
        while time.monotonic() < until:
            assert runner in host.runners()
            time.sleep(0.1)
        monkeypatch.setattr(hosting, "_STARTS", Backoff(first=8, longest=60))
        _kill(host)
        eventually(host.states, wanted={("rose", 1): "failed"})
        monkeypatch.setattr(time, "time", true)
        eventually(lambda: host.answer("rose", 1), wanted="one", seconds=40)


def test_a_request_that_kills_its_model_is_not_asked_twice(
    host: Host, shelf: Shelf, tmp_path: Path
) -> None:
    asked = tmp_path / "asked"
    shelf.put(
        "nettle",
        1,
        "ouch",
        predict=f"open({str(asked)!r}, 'a').write('+'); os.kill(os.getpid(), signal.SIGKILL)",
    )
    host.load("nettle", 1)
    assert host.ask("nettle", 1).status_code == 503
    assert asked.read_text() == "+"


# Restarts.


def test_what_was_loaded_comes_back_after_a_restart(light: Settings, shelf: Shelf) -> None:
    shelf.put("rose", 1, "one")
    shelf.point("rose", "champion", 1)
    with running(light) as (host,):
        host.load("rose", "champion")
        (since,) = [entry["since"] for entry in host.listing()]
    eventually(lambda: runners_of(light), wanted={})
    with running(light) as (host,):
        eventually(host.is_ready)
        assert host.states() == {("rose", 1): "ready"}
        (entry,) = host.listing()
        assert (entry["since"], entry["aliases"]) == (since, ["champion"])
        assert host.answer("rose", "champion") == "one"


def test_what_was_loaded_comes_back_with_everything_else_away(
    light: Settings, shelf: Shelf, tmp_path: Path
) -> None:
    shelf.put("rose", 1, "one")
    with running(light) as (host,):
        host.load("rose", 1)
    eventually(lambda: runners_of(light), wanted={})
    shelf.registry.close()
    assert light.database_url is not None
    database = Path(light.database_url.get_secret_value().removeprefix("sqlite:///"))
    database.rename(tmp_path / "lost")
    database.mkdir()
    with running(light) as (host,):
        eventually(host.is_ready)
        assert host.answer("rose", 1) == "one"
        assert host.states() == {("rose", 1): "ready"}
        assert host.unload("rose", 1).status_code == 503
        assert host.load("rose", 1).status_code == 503
        assert host.answer("rose", 1) == "one"


# Aliases.


def test_a_version_that_fails_its_warm_up_gets_no_traffic_and_says_so(
    host: Host, shelf: Shelf
) -> None:
    shelf.put("rose", 2, "two", predict="raise RuntimeError('it withered')")
    shelf.example("rose", 2)
    shelf.point("rose", "champion", 1)
    host.load("rose", "champion")
    shelf.point("rose", "champion", 2)
    answers = set()

    def problem() -> bool:
        answers.add(host.answer("rose", "champion"))
        return host.listing()[0]["problem"] is not None

    eventually(problem)
    (entry,) = host.listing()
    assert (entry["version"], entry["state"]) == (1, "ready")
    assert "'champion' means version 2" in entry["problem"]
    assert "it withered" in entry["problem"]
    assert answers == {"one"}
    eventually(lambda: len(host.runners()), wanted=1)
    # A better version is a way out, and so is the way back.
    shelf.put("rose", 3, "three")
    shelf.point("rose", "champion", 3)
    eventually(lambda: host.answer("rose", "champion"), wanted="three")
    assert host.listing()[0]["problem"] is None


def test_an_alias_that_moves_back_while_it_is_deployed_was_never_moved(
    host: Host, shelf: Shelf, gate: Gate
) -> None:
    shelf.put("rose", 2, "two", load=gate.load)
    shelf.point("rose", "champion", 1)
    host.load("rose", "champion")
    shelf.point("rose", "champion", 2)
    held = gate.wait()
    shelf.point("rose", "champion", 1)
    os.close(held)
    answers = set()

    def runners() -> int:
        answers.add(host.answer("rose", "champion"))
        return _count(host)

    eventually(runners, wanted=1)
    assert answers == {"one"}
    assert host.states() == {("rose", 1): "ready"}


def test_a_third_version_does_not_wait_for_the_second_one(
    host: Host, shelf: Shelf, gate: Gate
) -> None:
    shelf.put("rose", 2, "two", load=gate.load)
    shelf.put("rose", 3, "three")
    shelf.point("rose", "champion", 1)
    host.load("rose", "champion")
    shelf.point("rose", "champion", 2)
    held = gate.wait()
    shelf.point("rose", "champion", 3)
    eventually(lambda: host.answer("rose", "champion"), wanted="three")
    os.close(held)
    answers = set()

    def runners() -> int:
        answers.add(host.answer("rose", "champion"))
        return _count(host)

    eventually(runners, wanted=1)
    assert answers == {"three"}


def test_slow_deployments_hold_up_no_restart(host: Host, shelf: Shelf, tmp_path: Path) -> None:
    waiting, enough = tmp_path / "waiting", tmp_path / "enough"
    wait = f"""
        import time
        open({str(waiting)!r}, "a").write("+")
        while not os.path.exists({str(enough)!r}):
            time.sleep(0.05)
        """
    names = [f"oak{number}" for number in range(4)]
    for name in names:
        shelf.put(name, 1, "old")
        shelf.put(name, 2, "new", load=wait)
        shelf.point(name, "champion", 1)
        host.load(name, "champion")
    others = host.runners().keys()
    host.load("rose", 1)
    (runner,) = host.runners().keys() - others
    for name in names:
        shelf.point(name, "champion", 2)
    try:
        eventually(lambda: waiting.exists() and waiting.read_text(), wanted=4 * "+")
        os.kill(runner, signal.SIGKILL)
        eventually(lambda: runner in host.runners(), wanted=False)
        eventually(lambda: host.answer("rose", 1), wanted="one")
        assert [host.answer(name, "champion") for name in names] == 4 * ["old"]
    finally:
        enough.touch()
    for name in names:
        eventually(partial(host.answer, name, "champion"), wanted="new")


def test_one_model_that_the_registry_refuses_keeps_no_other_one_from_moving(
    host: Host, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.put("rose", 2, "two")
    shelf.put("ash", 1, "ash")
    for name in ("ash", "rose"):
        shelf.point(name, "champion", 1)
        host.load(name, "champion")
    answer = shelf.registry.answer

    def refuse(address: str) -> tuple[int, bytes]:
        return (403, b"{}") if "name=ash" in address else answer(address)

    monkeypatch.setattr(shelf.registry, "answer", refuse)
    shelf.point("rose", "champion", 2)
    eventually(lambda: host.answer("rose", "champion"), wanted="two")

    def problems() -> dict[str, str | None]:
        return {entry["model_name"]: entry["problem"] for entry in host.listing()}

    # It may have been asked just before it refused.
    eventually(lambda: "MLflow answered 403" in str(problems()["ash"]))
    assert problems()["rose"] is None
    assert host.answer("ash", "champion") == "ash"
    monkeypatch.setattr(shelf.registry, "answer", answer)
    eventually(lambda: [entry["problem"] for entry in host.listing()], wanted=[None, None])


def test_the_registry_is_asked_about_several_aliases_at_once(
    host: Host, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.put("rose", 2, "two")
    aliases = [f"alias{number}" for number in range(8)]
    for alias in aliases:
        shelf.point("rose", alias, 1)
        assert host.load("rose", alias).status_code == 200
    answer = shelf.registry.answer
    # Nobody gets an answer before as many ask.
    together, met = Barrier(4), Event()

    def meet(address: str) -> tuple[int, bytes]:
        with contextlib.suppress(BrokenBarrierError):
            together.wait()
            met.set()
        return answer(address)

    monkeypatch.setattr(shelf.registry, "answer", meet)
    try:
        assert met.wait(60)
    finally:
        together.abort()
    shelf.point("rose", aliases[-1], 2)
    eventually(lambda: host.answer("rose", aliases[-1]), wanted="two")


def test_a_deleted_alias_goes_on_and_says_so(host: Host, shelf: Shelf) -> None:
    shelf.point("rose", "champion", 1)
    host.load("rose", "champion")
    shelf.point("rose", "champion", None)
    eventually(lambda: "no model 'rose' with an alias" in str(host.listing()[0]["problem"]))
    assert host.answer("rose", "champion") == "one"
    shelf.point("rose", "champion", 1)
    eventually(lambda: host.listing()[0]["problem"], wanted=None)


def test_an_alias_means_the_same_with_both_flavors(host: Host, shelf: Shelf) -> None:
    shelf.put("rose", 2, "two")
    shelf.point("rose", "champion", 1)
    for flavor in ("pyfunc", "sklearn"):
        assert host.answer("rose", "champion", flavor) == "one"
    shelf.point("rose", "champion", 2)
    for flavor in ("pyfunc", "sklearn"):
        eventually(partial(host.answer, "rose", "champion", flavor), wanted="two")
    assert host.unload("rose", "champion", "sklearn").json()["version"] == 2
    assert [entry["model_flavor"] for entry in host.listing()] == ["pyfunc"]
    assert host.answer("rose", "champion") == "two"


def test_a_version_asked_for_by_its_number_stays_when_an_alias_moves_away(
    host: Host, shelf: Shelf
) -> None:
    shelf.put("rose", 2, "two")
    shelf.point("rose", "champion", 1)
    host.load("rose", "champion")
    host.load("rose", 1)
    shelf.point("rose", "champion", 2)
    eventually(lambda: host.answer("rose", "champion"), wanted="two")
    assert host.states() == {("rose", 1): "ready", ("rose", 2): "ready"}


def test_a_version_that_an_alias_loaded_goes_with_it_though_it_is_asked_by_its_number(
    host: Host, shelf: Shelf
) -> None:
    shelf.put("rose", 2, "two")
    shelf.point("rose", "champion", 1)
    host.load("rose", "champion")
    assert host.answer("rose", 1) == "one"
    assert [entry["model_version_or_alias"] for entry in host.listing()] == ["champion"]
    shelf.point("rose", "champion", 2)
    eventually(host.states, wanted={("rose", 2): "ready"})
    # Asked now, that is a load by number.
    assert host.answer("rose", 1) == "one"
    assert [entry["model_version_or_alias"] for entry in host.listing()] == ["1", "champion"]


def test_a_version_made_anew_under_an_alias_takes_the_place_of_the_old_one(
    host: Host, shelf: Shelf
) -> None:
    shelf.point("rose", "champion", 1)
    host.load("rose", "champion")
    shelf.put("rose", 1, "another one")
    shelf.registry.created += 1
    eventually(lambda: host.answer("rose", "champion"), wanted="another one")
    assert len(host.runners()) == 1


def test_files_and_environments_that_nobody_used_for_long_are_removed(
    light: Settings, shelf: Shelf
) -> None:
    for name in ("rose", "oak"):
        shelf.put(name, 1, name, requirements=name)
    with running(light) as (host,):
        for name in ("rose", "oak"):
            assert host.load(name, 1).status_code == 200
        host.unload("oak", 1)
    folders = [
        folder
        for kind in ("models", "environments")
        for folder in (light.state_dir / kind).iterdir()
        if folder.is_dir()
    ]
    assert len(folders) == 4
    for folder in folders:
        os.utime(folder, (1000, 1000))
    with running(light) as (host,):
        eventually(lambda: [folder.exists() for folder in folders].count(True), wanted=2)
        assert host.answer("rose", 1) == "rose"
        assert host.answer("oak", 1) == "oak"


def test_after_a_reboot_no_environment_of_a_loaded_model_is_removed(
    light: Settings, shelf: Shelf, tmp_path: Path
) -> None:
    for name in ("rose", "oak"):
        shelf.put(name, 1, name, requirements=name)
    with running(light) as (host,):
        for name in ("oak", "rose"):
            assert host.load(name, 1).status_code == 200
        host.unload("oak", 1)
        (record,) = host.settings.sockets.glob("*.json")
    eventually(lambda: runners_of(light), wanted={})
    for kind in ("models", "environments"):
        for folder in (light.state_dir / kind).iterdir():
            # As after years without a start.
            os.utime(folder, (1000, 1000))
    shutil.rmtree(light.sockets)
    uv_log = tmp_path / "uv.log"
    uv_log.write_text("")
    # Tidied before it is started.
    with exclusive(record.with_suffix(".lock"), 0.0, "it"), running(light) as (host,):
        files = light.state_dir / "models"
        eventually(lambda: sum(folder.is_dir() for folder in files.iterdir()), wanted=1)
        environments = [one for one in (light.state_dir / "environments").iterdir() if one.is_dir()]
        assert [(one / "requirements.txt").read_text() for one in environments] == ["rose\n"]
    with running(light) as (host,):
        eventually(lambda: host.answer("rose", 1), wanted="rose")
    assert uv_log.read_text() == ""


# Idle models and the memory budget.


def test_an_idle_model_gives_its_memory_back_until_it_is_asked(
    light: Settings, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.put("rose", 1, "one")
    # As often within the idle time as with real settings.
    monkeypatch.setattr(serving, "_TOUCH_SECONDS", 0.2)
    with running(light.model_copy(update={"idle_unload_seconds": 1})) as (host,):
        host.load("rose", 1)
        eventually(host.states, wanted={("rose", 1): "stopped"})
        assert host.runners() == {}
        assert host.listing()[0]["memory_bytes"] is None
        assert host.answer("rose", 1) == "one"
        # In use, it stays, unless this process stood still for as long as is idle.
        (runner,) = host.runners()
        stays, longest, last = True, 0.0, time.monotonic()
        until = last + 3
        while last < until:
            assert host.answer("rose", 1) == "one"
            stays = runner in host.runners() and host.states() == {("rose", 1): "ready"}
            now = time.monotonic()
            longest, last = max(longest, now - last), now
        assert stays or longest > 0.7


def test_without_a_version_an_idle_one_is_meant_like_any_other(
    light: Settings, shelf: Shelf
) -> None:
    for version, answer in ((1, "one"), (2, "two")):
        shelf.put("rose", version, answer)
    with running(light.model_copy(update={"idle_unload_seconds": 1})) as (host,):
        for version in (1, 2):
            host.load("rose", version)
        eventually(lambda: host.states()["rose", 2], wanted="stopped")
        assert host.answer("rose", 1) == "one"
        assert host.infer("rose") == "two"


@pytest.mark.parametrize("path", ["/ready", ""])
def test_whoever_waits_for_an_idle_model_to_be_ready_gets_there(
    light: Settings, shelf: Shelf, path: str
) -> None:
    """Clients of V2 look whether a model is ready, or what it takes, before they ask it."""
    shelf.put("rose", 1, "one")
    with running(light.model_copy(update={"idle_unload_seconds": 1})) as (host,):
        host.load("rose", 1)
        eventually(host.states, wanted={("rose", 1): "stopped"})
        eventually(lambda: host.described("rose", path).status_code, wanted=200, seconds=20)
        # Nothing is loaded by such a question.
        assert host.unload("rose", 1).status_code == 200
        assert host.described("rose", path).status_code == 404


def test_a_model_that_answers_for_long_is_not_idle(
    light: Settings, shelf: Shelf, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.put("rose", 1, "one", predict=gate.load)
    shelf.put("oak", 1, "oak")
    monkeypatch.setattr(serving, "_TOUCH_SECONDS", 0.2)
    # Longer than a busy machine keeps this process from telling that it is used.
    settings = light.model_copy(update={"idle_unload_seconds": 3, "stop_timeout_seconds": 0.2})
    with running(settings) as (host,), ThreadPoolExecutor(1) as threads:
        host.load("rose", 1)
        asked = threads.submit(host.answer, "rose", 1)
        held = gate.wait()
        # What came later and is idle goes twice; by then, the one that answers would have gone.
        for _ in range(2):
            assert host.answer("oak", 1) == "oak"
            eventually(lambda: host.states()["oak", 1], wanted="stopped")
        os.close(held)
        assert asked.result() == "one"


@pytest.fixture
def heavy(shelf: Shelf) -> Shelf:
    """Three models of 40 MiB each, beside what Python takes."""
    for name in ("oak", "ash", "elm"):
        shelf.put(name, 1, name, load="ballast = os.urandom(40 * 2**20)")
    return shelf


def test_a_model_that_does_not_fit_is_refused(light: Settings, heavy: Shelf) -> None:
    assert heavy.registry.versions
    with running(light.model_copy(update={"memory_budget": 120 * 2**20})) as (host,):
        assert [host.load(name, 1).status_code for name in ("oak", "ash")] == [200, 200]
        answer = host.load("elm", 1)
        assert answer.status_code == 507
        assert "120 MiB" in answer.json()["detail"]
        assert host.answer("elm", 1) == 507
        assert host.states() == {("ash", 1): "ready", ("oak", 1): "ready"}
        eventually(lambda: len(host.runners()), wanted=2)
        host.unload("oak", 1)
        assert host.answer("elm", 1) == "elm"


def test_the_model_used_least_recently_makes_room(light: Settings, heavy: Shelf) -> None:
    assert heavy.registry.versions
    settings = light.model_copy(
        update={"memory_budget": 120 * 2**20, "memory_policy": "unload_least_recent"}
    )
    with running(settings) as (host,):
        for name in ("oak", "ash"):
            assert host.load(name, 1).status_code == 200
        assert host.answer("elm", 1) == "elm"
        assert host.states() == {("ash", 1): "ready", ("elm", 1): "ready", ("oak", 1): "stopped"}
        assert host.answer("oak", 1) == "oak"
        assert host.states() == {("ash", 1): "stopped", ("elm", 1): "ready", ("oak", 1): "ready"}
        assert len(host.runners()) == 2
    alone = settings.model_copy(update={"memory_budget": 30 * 2**20})
    eventually(lambda: runners_of(light), wanted={})
    with running(alone) as (host,):
        assert host.answer("oak", 1) == 507


def test_a_new_version_does_not_take_the_room_of_the_one_that_answers(
    light: Settings, heavy: Shelf
) -> None:
    heavy.put("oak", 2, "another oak", load="ballast = os.urandom(40 * 2**20)")
    heavy.point("oak", "champion", 1)
    settings = light.model_copy(
        update={"memory_budget": 80 * 2**20, "memory_policy": "unload_least_recent"}
    )
    with running(settings) as (host,):
        host.load("oak", "champion")
        (runner,) = host.runners()
        heavy.point("oak", "champion", 2)
        eventually(lambda: "needs" in str(host.listing()[0]["problem"]))
        assert host.answer("oak", "champion") == "oak"
        assert runner in host.runners()
