"""What an operator asks of a component's service: does it run exactly what was installed?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faults
import playbook
import pytest
import requests
import scenario
import yaml

PLAY = Path(__file__).parents[1] / "converge.yml"
FILES = PLAY.parent / "files"
OLDER = str(FILES / "requirements-older.txt")
UNIT = "odsp-probe.service"
HOME = "/opt/odsp/probe"
DAY = 86400


def play(*arguments: str, sources: list[Path] | None = None, **inputs: Any) -> playbook.Run:
    """Run the role as the scenario's converge step did, with other inputs."""
    return playbook.play(PLAY, "--skip-tags", "base", *arguments, sources=sources or (), **inputs)


def converge(*arguments: str, sources: list[Path] | None = None, **inputs: Any) -> int:
    """Run the role with other inputs, which must succeed; return its changes."""
    return scenario.changed(play(*arguments, sources=sources, **inputs))


def ask(host: Any, question: str = "") -> dict[str, Any]:
    """Return what the service says about itself."""
    address = host.ansible.get_variables()["odsp_address"]
    answer = requests.get(f"http://{address}:8080/?{question}", timeout=60)
    answer.raise_for_status()
    return dict(answer.json())


def wait_for_answer(host: Any) -> dict[str, Any]:
    """Return the first answer of a service that is being started."""

    def answers() -> bool:
        """Tell whether the service answers."""
        try:
            return bool(ask(host))
        except requests.RequestException:
            return False

    scenario.wait_until(answers)
    return ask(host)


def environments(host: Any) -> list[str]:
    """Return the environments that are on the disk, and where the link leads."""
    return sorted(host.check_output(f"ls {HOME}; readlink {HOME}/current").split())


def in_force(host: Any) -> list[str]:
    """Return what the process and the kernel know of each input that tests change."""
    answer = wait_for_answer(host)
    limit = host.check_output(f"systemctl show --value --property MemoryMax {UNIT}")
    known = (answer["environment"]["VALUE"], answer["settings"], answer["waitress"], limit)
    return [str(value) for value in known]


@contextmanager
def other(host: Any, **inputs: Any) -> Iterator[None]:
    """Converge with other inputs; those of the scenario come back."""
    try:
        assert converge(**inputs) >= 1
        wait_for_answer(host)
        yield
    finally:
        converge()
        wait_for_answer(host)


def test_environment_is_exactly_the_lock(host: Any) -> None:
    """The process runs in the environment the link names, and there is what the lock lists."""
    answer, current = ask(host), host.check_output(f"readlink -f {HOME}/current")
    assert answer["prefix"] == current
    uv = "/opt/odsp/uv/current/uv"
    listed = host.check_output(f"{uv} pip freeze --python {current}/bin/python").split()
    assert listed == ["waitress==3.0.2"]
    refused = host.run(f"LC_ALL=C setpriv --reuid probe --clear-groups touch {current}/x")
    assert "Permission denied" in refused.stderr


def test_values_reach_the_process_as_written(host: Any) -> None:
    """Quotes, backslashes, dollars, percent signs, lines: nothing is taken for anything else."""
    wanted = yaml.safe_load(PLAY.read_text())[0]["vars"]["probe_values"]
    found = ask(host)["environment"]
    assert {name: found.get(name) for name in wanted} == wanted
    assert found["SECRET"] == "not-a-secret-of-probe"


def test_secret_is_private(host: Any) -> None:
    """No secret in arguments, the journal or a file that everyone may read."""
    assert scenario.places_of(host, "not-a-secret-of-probe") == []
    file = host.file("/etc/odsp/probe.env")
    assert (file.user, file.group, file.mode) == ("root", "probe", 0o640)
    shown = "systemctl show --property Environment,ExecStart"
    as_nobody = f"setpriv --reuid nobody --clear-groups {shown} {UNIT}"
    assert "not-a-secret" not in host.check_output(as_nobody)


