#!/usr/bin/python
"""Ansible module: a systemd unit that is enabled, active, and runs what is on the disk now."""

from __future__ import annotations

import os
import time

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: running_unit
short_description: Enable and start a unit; restart it if what it was started from has changed since
description:
  - Compares the change times of the unit file and of its inputs with the moment the unit last
    started or reloaded. Unlike a notified handler this decision is not lost when a run is
    interrupted between the change and the restart.
  - That the host's clock was set meanwhile changes nothing.
options:
  name: {description: Unit., type: str, required: true}
  inputs:
    description: Files a running process does not read again; a newer one restarts.
    type: list
    elements: path
    default: []
  reload_inputs:
    description: Files that a reload would read again.
    type: list
    elements: path
    default: []
  reload:
    description: Reload if only reload_inputs are newer; restart otherwise.
    type: bool
    default: false
author: [ODSP]
"""

EXAMPLES = r"""
- name: Run MLflow on what is installed
  running_unit: {name: odsp-mlflow.service, inputs: [/etc/odsp/mlflow.env]}
"""

RETURN = r"""
action: {description: What was done - none, start, restart or reload., type: str, returned: always}
"""

PROPERTIES = (
    "LoadState,ActiveState,UnitFileState,NeedDaemonReload,StateChangeTimestampMonotonic,"
    "FragmentPath"
)


def properties(module: AnsibleModule) -> dict[str, str]:
    """Return the unit's properties as systemd shows them."""
    command = ["systemctl", "show", f"--property={PROPERTIES}", module.params["name"]]
    _, out, _ = module.run_command(command, check_rc=True)
    return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)


def newest(paths: list[str]) -> float:
    """Return the latest change time of the files that exist, of links themselves (Unix time).

    What changed in the future did so before the clock was set back.
    """
    times = [os.lstat(path).st_ctime for path in paths if os.path.lexists(path)]
    return max((changed for changed in times if changed <= time.time()), default=0.0)


def changed_at(state: dict[str, str]) -> float:
    """Return when the unit last changed its state, by the clock as it is set now (Unix time)."""
    elapsed = time.monotonic() - int(state["StateChangeTimestampMonotonic"]) / 1e6
    return time.time() - elapsed


def decide(module: AnsibleModule, state: dict[str, str]) -> str:
    """Return what must be done to the unit."""
    if state["ActiveState"] not in ("active", "reloading", "activating"):
        return "start"
    started = changed_at(state)
    fixed = [state["FragmentPath"], *module.params["inputs"]]
    if newest(fixed) > started:
        return "restart"
    if newest(module.params["reload_inputs"]) > started:
        return "reload" if module.params["reload"] else "restart"
    return "none"


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "inputs": {"type": "list", "elements": "path", "default": []},
            "reload_inputs": {"type": "list", "elements": "path", "default": []},
            "reload": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    name = module.params["name"]
    state = properties(module)
    if state["LoadState"] != "loaded" and module.check_mode:
        module.exit_json(changed=True, action="start")
    stale = state["NeedDaemonReload"] == "yes" or state["LoadState"] == "not-found"
    if stale and not module.check_mode:
        module.run_command(["systemctl", "daemon-reload"], check_rc=True)
        state = properties(module)
    action, enabled = decide(module, state), state["UnitFileState"] == "enabled"
    if not module.check_mode:
        if not enabled:
            module.run_command(["systemctl", "enable", "--quiet", name], check_rc=True)
        if action != "none":
            module.run_command(["systemctl", "reset-failed", name])
            code, _, error = module.run_command(["systemctl", action, name])
            if code:
                _, journal, _ = module.run_command(
                    ["journalctl", "--no-pager", "--lines=20", "--output=cat", f"--unit={name}"]
                )
                module.fail_json(
                    msg=f"{name} did not {action}; its last words: {journal.strip() or error}"
                )
    module.exit_json(changed=action != "none" or not enabled, action=action)


if __name__ == "__main__":
    main()
