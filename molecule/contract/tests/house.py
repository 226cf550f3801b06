"""The repository as its policies read it, and the register of policies.

A policy is given a house and names what is wrong with it, one sentence each. A question that finds
nothing to ask about fails.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import yaml

ROOT = Path(__file__).resolve().parents[3]
#: Roles that components build on; they are no groups of an inventory.
INTERNAL = ("base", "certificates", "python_service")
WIRING = "inventories/common/group_vars/all"

Item = TypeVar("Item")
Task = dict[str, Any]


def some(items: Iterable[Item]) -> list[Item]:
    """Return the items as a list; an empty one would make its test true for nothing."""
    result = list(items)
    assert result, "the question found nothing to ask about"
    return result


def program(name: str) -> ModuleType:
    """Return a program of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own up
    spec.loader.exec_module(module)
    return module


def flat(entries: Iterable[Task]) -> Iterator[Task]:
    """Return tasks, those within blocks included."""
    for entry in entries:
        yield entry
        for part in ("block", "rescue", "always"):
            yield from flat(entry.get(part, []))


def mappings(value: Any) -> Iterator[dict[str, Any]]:
    """Return every mapping within a value, the outermost first."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from mappings(part)


class House:
    """A tree of files as it is now."""

    def __init__(self, root: Path, internal: tuple[str, ...] = INTERNAL) -> None:
        self.root = root
        self.internal = internal
        self._texts: dict[Path, str] = {}
        self._loaded: dict[Path, Any] = {}

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """Every file that belongs to the repository, tracked or about to be."""
        if not (self.root / ".git").exists():
            return tuple(some(sorted(file for file in self.root.rglob("*") if file.is_file())))
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=self.root, check=True, stdout=subprocess.PIPE, text=True,
        ).stdout  # fmt: skip
        files = (self.root / name for name in listed.split("\0") if name)
        return tuple(some(sorted(file for file in files if file.is_file())))

    @cached_property
    def public(self) -> tuple[str, ...]:
        """The components, in the order of the contract."""
        return tuple(some(self.load("inventories/common/groups.yml")))

    @property
    def roles(self) -> tuple[str, ...]:
        """The components and what they build on."""
        return (*self.public, *self.internal)

    def name(self, file: Path) -> str:
        """Return how a message names a file."""
        return str(file.relative_to(self.root))

    def text(self, file: Path | str) -> str:
        """Return a file's text, nothing for a binary one or none at all."""
        path = self.root / file
        if path not in self._texts:
            try:
                self._texts[path] = path.read_text()
            except (FileNotFoundError, UnicodeDecodeError):
                self._texts[path] = ""
        return self._texts[path]

    def load(self, file: Path | str) -> Any:
        """Return what a YAML file says; it may tell Ansible that a text is encrypted or unsafe."""
        path = self.root / file
        if path not in self._loaded:
            self._loaded[path] = yaml.load(self.text(path), Tolerant)
        return self._loaded[path]

    def below(self, folder: str, *suffixes: str) -> list[Path]:
        """Return the files below a folder with one of these endings; there may be none."""
        ends = suffixes or ("",)
        files = (f for f in self.files if f.is_relative_to(self.root / folder))
        return [file for file in files if file.name.endswith(ends)]

    def specification(self, role: str) -> dict[str, dict[str, Any]]:
        """Return the options of all of a role's entry points, merged."""
        entries = self.load(f"roles/{role}/meta/argument_specs.yml")["argument_specs"]
        merged: dict[str, dict[str, Any]] = {}
        for entry in some(entries.values()):
            for option, facts in entry.get("options", {}).items():
                known = merged.setdefault(option, facts)
                assert known == facts, f"{role}: the entry points describe {option} differently"
        return merged

    def defaults(self, role: str) -> dict[str, Any]:
        """Return a role's defaults; a role may have none."""
        return self.load(f"roles/{role}/defaults/main.yml") or {}

    def tasks(self, role: str) -> list[tuple[Path, Task]]:
        """Return every task of a role with its file."""
        files = self.below(f"roles/{role}/tasks", ".yml")
        return some((file, task) for file in files for task in flat(self.load(file)))

    def plays(self) -> list[tuple[Path, dict[str, Any]]]:
        """Return the plays of the layers: those that give hosts of a group their role."""
        files = [f for f in self.below("playbooks", ".yml") if f.parent.name == "playbooks"]
        found = ((file, play) for file in files for play in self.load(file) or [])
        return some((file, play) for file, play in found if "roles" in play)

    def scenarios(self) -> list[str]:
        """Return the folders of molecule/ that molecule runs."""
        files = self.below("molecule", "molecule.yml")
        return [file.parent.name for file in files if file.parents[1].name == "molecule"]


class Tolerant(yaml.SafeLoader):
    """Reads Ansible's own tags as the texts behind them."""


for tag in ("!vault", "!unsafe"):
    Tolerant.add_constructor(tag, lambda loader, node: str(node.value))

Policy = Callable[[House], Iterable[str]]
POLICIES: dict[str, Policy] = {}


def policy(function: Policy) -> Policy:
    """Register a policy under its name."""
    POLICIES[function.__name__] = function
    return function
