"""The platform that the scenario's own inventory describes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from topology import Platform, read_topology


@pytest.fixture(scope="session")
def platform() -> Platform:
    """Return the platform as it was converged."""
    inventory = Path(os.environ["MOLECULE_INVENTORY_FILE"])
    return Platform(read_topology(inventory), inventory.parent)