def test_service_is_confined(host: Any) -> None:
    """It writes to its state and nowhere else, and its account opens no session."""
    scenario.assert_confined(host, UNIT, "probe", exposure=1.5)
    for path in ("/var/lib/odsp/probe/x", "/tmp/x", "/var/cache/odsp/probe/x"):
        assert ask(host, f"write={path}")["written"] == "written", path
    for path in ("/etc/odsp/x", "/opt/odsp/probe_app.py", "/home/x", "/var/lib/odsp/x", "/dev/x"):
        assert ask(host, f"write={path}")["written"] in ("EROFS", "EACCES"), path
    assert not host.file("/tmp/x").exists
    assert host.user("probe").shell == "/usr/sbin/nologin"
    host.check_output("rm /var/lib/odsp/probe/x /var/cache/odsp/probe/x")


def test_change_is_in_force_at_once(host: Any) -> None:
    """What changed is known to the running process, by a restart of this unit alone."""
    changes = [
        {"probe_value": "changed"},
        {"probe_settings": "changed"},
        {"python_service_requirements": OLDER},
        {"python_service_memory_max": "256M"},
    ]
    former = ["plain", "first", "3.0.2", str(192 * 2**20)]
    wanted = ["changed", "changed", "3.0.1", str(256 * 2**20)]
    inputs: dict[str, Any] = {}
    together: dict[str, Any] = {name: value for change in changes for name, value in change.items()}
    before = scenario.units(host)
    assert converge("--check", **together) == len(changes)
    assert scenario.restarted(before, scenario.units(host)) == set()
    assert in_force(host) == former
    try:
        for number, change in enumerate(changes, 1):
            inputs |= change
            assert converge(**inputs) == 2
            assert in_force(host) == wanted[:number] + former[number:]
            after = scenario.units(host)
            assert scenario.restarted(before, after) == {UNIT}
            before = after
    finally:
        back = converge()
    assert back == len(changes) + 1
    assert in_force(host) == former
    assert scenario.restarted(before, scenario.units(host)) == {UNIT}


@pytest.mark.once
def test_reload_is_enough_where_the_role_says_so(host: Any) -> None:
    """A service that can reload keeps its process when only such a file changed."""

    def reloaded() -> bool:
        """Tell whether the process has read its settings again."""
        return bool(ask(host)["settings"] == "reloaded")

    def as_before() -> bool:
        """Tell whether the process has read its former settings again."""
        return bool(ask(host)["settings"] == "first")

    before, pid = scenario.units(host), ask(host)["pid"]
    try:
        assert converge(python_service_reload=True, probe_settings="reloaded") == 2
        scenario.wait_until(reloaded)
    finally:
        back = converge(python_service_reload=True)
    assert back == 2
    scenario.wait_until(as_before)
    assert ask(host)["pid"] == pid
    assert scenario.restarted(before, scenario.units(host)) == set()


@pytest.mark.long
@pytest.mark.parametrize(
    "left",
    [
        "touch /etc/odsp/probe.env",
        "touch /etc/odsp/probe.conf",
        "touch /etc/odsp/openssl.cnf",
        f"touch /etc/systemd/system/{UNIT}",
        f"ln -sfn $(readlink {HOME}/current) {HOME}/current",
    ],
    ids=["environment file", "file it depends on", "OpenSSL's settings", "unit", "environment"],
)
def test_restart_that_a_run_still_owes_is_made_up_for(host: Any, left: str) -> None:
    """A run that was cut off between a change and the restart: the next one restarts, once."""
    before = scenario.units(host)
    host.check_output(left)
    assert converge() == 1
    assert scenario.restarted(before, scenario.units(host)) == {UNIT}
    wait_for_answer(host)


@pytest.mark.long
def test_stopped_and_disabled_service_is_back(host: Any) -> None:
    """However it was left, after a run the unit is enabled and answers."""
    host.check_output(f"systemctl disable --now --quiet {UNIT}")
    assert converge() == 1
    wait_for_answer(host)
    assert host.service(UNIT).is_enabled


