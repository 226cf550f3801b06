"""Write docs/reliability.md and docs/mutations.md: what was promised, broken and measured.

Promises come from the tests (`@pytest.mark.fault`, molecule/*/mutations.yml), figures from the
latest runs (docs/reliability.json, docs/mutations.json). With --check nothing is written; the exit
status says whether a page lacks what the tests promise, or promises more. Figures may be older.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
DEBIAN = {"bookworm": 12, "trixie": 13}
#: How the tests bring each fault about.
KINDS = {
    "full disk": "Its folder is on a small file system that is filled to the last block.",
    "out of memory": "A process of the unit takes more than `MemoryMax`; the kernel ends it.",
    "dependency away": "What it needs of another component is stopped.",
    "dependency late": "What it needs accepts connections and never answers.",
    "clock jump": "The clock it sees moves while it runs.",
    "expired certificate": "Its certificate ended yesterday.",
    "host away": "Its host reboots while clients are at work.",
}
#: What only some components are asked; they need no reason in NO_TEST.
OF_SOME = {"host away"}
ALONE = dict.fromkeys(("dependency away", "dependency late"), "it needs no other component.")
#: Why a component has no test of a kind; under "" what holds for every kind that has none.
NO_TEST: dict[str, dict[str, str]] = {
    "postgres": ALONE,
    "minio": ALONE,
    "dask_scheduler": dict.fromkeys(
        ALONE, "it needs no other component; peers of a scheduler that is away: see dask_worker."
    ),
    "base": {"": "it leaves files and packages behind, no process that could suffer."},
    "certificates": {"": "it leaves files behind, no process that could suffer."},
    "python_service": {
        "": "it needs no other component; certificates are those of the components."
    },
}

RELIABILITY = """# What the platform withstands

What each component promises when something breaks, and what was seen when it was broken. Every line
is a test that brings the fault about on real hosts in containers, checks the promise, and puts
things right again: `make molecule ROLE=postgres`. Whether these tests would notice a defect is
tried too: [mutations.md](mutations.md).

"""
MUTATIONS = """# Defects that the tests notice

A test that cannot fail proves nothing. `make mutate ROLE=postgres` breaks the role on purpose in
each of these ways, one at a time, expects one of the named tests or steps to fail, and everything
to pass again without the defect.

