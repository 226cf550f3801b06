"""What every component's tests ask: is it confined, is its secret private, does it survive?"""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What tests of faults use comes from here too.
from faults import (
    clock,
    eat_memory,
    expired_certificate,
    frozen,
    full_disk,
    secrets,
    stopped,
)

__all__ = [
    "assert_confined",
    "clock",
    "eat_memory",
    "expired_certificate",
    "frozen",
    "full_disk",
    "journal",
    "kill",
    "main_pid",
    "places_of",
    "reboot",
    "recap",
    "restarted",
    "secrets",
    "site",
    "stopped",
    "units",
    "wait_until",
]

ROOT = Path(__file__).resolve().parents[2]
CA = "/etc/odsp/tls/ca.crt"


def journal(host: Any, unit: str) -> str:
    """Return the unit's last lines, for the message of a failed assertion."""
    return str(host.run(f"journalctl --no-pager --unit {unit} --lines 50").stdout)


def assert_confined(host: Any, unit: str, user: str, exposure: float = 2.3) -> None:
    """The unit runs, is enabled, and cannot touch the rest of the host.

    `exposure` is the ceiling of systemd's own score: 0 is locked up, 10 is free.
    """
    service = host.service(unit)
    assert service.is_enabled, unit
    assert service.is_running, journal(host, unit)
    properties = service.systemd_properties
    assert properties["User"] == user
    assert properties["ProtectSystem"] == "strict"
    assert properties["NoNewPrivileges"] == "yes"
    # systemd shows an empty list as no line at all.
    assert properties.get("CapabilityBoundingSet", "") == ""
    verdict = host.check_output(f"systemd-analyze security --no-pager {unit} | tail -n 1")
    score = re.search(r"for \S+: ([0-9.]+) ", verdict)
    assert score, verdict
    assert float(score[1]) <= exposure, verdict


def wait_until(question: Callable[[], Any], seconds: float = 60) -> None:
    """Ask until the answer is yes; fail when it never is."""
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {question.__doc__}"
        time.sleep(0.5)


def main_pid(host: Any, unit: str) -> int:
    """Return the unit's main process, 0 while it has none."""
    return int(host.check_output(f"systemctl show --value --property MainPID {unit}"))


def kill(host: Any, unit: str) -> None:
    """Kill the unit's processes without warning and wait until systemd has started new ones."""
    before = main_pid(host, unit)
    host.check_output(f"systemctl kill --signal KILL {unit}")

    def restarted() -> bool:
        """Tell whether the unit runs again, as a new process."""
        return host.service(unit).is_running and main_pid(host, unit) not in (0, before)

    wait_until(restarted)


def places_of(host: Any, secret: str) -> list[str]:
    """Return where anyone on the host could read the secret: arguments, the journal, open files."""
    assert len(secret) >= 8, "too short to be looked for"
    needle, text = "/root/odsp-needle", base64.b64encode(secret.encode()).decode()
    host.check_output(f"umask 077; echo {text} | base64 -d > {needle}")
    try:
        looks = {
            "arguments": f"cat /proc/[0-9]*/cmdline 2>/dev/null | grep -acF -f {needle}",
            # Without sudo's lines: they quote the tests' own commands.
            "journal": rf"journalctl --no-pager | grep -v ' sudo\[' | grep -cF -f {needle}",
            "files": "find /etc /opt/odsp /run /tmp /usr/local /var -xdev -type f -perm -o=r "
            f"-exec grep -lF -f {needle} {{}} + 2>/dev/null",
        }
        answers = {place: host.run(look).stdout.strip() for place, look in looks.items()}
    finally:
        host.check_output(f"rm -f {needle}")
    return [f"{place}: {found}" for place, found in answers.items() if found not in ("", "0")]


def units(host: Any) -> dict[str, str]:
    """Return the platform's units on the host, each with what names its present run."""
    shown = host.check_output("systemctl show --property=Id,InvocationID 'odsp-*.service'")
    blocks = (dict(line.split("=", 1) for line in b.splitlines()) for b in shown.split("\n\n"))
    return {block["Id"]: block.get("InvocationID", "") for block in blocks if "Id" in block}


def restarted(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """Return the units that are running anew; a reload is no restart."""
    return {unit for unit in before | after if before.get(unit) != after.get(unit)}


def podman(*arguments: str) -> None:
    """Have podman do something to the scenario's containers."""
    sudo = [] if os.getuid() == 0 else ["sudo", "--preserve-env=CONTAINERS_CONF"]
    configuration = str(Path(os.environ["ODSP_STATE_DIR"]) / "containers.conf")
    environment = {**os.environ, "CONTAINERS_CONF": configuration}
    subprocess.run([*sudo, "podman", *arguments], check=True, capture_output=True, env=environment)


def reboot(host: Any, seconds: float = 120) -> None:
    """Restart the host and wait until it has started everything that it starts by itself."""
    machine = json.loads((Path(os.environ["ODSP_STATE_DIR"]) / "machine.json").read_text())
    name = host.backend.get_pytest_id().rsplit("://")[-1]
    podman("restart", "--time", "30", f"{machine['platform']}-{name}")

    def reachable() -> bool:
        """Tell whether the host takes SSH connections."""
        try:
            with socket.create_connection((machine["hosts"][name], 22), timeout=2) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    wait_until(reachable, seconds)

    def started() -> bool:
        """Tell whether systemd has no start job left."""
        try:
            state = host.run("systemctl is-system-running").stdout.strip()
        except RuntimeError:  # sshd was there before the accounts
            return False
        return state in ("running", "degraded")

    wait_until(started, seconds)


def site(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the platform's playbook on the scenario's hosts, as its converge step did.

    Whatever it comes to, its output must hold no secret.
    """
    sources = [
        ROOT / "inventories/common",
        ROOT / "molecule/_shared/inventory",
        Path(os.environ["ODSP_STATE_DIR"]) / "secrets",
        Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent,
    ]
    inventories = [part for source in sources for part in ("--inventory", str(source))]
    run = subprocess.run(
        ["ansible-playbook", str(ROOT / "playbooks/site.yml"), "--diff", *inventories, *arguments],
        check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"},
    )  # fmt: skip
    assert_no_secret(run.stdout + run.stderr)
    return run


def assert_no_secret(text: str) -> None:
    """None of the scenario's secrets, generated or written in its inventory, is in the text."""
    known = secrets()
    values = [v for k, v in known.items() if isinstance(v, str) and k != "vault_ca_certificate"]
    values += known.get("vault_user_passwords", {}).values()
    # Of a key, a line that is its own alone.
    needles = [value.splitlines()[1 if "PRIVATE KEY" in value else 0] for value in values]
    assert needles
    told = [f"{needle[:3]}…" for needle in needles if needle in text]
    told += re.findall(r"not-a-secret[-\w]*", text)
    assert told == [], f"Ansible's output tells {told}"


def recap(run: subprocess.CompletedProcess[str]) -> dict[str, dict[str, int]]:
    """Return what Ansible counted, host by host: ok, changed, failed and the rest."""
    lines = re.findall(r"^(\S+) +: (ok=.*)$", run.stdout, re.MULTILINE)
    assert lines, run.stdout[-2000:] + run.stderr[-2000:]
    counts = {host: dict(re.findall(r"(\w+)=(\d+)", text)) for host, text in lines}
    return {h: {name: int(n) for name, n in found.items()} for h, found in counts.items()}