@pytest.mark.once
@pytest.mark.parametrize(
    ("find", "replace", "reason"),
    [
        ("sha256:", "sha256:00000000", "Hash mismatch for `waitress==3.0.1`"),
        (" \\\n    --hash", "  # --hash", "must have a hash"),
    ],
    ids=["tampered hash", "no hash"],
)
def test_lock_that_does_not_hold_is_refused(
    host: Any, tmp_path: Path, find: str, replace: str, reason: str
) -> None:
    """Files other than the lock's are not installed; the old environment serves on."""
    lock = tmp_path / "requirements.txt"
    text = Path(OLDER).read_text().replace(find, replace)
    for word in [word for word in text.split() if word.startswith("--hash=")]:
        text = text.replace(word, word[:78])
    lock.write_text(text)
    before, units = environments(host), scenario.units(host)
    run = play(python_service_requirements=str(lock))
    assert run.returncode != 0
    assert reason in " ".join(run.stdout.split())
    assert environments(host) == before
    assert scenario.restarted(units, scenario.units(host)) == set()
    assert ask(host)["waitress"] == "3.0.2"


@pytest.mark.long
def test_interrupted_installation_is_begun_anew(host: Any) -> None:
    """Half an environment, left by a run that was killed, does not count as one."""
    inputs: dict[str, Any] = {"python_service_requirements": OLDER}
    with other(host, **inputs):
        older = host.check_output(f"readlink -f {HOME}/current")
    host.check_output(f"rm -r {older}/complete {older}/lib/python3*/site-packages/waitress")
    with other(host, **inputs):
        assert host.check_output(f"readlink -f {HOME}/current") == older
        assert ask(host)["waitress"] == "3.0.1"
    # Two environments and the link: the one in use and the one before.
    assert len(environments(host)) == 4


def test_killed_service_comes_back(host: Any) -> None:
    """What was shot is started anew."""
    pid = ask(host)["pid"]
    scenario.kill(host, UNIT)
    assert wait_for_answer(host)["pid"] != pid


def test_service_survives_a_reboot(host: Any) -> None:
    """After a restart of the host it serves, on what was installed; a further run does nothing."""
    scenario.reboot(host)
    pid, before = wait_for_answer(host)["pid"], scenario.units(host)
    assert converge() == 0
    assert scenario.restarted(before, scenario.units(host)) == set()
    assert (ask(host)["pid"], ask(host)["waitress"]) == (pid, "3.0.2")


@pytest.mark.fault("out of memory", "The kernel ends it at its limit and systemd starts it anew.")
def test_memory_limit_ends_and_restarts_it(host: Any, measured: Callable[[str], None]) -> None:
    """A process that takes more than MemoryMax is ended, nothing else, and is soon back."""
    faults.eat_memory(host, UNIT)
    # On hosts with cgroup v2 systemd starts the unit anew for that, a moment later.
    host.check_output(f"systemctl restart {UNIT}")
    pid = wait_for_answer(host)["pid"]
    with faults.memory_limit(host, UNIT, 96):
        assert ask(host, "eat=16")["pid"] == pid
        started = time.monotonic()
        with pytest.raises(requests.ConnectionError):
            ask(host, "eat=96")
        ended = time.monotonic() - started
        assert wait_for_answer(host)["pid"] != pid
        back = time.monotonic() - started - ended
    measured(f"Ended within {ended:.1f} s of growing over its limit, answered {back:.1f} s later.")


@pytest.mark.fault("full disk", "An upgrade that finds no room fails; the old release serves on.")
def test_full_disk_leaves_the_old_environment(host: Any, measured: Callable[[str], None]) -> None:
    """A new environment that does not fit leaves nothing behind; with room, it is installed."""
    inputs: dict[str, Any] = {"python_service_requirements": OLDER}
    others = f"find {HOME} -mindepth 1 -maxdepth 1 -type d ! -name $(readlink {HOME}/current)"
    host.check_output(f"{others} -exec rm -r {{}} +")
    with faults.full_disk(host, UNIT, HOME, mib=8) as disk:
        pid, before = wait_for_answer(host)["pid"], environments(host)
        host.check_output(
            f"fallocate -l $(($(stat -f -c '%a*%S' {HOME}) - 200000)) {HOME}/.odsp-filler"
        )
        started = time.monotonic()
        run = play(**inputs)
        failed = time.monotonic() - started
        assert run.returncode != 0
        assert "No space left" in run.stdout
        assert environments(host) == before
        assert ask(host)["pid"] == pid
        disk.free()
        started = time.monotonic()
        assert converge(**inputs) == 2
        assert wait_for_answer(host)["waitress"] == "3.0.1"
        upgraded = time.monotonic() - started
    assert wait_for_answer(host)["waitress"] == "3.0.2"
    measured(
        f"The run failed after {failed:.0f} s and left nothing behind, the process went on; with "
        f"room again the new release answered after {upgraded:.0f} s."
    )


