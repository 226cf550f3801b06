"""The repository as its policy tests read it. A question that finds nothing fails."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

ROOT = Path(__file__).resolve().parents[3]
#: Roles that components build on; they are no groups of an inventory.
INTERNAL = ("base", "certificates", "python_service")

Item = TypeVar("Item")


def some(items: Iterable[Item]) -> list[Item]:
    """Return the items as a list; an empty one would make its test true for nothing."""
    result = list(items)
    assert result, "the question found nothing to ask about"
    return result


def load(path: Path) -> Any:
    """Return what a YAML file says."""
    return yaml.safe_load(path.read_text())


@cache
def tracked() -> tuple[Path, ...]:
    """Return every file that belongs to the repository, tracked or about to be."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
    ).stdout  # fmt: skip
    files = (ROOT / name for name in listed.split("\0") if name)
    return tuple(some(sorted(file for file in files if file.is_file())))


def below(*parts: str, suffix: str = "") -> list[Path]:
    """Return the repository's files below a folder whose names end in `suffix`, at least one."""
    folder = ROOT.joinpath(*parts)
    return some(f for f in tracked() if f.is_relative_to(folder) and f.name.endswith(suffix))


def name_of(path: Path) -> str:
    """Return how a message names a file."""
    return str(path.relative_to(ROOT))


#: The components, in the order of the contract.
PUBLIC: tuple[str, ...] = tuple(some(load(ROOT / "inventories/common/groups.yml")))
ROLES: tuple[str, ...] = (*PUBLIC, *INTERNAL)


def specification(role: str) -> dict[str, dict[str, Any]]:
    """Return the options of all of a role's entry points, merged."""
    entries = load(ROOT / "roles" / role / "meta/argument_specs.yml")["argument_specs"]
    merged: dict[str, dict[str, Any]] = {}
    for entry in some(entries.values()):
        for option, facts in entry.get("options", {}).items():
            known = merged.setdefault(option, facts)
            assert known == facts, f"{role}: the entry points describe {option} differently"
    return merged


def defaults(role: str) -> dict[str, Any]:
    """Return a role's defaults; a role may have none."""
    path = ROOT / "roles" / role / "defaults/main.yml"
    return (load(path) or {}) if path.exists() else {}


def tasks(role: str) -> list[tuple[Path, dict[str, Any]]]:
    """Return every task of a role with its file, those within blocks included."""

    def flat(entries: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
        for entry in entries:
            yield entry
            for part in ("block", "rescue", "always"):
                yield from flat(entry.get(part, []))

    found = [(f, t) for f in below("roles", role, "tasks", suffix=".yml") for t in flat(load(f))]
    return some(found)


def plays() -> list[tuple[Path, dict[str, Any]]]:
    """Return the plays of the layers: those that give hosts of a group their role."""
    files = [f for f in below("playbooks", suffix=".yml") if f.parent.name == "playbooks"]
    return some((f, play) for f in files for play in load(f) if "roles" in play)
