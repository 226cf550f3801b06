#!/usr/bin/python
"""Ansible module: who listens on TCP ports, and which addresses the host has. Changes nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: listeners
short_description: Tell who listens on TCP ports of this host, and which addresses it has
description: Reads C(ss), C(ip) and control groups of listening processes. Needs root for them.
options:
  ports: {description: Ports to look at., type: list, elements: int, required: true}
author: [ODSP]
"""

EXAMPLES = r"""
- name: See who holds the ports of PostgreSQL and HTTPS
  listeners: {ports: [5432, 443]}
"""

RETURN = r"""
listeners:
  description: One entry per listening process - port, address, pid, program and systemd unit.
  type: list
  returned: always
addresses:
  description: IP addresses of this host.
  type: list
  returned: always
"""

USER = re.compile(r'\("([^"]*)",pid=(\d+)')


def unit_of(pid: int) -> str:
    """Return the systemd service a process belongs to, or an empty text."""
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return ""
    match = re.search(r"/([^/\n]+\.service)(?:/|$)", text, re.MULTILINE)
    return match.group(1) if match else ""


def listeners(text: str, ports: list[int]) -> list[dict[str, object]]:
    """Return the entries of ss's output that concern the ports."""
    found: list[dict[str, object]] = []
    for line in text.splitlines():
        fields = line.split()
        address, _, port = fields[3].rpartition(":")
        if not port.isdigit() or int(port) not in ports:
            continue
        address = address.strip("[]").split("%")[0]
        entry: dict[str, object] = {"port": int(port), "address": address}
        users = [(name, int(pid)) for name, pid in USER.findall(line)] or [("", 0)]
        found += [entry | {"program": n, "pid": p, "unit": unit_of(p)} for n, p in users]
    return found


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={"ports": {"type": "list", "elements": "int", "required": True}},
        supports_check_mode=True,
    )
    ports: list[int] = module.params["ports"]
    out = ""
    if ports:
        ss = module.get_bin_path("ss", required=True, opt_dirs=["/usr/sbin", "/usr/bin"])
        _, out, _ = module.run_command([ss, "-Hltnp"], check_rc=True)
    ip = module.get_bin_path("ip", required=True, opt_dirs=["/usr/sbin", "/usr/bin", "/sbin"])
    links = json.loads(module.run_command([ip, "-json", "address"], check_rc=True)[1])
    addresses = [entry["local"] for link in links for entry in link.get("addr_info", [])]
    module.exit_json(changed=False, listeners=listeners(out, ports), addresses=addresses)


if __name__ == "__main__":
    main()