"""


@dataclass(frozen=True)
class Fault:
    """One marked test."""

    component: str
    test: str
    kind: str
    promise: str
    measures: bool


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of Markdown."""
    lines = [
        list(columns),
        *([" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows),
    ]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def components(root: Path) -> list[str]:
    """Return the roles, those of the contract first and in its order, then whatever is tested."""
    groups = list(yaml.safe_load((root / "inventories/common/groups.yml").read_text()))
    others = sorted(path.parents[1].name for path in root.glob("roles/*/meta/main.yml"))
    return list(dict.fromkeys([*groups, *others]))


def test_files(root: Path) -> list[Path]:
    """Return the tests of all scenarios."""
    files = sorted(root.glob("molecule/*/*/test_*.py"))
    return [file for file in files if file.parents[1].name != "contract"]


def functions(file: Path) -> list[ast.FunctionDef]:
    """Return the functions of a file that pytest takes for tests."""
    found = [
        node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)
    ]
    return [function for function in found if function.name.startswith("test_")]


def faults(root: Path) -> list[Fault]:
    """Return every test of a fault. Raises ValueError for a marker that cannot be read."""
    found = []
    for file in test_files(root):
        for function in functions(file):
            read = any(isinstance(n, ast.Name) and n.id == "measured" for n in ast.walk(function))
            for mark in function.decorator_list:
                if not (
                    isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault"
                ):
                    continue
                texts = [a.value for a in mark.args if isinstance(a, ast.Constant)]
                if len(texts) != 2 or mark.keywords or not all(isinstance(t, str) for t in texts):
                    raise ValueError(
                        f"{file}: {function.name}: write fault(kind, promise), two texts"
                    )
                fault = Fault(
                    file.parents[1].name, function.name, str(texts[0]), str(texts[1]), read
                )
                found.append(fault)
    return found


def mutations(root: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return every mutation with its role."""
    files = sorted(root.glob("molecule/*/mutations.yml"))
    return [(f.parent.name, entry) for f in files for entry in yaml.safe_load(f.read_text()) or []]


def runs(root: Path, name: str) -> list[dict[str, Any]]:
    """Return what runs have left, oldest first."""
    file = root / "docs" / name
    entries: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    return sorted(entries, key=lambda entry: str(entry["date"]))


def by_release(said: dict[str, str]) -> str:
    """Return what was seen on each release, once where it is the same."""
    together: dict[str, list[str]] = {}
    for release in sorted(said, key=lambda release: DEBIAN.get(release, 0)):
        together.setdefault(said[release], []).append(str(DEBIAN.get(release, release)))
    return "<br>".join(f"Debian {' and '.join(names)}: {text}" for text, names in together.items())


def measured(root: Path, fault: Fault) -> str:
    """Return what the latest runs of a test saw."""
    said: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs(root, "reliability.json"):
        # A test of several hosts or parameters has an entry for each.
        if (run["scenario"], run["test"].split("[")[0]) == (fault.component, fault.test):
            said.setdefault(run["release"], {})[run["test"]] = run
    return by_release(
        {
            release: f"{'; '.join(dict.fromkeys(r['measured'] for r in tests.values()))}"
            f" ({max(str(r['date'])[:10] for r in tests.values())})"
            for release, tests in said.items()
        }
    )


def reliability_page(root: Path) -> str:
    """Return the page of faults: a table per component."""
    text = RELIABILITY + "".join(f"- **{kind}**: {how}\n" for kind, how in KINDS.items())
    known = faults(root)
    for component in [
        *components(root),
        *sorted({f.component for f in known} - {*components(root)}),
    ]:
        own = [fault for fault in known if fault.component == component]
        reasons = NO_TEST.get(component, {})
        text += f"\n## {component}\n\n"
        rows = []
        for kind in [*KINDS, *sorted({fault.kind for fault in own} - KINDS.keys())]:
            tests = [fault for fault in own if fault.kind == kind]
            rows += [(kind, fault.promise, measured(root, fault)) for fault in tests]
            if not tests and kind in reasons:
                rows.append((kind, f"Not tested: {reasons[kind]}", ""))
        if rows:
            text += table(["fault", "promised", "measured"], rows)
        if "" in reasons:
            text += (
                f"\nNot tested otherwise: {reasons['']}\n"
                if rows
                else f"Not tested: {reasons['']}\n"
            )
    return text


def mutations_page(root: Path) -> str:
    """Return the page of mutations."""
    rows = []
    done = runs(root, "mutations.json")
    for role, entry in mutations(root):
        said = {}
        for run in done:
            if (run["role"], run["name"]) == (role, entry["name"]):
                caught = run["caught_by"]
                names = caught if isinstance(caught, str) else ", ".join(caught)
                how = f"{run['verdict']}{' by ' if names else ''}{names}"
                said[run["release"]] = f"{how} in {run['seconds']:.0f} s ({str(run['date'])[:10]})"
        tests = ", ".join(f"`{name}`" for name in entry["caught_by"])
        rows.append((role, entry["name"], tests, by_release(said)))
    return MUTATIONS + table(["role", "what is broken", "must be caught by", "latest result"], rows)


PAGES = {"reliability.md": reliability_page, "mutations.md": mutations_page}


def without_figures(page: str) -> str:
    """Return a page without what depends on the latest runs: the last column."""
    return re.sub(r"(?m)(?<!\\)\|(?:[^|\n]|\\\|)*\|$", "|", page)


def stale(root: Path) -> list[str]:
    """Return the pages that do not say what the tests do."""
    names = []
    for name, page in PAGES.items():
        file = root / "docs" / name
        text = file.read_text() if file.exists() else ""
        if without_figures(text) != without_figures(page(root)):
            names.append(f"docs/{name}")
    return names


def main() -> int:
    """Write both pages; with --check only name those that are out of date."""
    if "--check" in sys.argv:
        out_of_date = stale(ROOT)
        print(
            f"out of date: {', '.join(out_of_date)}" if out_of_date else "both pages are up to date"
        )
        return 1 if out_of_date else 0
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page(ROOT))
    print(f"written: {', '.join(f'docs/{name}' for name in PAGES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
