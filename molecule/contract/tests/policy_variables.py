"""Every variable is read: one that nothing reads promises a knob that turns nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
from house import WIRING, House, mappings, policy, some

LEXER = jinja2.Environment(autoescape=True)
#: Keywords of a task whose value is an expression without braces.
BARE = {"when", "until", "that", "changed_when", "failed_when", "var"}


def names_in(template: str) -> set[str]:
    """Return the names that a template reads, words within its texts not among them."""
    return {word for _, kind, word in LEXER.lex(template) if kind == "name"}


def names_of(value: Any, bare: bool = False) -> set[str]:
    """Return the names that a YAML value reads."""
    if isinstance(value, dict):
        parts = [names_of(part, bare or key in BARE) for key, part in value.items()]
        return set().union(*parts, *(names_of(key) for key in value))
    if isinstance(value, list):
        return set().union(*(names_of(part, bare) for part in value))
    if not isinstance(value, str):
        return set()
    return names_in(f"{{{{ {value} }}}}" if bare and "{{" not in value else value)


def read_by(house: House, file: Path, besides: str = "") -> set[str]:
    """Return the names that a file reads, without what a variable's own value does."""
    if file.suffix == ".py":
        return set(re.findall(r"\w+", house.text(file)))
    if file.suffix == ".j2":
        return names_in(house.text(file))
    content = house.load(file)
    if not isinstance(content, dict):
        return names_of(content)
    # Variables may name others, for a filter to look them up.
    others = {name: value for name, value in content.items() if name != besides}
    texts = {str(text) for found in mappings(others) for text in found.values()}
    return names_of(others) | {text for text in texts if text.isidentifier()}


def is_read(house: House, name: str, files: list[Path]) -> bool:
    """Tell whether one of the files reads the variable."""
    return any(name in house.text(f) and name in read_by(house, f, name) for f in files)


def readers(house: House, *folders: str) -> list[Path]:
    """Return the files below folders in which variables are read."""
    files = [file for folder in folders for file in house.below(folder, ".yml", ".j2", ".py")]
    return [file for file in files if not {"files", "meta"} & set(file.parts)]


@policy
def every_variable_of_a_role_is_read(house: House) -> Iterator[str]:
    """Whatever a role takes, keeps or registers, it uses itself."""
    for role in house.roles:
        own = readers(house, f"roles/{role}")
        names = {*house.specification(role), *house.defaults(role)}
        names |= {*(house.load(f"roles/{role}/vars/main.yml") or {})}
        names |= {task["register"] for _, task in house.tasks(role) if "register" in task}
        for name in sorted(names):
            if not is_read(house, name, own):
                yield f"roles/{role} does not read {name}"


@policy
def every_variable_of_the_wiring_is_read(house: House) -> Iterator[str]:
    """The contract gives roles what they ask for, and names what is read somewhere."""
    everything = readers(house, "roles", "playbooks", "inventories")
    inputs = {name for role in house.roles for name in house.specification(role)}
    for file in some(house.below(WIRING, ".yml")):
        for name in house.load(file):
            if name not in inputs and not is_read(house, name, everything):
                yield f"{house.name(file)}: nothing reads {name}"


@policy
def every_variable_of_a_playbook_is_read(house: House) -> Iterator[str]:
    """What playbooks set or register, they use, but for what Ansible itself reads."""
    own = readers(house, "playbooks", "roles", WIRING)
    for file in house.below("playbooks", ".yml"):
        content = house.load(file)
        names = set(content) if isinstance(content, dict) else set()
        for found in mappings(content) if isinstance(content, list) else []:
            names |= {*(found.get("vars") or {}), found.get("register", "")}
        for name in sorted(names - {""}):
            if not name.startswith("ansible_") and not is_read(house, name, own):
                yield f"{house.name(file)}: nothing reads {name}"