@pytest.mark.fault(
    "clock jump",
    "That the host's clock was set a day back or forth since the unit's start restarts nothing.",
)
def test_clock_that_was_set_restarts_nothing(
    host: Any, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    """What the unit was started from may seem to be of tomorrow: that is no change."""
    before, pid = scenario.units(host), ask(host)["pid"]
    with faults.clock_of_modules(host, tmp_path) as clock:
        changes = []
        for seconds in (-DAY, DAY):
            clock.jump(seconds)
            changes.append(converge(sources=clock.sources))
    assert changes == [0, 0]
    assert scenario.restarted(before, scenario.units(host)) == set()
    assert ask(host)["pid"] == pid
    measured(f"A day behind a run changed {changes[0]} things, a day ahead {changes[1]}.")


@pytest.mark.once
def test_wrong_inputs_are_refused_in_one_sentence(tmp_path: Path) -> None:
    """It names the host, what is wrong and the remedy."""
    good = {"python_service_name": "probe", "python_service_exec_start": "/usr/bin/probe --all"}
    limits = ["1.5G", "0.5G", "100%", "80%", "infinity", "1073741824", 1073741824]
    wrong = ["lots", "2", "4GB", "101%", "0", "0G", "-1G", "80 %", ""]
    command = "the unit of probe has no command; name a program of the host by its whole path"
    variable = 'the environment of probe has "{}"; use letters, digits and _ for a name'
    cases: list[tuple[dict[str, Any], str]] = [
        *(({"python_service_memory_max": one}, "") for one in limits),
        ({"python_service_environment": {"MY_VALUE1": "1", "_": "$A"}}, ""),
        *(
            (
                {"python_service_memory_max": one},
                f'probe_memory_max is "{one}"; write a number with K, M, G or T, a share of the',
            )
            for one in wrong
        ),
        ({"python_service_environment": {"MY-VALUE": "1"}}, variable.format("MY-VALUE")),
        ({"python_service_environment": {"1ST": "1"}}, variable.format("1ST")),
        ({"python_service_exec_start": "waitress-serve"}, command),
        ({"python_service_exec_start": ""}, command),
    ]
    said = scenario.sentences("python_service", [good | inputs for inputs, _ in cases], tmp_path)
    for number, (inputs, sentence) in enumerate(cases):
        assert bool(said[number]) == bool(sentence), (inputs, said[number])
        if sentence:
            assert said[number].startswith(f"case-{number}: {sentence}"), said[number]
            assert said[number].endswith("."), said[number]


@pytest.mark.once
def test_wrong_input_changes_nothing(host: Any) -> None:
    """The run ends before anything of the unit is touched."""
    before = scenario.units(host)
    run = play(python_service_memory_max="lots", probe_value="changed")
    assert run.returncode != 0
    assert 'node-1: probe_memory_max is "lots"' in run.stdout
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert scenario.restarted(before, scenario.units(host)) == set()
    assert in_force(host)[0] == "plain"


@pytest.mark.long
def test_unit_that_systemd_would_refuse_does_not_land(host: Any) -> None:
    """A program that is not there leaves the old unit, and the old process, in place."""
    before, text = scenario.units(host), f"cat /etc/systemd/system/{UNIT}"
    unit = host.check_output(text)
    run = play(python_service_exec_start=f"{HOME}/current/bin/nowhere")
    assert run.returncode != 0
    assert f"{HOME}/current/bin/nowhere" in run.stdout
    assert host.check_output(text) == unit
    assert scenario.restarted(before, scenario.units(host)) == set()
