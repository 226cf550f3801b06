"""What an operator asks of a component's service: does it run exactly what was installed?"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faults
import pytest
import requests
import scenario
import yaml

FILES = Path(__file__).parents[1] / "files"
UNIT = "odsp-probe.service"
HOME = "/opt/odsp/probe"
MEMORY_MAX_MIB = 192
#: The score of the common confinement, which leaves the network open.
EXPOSURE = 1.5


def converge(*arguments: str, **inputs: Any) -> subprocess.CompletedProcess[str]:
    """Run the role as the scenario's converge step did, with other inputs; no secret is told."""
    sources = [
        scenario.ROOT / "inventories/common",
        scenario.ROOT / "molecule/_shared/inventory",
        Path(os.environ["ODSP_STATE_DIR"]) / "secrets",
        Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent,
    ]
    playbook = Path(__file__).parents[1] / "converge.yml"
    command = ["ansible-playbook", str(playbook), "--diff", "--skip-tags", "base"]
    command += [part for source in sources for part in ("--inventory", str(source))]
    run = subprocess.run(
        [*command, "--extra-vars", json.dumps(inputs), *arguments],
        check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1"},
    )  # fmt: skip
    assert "not-a-secret" not in run.stdout + run.stderr
    return run


def changed(run: subprocess.CompletedProcess[str]) -> int:
    """Return how many changes a successful run made."""
    assert run.returncode == 0, run.stdout + run.stderr
    return scenario.recap(run)["node-1"]["changed"]


def ask(host: Any, question: str = "") -> dict[str, Any]:
    """Return what the service says about itself."""
    address = host.ansible.get_variables()["odsp_address"]
    answer = requests.get(f"http://{address}:8080/?{question}", timeout=10)
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


@contextmanager
def other(host: Any, **inputs: Any) -> Iterator[None]:
    """Converge with other inputs; those of the scenario come back."""
    try:
        assert changed(converge(**inputs)) >= 1
        wait_for_answer(host)
        yield
    finally:
        back = converge()
        assert back.returncode == 0, back.stdout
        wait_for_answer(host)


def test_environment_is_exactly_the_lock(host: Any) -> None:
    """The process runs in the environment the link names, and there is what the lock lists."""
    answer, current = ask(host), host.check_output(f"readlink -f {HOME}/current")
    assert answer["prefix"] == current
    uv = "/opt/odsp/uv/current/uv"
    listed = host.check_output(f"{uv} pip freeze --python {current}/bin/python").split()
    assert listed == ["waitress==3.0.2"]
    assert host.run(f"setpriv --reuid probe --clear-groups touch {current}/x").rc != 0


def test_values_reach_the_process_as_written(host: Any) -> None:
    """Quotes, backslashes, dollars, percent signs, lines: nothing is taken for anything else."""
    play = yaml.safe_load((FILES.parent / "converge.yml").read_text())[0]
    wanted = play["vars"]["probe_values"]
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
    scenario.assert_confined(host, UNIT, "probe", EXPOSURE)
    for path in ("/var/lib/odsp/probe/x", "/tmp/x", "/var/cache/odsp/probe/x"):
        assert ask(host, f"write={path}")["written"] == "written", path
    for path in ("/etc/odsp/x", "/opt/odsp/probe_app.py", "/home/x", "/var/lib/odsp/x", "/dev/x"):
        assert "Error" in ask(host, f"write={path}")["written"], path
    assert not host.file("/tmp/x").exists
    assert host.user("probe").shell == "/usr/sbin/nologin"
    host.check_output("rm /var/lib/odsp/probe/x /var/cache/odsp/probe/x")


def test_nothing_restarts_when_nothing_changed(host: Any) -> None:
    """A further run leaves the process alone."""
    before = scenario.units(host)
    assert changed(converge()) == 0
    assert scenario.restarted(before, scenario.units(host)) == set()


@pytest.mark.once
@pytest.mark.parametrize(
    ("inputs", "question"),
    [
        ({"probe_value": "changed"}, lambda answer: answer["environment"]["VALUE"] == "changed"),
        ({"probe_settings": "changed"}, lambda answer: answer["settings"] == "changed"),
        (
            {"python_service_requirements": str(FILES / "requirements-older.txt")},
            lambda answer: answer["waitress"] == "3.0.1",
        ),
    ],
    ids=["environment file", "file it depends on", "lock"],
)
def test_change_is_in_force_at_once(
    host: Any, inputs: dict[str, str], question: Callable[[dict[str, Any]], bool]
) -> None:
    """What changed is seen in the running process, by one restart of this unit alone."""
    before = scenario.units(host)
    dry = converge("--check", **inputs)
    assert changed(dry) >= 1
    assert scenario.restarted(before, scenario.units(host)) == set()
    assert not question(ask(host))
    with other(host, **inputs):
        after = scenario.units(host)
        assert scenario.restarted(before, after) == {UNIT}
        assert question(ask(host)), ask(host)
    assert not question(ask(host))


def test_changed_limit_is_in_force_at_once(host: Any) -> None:
    """The kernel knows the new limit once the run is over."""
    limit = f"systemctl show --value --property MemoryMax {UNIT}"
    with other(host, python_service_memory_max="256M"):
        assert host.check_output(limit) == str(256 * 2**20)
    assert host.check_output(limit) == str(MEMORY_MAX_MIB * 2**20)


