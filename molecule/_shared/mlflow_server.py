"""MLflow's processes on a host, and what each of them knows."""

from __future__ import annotations

import json
from typing import Any

import scenario
from client import Client

UNIT = "odsp-mlflow.service"


def workers(host: Any) -> set[int]:
    """Return the processes that serve requests."""
    pid = scenario.main_pid(host, UNIT)
    supervisors = host.run(f"pgrep -P {pid}").stdout.split()
    found = host.run(f"pgrep -f spawn_main -P {','.join(supervisors) or 0}").stdout
    return {int(one) for one in found.split()}


def have_answered(host: Any, path: str) -> set[int]:
    """Return the processes that have answered a request, by whose line of the journal it is."""
    run = host.check_output(f"systemctl show --value --property InvocationID {UNIT}").strip()
    fields = "--output json --output-fields MESSAGE,_PID"
    # Of this run alone: numbers of processes come again after a reboot.
    lines = host.check_output(f"journalctl --quiet _SYSTEMD_INVOCATION_ID={run} {fields}")
    entries = [json.loads(line) for line in lines.splitlines()]
    return {int(one["_PID"]) for one in entries if f'{path} HTTP/1.1" 200' in str(one["MESSAGE"])}


def wait_until_all_answer(client: Client, path: str, **request: Any) -> None:
    """Ask until every process has answered a request that needs the database.

    One that has not reached PostgreSQL since its start tries for two minutes before it says so. Its
    connections do not tell: it makes one for runs and one for models.
    """

    def all_have_answered() -> bool:
        """Tell whether every process has answered the request."""
        client.ask_all(*[path] * 8, **request)
        there = workers(client.host)
        return bool(there) and there <= have_answered(client.host, path)

    scenario.wait_until(all_have_answered, 240)
