#!/usr/bin/python
"""Ansible module: run one of the proof's programs on this host and hand back what it found."""

from __future__ import annotations

import json
import subprocess
import time
from datetime import UTC, datetime
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: probe
short_description: Run a Python program that proves links of the platform
description:
  - The program and its inputs travel through standard input, so the list of processes shows nothing
    of them. It imports C(link) to say what it found, see C(playbooks/files/verify/link.py).
  - A link that does not hold is a result, not a failure; so is a program that ends early.
options:
  name: {description: "What is proved, if the program cannot say so.", type: str, required: true}
  program: {description: Text of the program., type: str, required: true}
  library: {description: Text of the module C(link)., type: str, required: true}
  inputs: {description: What the program shall know., type: dict, default: {}}
  secret: {description: A password the program needs., type: str, default: ""}
  runner: {description: Command that runs Python., type: list, elements: str, default: []}
author: [ODSP]
"""

EXAMPLES = r"""
- name: Ask PostgreSQL for the run
  probe:
    name: the run is a row in PostgreSQL
    program: "{{ lookup('file', 'verify/row.py') }}"
    library: "{{ lookup('file', 'verify/link.py') }}"
    inputs: {run: 4f6c}
"""

RETURN = r"""
links: {description: Links in the order of their proof., type: list, returned: always}
facts: {description: What later programs need., type: dict, returned: always}
started: {description: When the program began; UTC., type: str, returned: always}
"""

# What the child runs first: it makes `link` importable and becomes the program.
BOOTSTRAP = """
import json, sys, types
given = json.load(sys.stdin)
sys.modules["link"] = link = types.ModuleType("link")
exec(compile(given["library"], "link.py", "exec"), link.__dict__)
link.INPUTS, link.SECRET = given["inputs"], given["secret"]
exec(compile(given["program"], "program.py", "exec"))
"""
RECORD = "\x1e"


def run(params: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run the program; return its links and facts, with a broken link if it ends in error."""
    started = time.monotonic()
    given = {key: params[key] for key in ("program", "library", "inputs", "secret")}
    command = [*(params["runner"] or ["/usr/bin/python3"]), "-c", BOOTSTRAP]
    child = subprocess.run(
        command, input=json.dumps(given), capture_output=True, text=True, check=False
    )
    links: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    for line in child.stdout.split("\n"):
        if line.startswith(RECORD):
            record = json.loads(line[1:])
            facts.update(record.get("facts", {}))
            links += record.get("links", [])
    if child.returncode:
        words = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        milliseconds = round((time.monotonic() - started) * 1000)
        links.append({"name": params["name"], "ok": False, "ms": milliseconds, "detail": words[-1]})
    return links, facts


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "program": {"type": "str", "required": True},
            "library": {"type": "str", "required": True},
            "inputs": {"type": "dict", "default": {}},
            "secret": {"type": "str", "default": "", "no_log": True},
            "runner": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
        no_log=True,  # the programs would fill the journal
    )
    started = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        links, facts = run(module.params)
    except (OSError, ValueError) as error:  # a program that cannot even begin is a finding too
        name = module.params["name"]
        links, facts = [{"name": name, "ok": False, "ms": 0, "detail": str(error)}], {}
    module.exit_json(changed=False, started=started, links=links, facts=facts)


if __name__ == "__main__":
    main()
