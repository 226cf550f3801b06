"""Write the table of inputs into every role's README, from the role's argument specification.

Only what stands between the two marks is touched. With --check nothing is written; the exit status
says whether a README is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

ROLES = Path(__file__).resolve().parents[1] / "roles"
BEGIN = "<!-- inputs: generated from meta/argument_specs.yml -->"
END = "<!-- end of inputs -->"


def shown(facts: dict[str, Any]) -> str:
    """Return how a default is shown: as YAML would have it, on one line."""
    if facts.get("required"):
        return "required"
    default = facts["default"]
    text = default if isinstance(default, str) and default else json.dumps(default)
    return f"`{text}`".replace("|", "\\|")


def table(specification: dict[str, Any]) -> str:
    """Return the inputs of all entry points, each once, as a table."""
    options: dict[str, dict[str, Any]] = {}
    for entry in specification["argument_specs"].values():
        options.update(entry.get("options", {}))
    rows = ["| name | default | |", "|---|---|---|"]
    for name, facts in options.items():
        description = " ".join(str(facts["description"]).split()).replace("|", "\\|")
        rows.append(f"| `{name}` | {shown(facts)} | {description} |")
    return "\n".join(rows)


def rewritten(role: Path) -> str:
    """Return the role's README as it should be. Raises ValueError if it lacks the marks."""
    text = (role / "README.md").read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{role.name}/README.md must hold once each: {BEGIN} and {END}")
    inputs = table(yaml.safe_load((role / "meta/argument_specs.yml").read_text()))
    marked = re.escape(BEGIN) + r"\n.*?" + re.escape(END)
    return re.sub(marked, lambda _: f"{BEGIN}\n{inputs}\n{END}", text, flags=re.DOTALL)


def main() -> int:
    """Rewrite every README that is out of date; with --check only name them."""
    stale = []
    for specification in sorted(ROLES.glob("*/meta/argument_specs.yml")):
        role = specification.parents[1]
        text = rewritten(role)
        if text != (role / "README.md").read_text():
            stale.append(role.name)
            if "--check" not in sys.argv:
                (role / "README.md").write_text(text)
    verb = "out of date" if "--check" in sys.argv else "rewritten"
    print(f"{verb}: {', '.join(stale)}" if stale else "every README is up to date")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
