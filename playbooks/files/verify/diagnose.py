"""Look behind a broken link: states of units on this host, last lines of their journals."""

from __future__ import annotations

import subprocess

from link import INPUTS, tell_facts


def output(*command: str) -> str:
    """Return what a program printed."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


units = {}
for unit in INPUTS["units"]:
    journal = output(
        "journalctl", "--no-pager", "--lines=15", "--output=short-iso", f"--unit={unit}"
    )
    units[unit] = {"state": output("systemctl", "is-active", unit), "journal": journal}
tell_facts(units=units)
