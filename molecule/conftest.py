"""What every scenario's tests start from: hosts that testinfra can reach, variables resolved."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

import playbook
import pytest


def pytest_sessionstart(session: pytest.Session) -> None:
    """Within a scenario, write the inventory testinfra reads before it looks for hosts."""
    inventory = session.config.getoption("--ansible-inventory", default=None)
    if not inventory or "MOLECULE_INVENTORY_FILE" not in os.environ:
        return
    command = ["ansible-playbook", str(playbook.ROOT / "molecule/_shared/testinfra.yml")]
    for source in playbook.inventories():
        command += ["--inventory", str(source)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.exit(f"the inventory cannot be resolved:\n{done.stdout}{done.stderr}", returncode=2)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave to `make test-all` what is long, and on the older release what Debian 13 was asked."""
    if os.environ.get("ODSP_LONG_TESTS"):
        return
    older = os.environ.get("ODSP_DEBIAN_RELEASE") == "bookworm"
    left = {"long", "fault", "once"} if older else {"long"}
    later = [item for item in items if left & {mark.name for mark in item.iter_markers()}]
    if later:
        config.hook.pytest_deselected(items=later)
        items[:] = [item for item in items if item not in later]


@pytest.fixture
def measured(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Callable[[str], None]:
    """Return what a test of a fault tells its measurement to; the report carries it on."""
    marker = request.node.get_closest_marker("fault")
    assert marker is not None, "only a test of a fault measures"
    record_property("fault", marker.args[0])

    def note(text: str) -> None:
        record_property("measured", text)

    return note
