"""Every role's README is one screen, complete, and its inputs are those of the specification."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from house import PUBLIC, ROLES, ROOT, specification

SECTIONS = ["Needs", "Inputs", "Example", "Upgrade", "Test"]


def test_inputs_are_generated() -> None:
    """The tables between the marks are what `make docs` writes."""
    command = [sys.executable, str(ROOT / "docs/role_readmes.py"), "--check"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"run `make docs`: {done.stdout}{done.stderr}"


@pytest.mark.parametrize("role", ROLES)
def test_readme_is_complete(role: str) -> None:
    """One sentence, a box, and the sections in their order."""
    text = (ROOT / "roles" / role / "README.md").read_text()
    assert text.startswith(f"# {role}\n\n")
    found = [s for s in re.findall(r"^## (.+)$", text, re.MULTILINE) if s in SECTIONS]
    assert found == SECTIONS
    for option in specification(role):
        assert f"| `{option}` |" in text, option
    if role in PUBLIC:
        assert f"odsp-{role}.service" in text
        assert f"molecule test -s {role}" in text