@pytest.mark.once
def test_reload_is_enough_where_the_role_says_so(host: Any) -> None:
    """A service that can reload keeps its process when only such a file changed."""
    before, pid = scenario.units(host), ask(host)["pid"]
    try:
        run = converge(python_service_reload=True, probe_settings="reloaded")
        assert changed(run) == 2
        scenario.wait_until(lambda: ask(host)["settings"] == "reloaded")
        assert ask(host)["pid"] == pid
        assert scenario.restarted(before, scenario.units(host)) == set()
    finally:
        back = converge(python_service_reload=True)
    assert changed(back) == 2
    scenario.wait_until(lambda: ask(host)["settings"] == "first")


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
    assert changed(converge()) == 1
    assert scenario.restarted(before, scenario.units(host)) == {UNIT}
    wait_for_answer(host)


@pytest.mark.long
def test_stopped_and_disabled_service_is_back(host: Any) -> None:
    """However it was left, after a run the unit is enabled and answers."""
    host.check_output(f"systemctl disable --now --quiet {UNIT}")
    assert changed(converge()) == 1
    wait_for_answer(host)
    assert host.service(UNIT).is_enabled


@pytest.mark.once
@pytest.mark.parametrize(
    ("find", "replace"),
    [("sha256:", "sha256:00000000"), (" \\\n    --hash", "  # --hash")],
    ids=["tampered hash", "no hash"],
)
def test_lock_that_does_not_hold_is_refused(
    host: Any, tmp_path: Path, find: str, replace: str
) -> None:
    """Files other than the lock's are not installed; the old environment serves on."""
    lock = tmp_path / "requirements.txt"
    text = (FILES / "requirements-older.txt").read_text().replace(find, replace)
    hashes = [word for word in text.split() if word.startswith("--hash=")]
    for word in hashes:
        text = text.replace(word, word[:78])
    lock.write_text(text)
    before, units = environments(host), scenario.units(host)
    run = converge(python_service_requirements=str(lock))
    assert run.returncode != 0
    assert "hash" in run.stdout
    assert environments(host) == before
    assert scenario.restarted(units, scenario.units(host)) == set()
    assert ask(host)["waitress"] == "3.0.2"


@pytest.mark.long
def test_interrupted_installation_is_begun_anew(host: Any) -> None:
    """Half an environment, left by a run that was killed, does not count as one."""
    inputs = {"python_service_requirements": str(FILES / "requirements-older.txt")}
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
    """After a restart of the host it serves, on what was installed."""
    scenario.reboot(host)
    assert wait_for_answer(host)["waitress"] == "3.0.2"
    assert changed(converge()) == 0


@pytest.mark.fault("out of memory", "The kernel ends it at its limit and systemd starts it anew.")
def test_memory_limit_ends_and_restarts_it(host: Any, measured: Callable[[str], None]) -> None:
    """A process that takes more than MemoryMax is ended, nothing else, and is soon back."""
    faults.eat_memory(host, UNIT)
    pid = wait_for_answer(host)["pid"]
    assert ask(host, "eat=32")["pid"] == pid
    with pytest.raises(requests.RequestException):
        ask(host, f"eat={MEMORY_MAX_MIB}")
    assert wait_for_answer(host)["pid"] != pid
    measured(f"ended at {MEMORY_MAX_MIB} MiB, answered again at once")


@pytest.mark.fault("full disk", "An upgrade that finds no room fails; the old release serves on.")
def test_full_disk_leaves_the_old_environment(host: Any, measured: Callable[[str], None]) -> None:
    """A new environment that does not fit leaves nothing behind; with room, it is installed."""
    inputs = {"python_service_requirements": str(FILES / "requirements-older.txt")}
    others = f"find {HOME} -mindepth 1 -maxdepth 1 -type d ! -name $(readlink {HOME}/current)"
    host.check_output(f"{others} -exec rm -r {{}} +")
    with faults.full_disk(host, UNIT, HOME, mib=8) as disk:
        pid, before = wait_for_answer(host)["pid"], environments(host)
        host.check_output(
            f"fallocate -l $(($(stat -f -c '%a*%S' {HOME}) - 200000)) {HOME}/.odsp-filler"
        )
        run = converge(**inputs)
        assert run.returncode != 0
        assert "No space left" in run.stdout
        assert environments(host) == before
        assert ask(host)["pid"] == pid
        disk.free()
        assert changed(converge(**inputs)) == 2
        assert wait_for_answer(host)["waitress"] == "3.0.1"
    assert wait_for_answer(host)["waitress"] == "3.0.2"
    measured(
        "the run failed and left nothing behind, the process went on; with room again, upgraded"
    )


@pytest.mark.once
@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (
            {"python_service_memory_max": "lots"},
            'the memory limit of probe is "lots"; write a number with K, M, G or T, or infinity',
        ),
        (
            {"probe_values": {"MY-VALUE": "1"}},
            'the environment of probe has "MY-VALUE"; use letters, digits and _ for a name',
        ),
        (
            {"python_service_exec_start": "waitress-serve"},
            "the unit of probe has no command; name a program of the host by its whole path",
        ),
    ],
    ids=["limit", "variable", "command"],
)
def test_bad_input_stops_the_role(host: Any, inputs: dict[str, Any], sentence: str) -> None:
    """One sentence names the host, what is wrong and the remedy; nothing is changed."""
    before = scenario.units(host)
    run = converge(**inputs)
    assert run.returncode != 0
    assert f"node-1: {sentence}" in " ".join(run.stdout.split())
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert scenario.restarted(before, scenario.units(host)) == set()


@pytest.mark.long
def test_unit_that_systemd_would_refuse_does_not_land(host: Any) -> None:
    """A program that is not there leaves the old unit, and the old process, in place."""
    before, text = scenario.units(host), f"cat /etc/systemd/system/{UNIT}"
    unit = host.check_output(text)
    run = converge(python_service_exec_start=f"{HOME}/current/bin/nowhere")
    assert run.returncode != 0
    assert f"{HOME}/current/bin/nowhere" in run.stdout
    assert host.check_output(text) == unit
    assert scenario.restarted(before, scenario.units(host)) == set()
