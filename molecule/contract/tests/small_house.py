"""A small house that keeps every policy, and the breaks that must be noticed, one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from house import House, program

HERE = Path(__file__).parent
INTERNAL = ("base",)
Changes = dict[str, dict[str, Any]]

README = """# {role}

One sentence about odsp-{role}.service.

## Needs

## Inputs

<!-- inputs: generated from meta/argument_specs.yml -->
<!-- end of inputs -->

## Example

## Upgrade

## Test

`molecule test -s {role}`
"""
MUTATIONS = """---
- {{name: one, file: roles/{role}/tasks/main.yml, find: "---", replace: a, caught_by: [test_works]}}
- {{name: two, file: roles/{role}/meta/main.yml, find: "---", replace: a, caught_by: [check]}}
- {{name: three, file: roles/{role}/README.md, find: "# {role}", replace: a, caught_by: [check]}}
"""
FAULT = """
@pytest.mark.fault({kind!r}, "It goes on.")
def test_fault_{number}(host, measured):
    measured(host.check_output("true"))
"""


def tried() -> list[dict[str, Any]]:
    """Return what became of the small house's mutations."""
    told: dict[str, Any] = {"verdict": "caught", "caught_by": "check", "release": "trixie"}
    told |= {"date": "2026-01-01", "seconds": 1}
    names = ("one", "two", "three")
    return [{"role": role, "name": name, **told} for role in ("base", "cache") for name in names]


def build(root: Path) -> House:
    """Write the small house, with what is generated, and return it."""
    proofs, readmes = program("reliability"), program("role_readmes")
    tree: dict[str, str] = yaml.safe_load((HERE / "small_house.yml").read_text())
    for role in ("base", "cache"):
        tree[f"roles/{role}/README.md"] = README.format(role=role)
        tree[f"molecule/{role}/mutations.yml"] = MUTATIONS.format(role=role)
        tree[f"molecule/{role}/tests/test_{role}.py"] = "def test_works(host): assert host\n"
    faults = (FAULT.format(kind=kind, number=n) for n, kind in enumerate(proofs.KINDS))
    tree["molecule/cache/tests/test_cache.py"] += "".join(faults)
    for name, text in tree.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for role in ("base", "cache"):
        readme = root / "roles" / role / "README.md"
        readme.write_text(readmes.rewritten(readme.parent))
    (root / "docs").mkdir()
    (root / "docs/mutations.json").write_text(json.dumps(tried()))
    for name, page in proofs.PAGES.items():
        (root / "docs" / name).write_text(page(root))
    return House(root, INTERNAL)


def breaks() -> list[tuple[str, str, Changes]]:
    """Return each break: the policy, a part of its complaint, and the changes by file."""
    known: dict[str, dict[str, Changes]] = yaml.safe_load((HERE / "breaks.yml").read_text())
    return [(name, words, made) for name, all_ in known.items() for words, made in all_.items()]


def change(root: Path, changes: Changes) -> None:
    """Break the house."""
    for name, replaced in changes.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text() if file.exists() else ""
        for find, new in replaced.items():
            added = new[0] * new[1] if isinstance(new, list) else new
            assert not find or text.count(find) == 1, f"{name}: {find}"
            text = text.replace(find, added) if find else text + added
        file.write_text(text)
