"""What every component's tests ask: is it confined, is its secret private, does it survive?"""

from __future__ import annotations

import base64
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CA = "/etc/odsp/tls/ca.crt"


def journal(host: Any, unit: str) -> str:
    """Return the unit's last lines, for the message of a failed assertion."""
    return str(host.run(f"journalctl --no-pager --unit {unit} --lines 50").stdout)


def assert_confined(host: Any, unit: str, user: str) -> None:
    """The unit runs, comes back after a reboot, and cannot touch the rest of the host."""
    service = host.service(unit)
    assert service.is_enabled, unit
    assert service.is_running, journal(host, unit)
    properties = service.systemd_properties
    assert properties["User"] == user
    assert properties["ProtectSystem"] == "strict"
    assert properties["NoNewPrivileges"] == "yes"
    # systemd shows an empty list as no line at all.
    assert properties.get("CapabilityBoundingSet", "") == ""


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


def site(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the platform's playbook on the scenario's hosts, as its converge step did."""
    sources = [
        ROOT / "inventories/common",
        ROOT / "molecule/_shared/inventory",
        Path(os.environ["ODSP_STATE_DIR"]) / "secrets",
        Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent,
    ]
    inventories = [part for source in sources for part in ("--inventory", str(source))]
    return subprocess.run(
        ["ansible-playbook", str(ROOT / "playbooks/site.yml"), *inventories, *arguments],
        check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1"},
    )  # fmt: skip
