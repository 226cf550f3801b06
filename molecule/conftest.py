"""What every scenario's tests start from: hosts that testinfra can reach, variables resolved."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


def pytest_sessionstart(session: pytest.Session) -> None:
    """Within a scenario, write the inventory testinfra reads before it looks for hosts."""
    inventory = session.config.getoption("--ansible-inventory", default=None)
    if not inventory or "MOLECULE_INVENTORY_FILE" not in os.environ:
        return
    root = Path(__file__).parent.parent
    command = ["ansible-playbook", str(root / "molecule/_shared/testinfra.yml")]
    for source in (
        root / "inventories/common",
        root / "molecule/_shared/inventory",
        Path(os.environ["ODSP_STATE_DIR"]) / "secrets",
        Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent,
    ):
        command += ["--inventory", str(source)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.exit(f"the inventory cannot be resolved:\n{done.stdout}{done.stderr}", returncode=2)
