"""Runs of Ansible over a scenario's hosts, with its inventories; what they tell holds no secret."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
Run = subprocess.CompletedProcess[str]


def inventories() -> list[Path]:
    """Return the sources of a scenario's inventory; the last one wins."""
    return [
        ROOT / "inventories/common",
        ROOT / "molecule/_shared/inventory",
        Path(os.environ["ODSP_STATE_DIR"]) / "secrets",
        Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent,
    ]


def start(
    playbook: Path, *arguments: str, sources: Sequence[Path] = (), **inputs: Any
) -> subprocess.Popen[str]:
    """Start a playbook with other inputs, in a process group of its own.

    `sources` are in place of the scenario's own inventory.
    """
    command = ["ansible-playbook", str(playbook), "--diff", "--extra-vars", json.dumps(inputs)]
    for source in sources or inventories():
        command += ["--inventory", str(source)]
    return subprocess.Popen(
        [*command, *arguments], text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"},
    )  # fmt: skip


def play(playbook: Path, *arguments: str, sources: Sequence[Path] = (), **inputs: Any) -> Run:
    """Run a playbook with other inputs; whatever it comes to, its output holds no secret."""
    process = start(playbook, *arguments, sources=sources, **inputs)
    output, _ = process.communicate()
    assert_no_secret(output)
    return Run(process.args, process.returncode, output, "")


def layer(*arguments: str, **inputs: Any) -> Run:
    """Run the playbook of the converge step with other inputs."""
    settings = yaml.safe_load(Path(os.environ["MOLECULE_FILE"]).read_text())
    return play(Path(settings["ansible"]["playbooks"]["converge"]), *arguments, **inputs)


def converge(tags: str, **inputs: Any) -> Run:
    """Run these tags of the converge step's playbook with other inputs; that must succeed."""
    run = layer("--tags", tags, **inputs)
    assert run.returncode == 0, run.stdout[-5000:]
    return run


def recap(run: Run) -> dict[str, dict[str, int]]:
    """Return what Ansible counted, host by host: ok, changed, failed and the rest."""
    lines = re.findall(r"^(\S+) +: (ok=.*)$", run.stdout, re.MULTILINE)
    assert lines, run.stdout[-5000:]
    counts = {host: dict(re.findall(r"(\w+)=(\d+)", text)) for host, text in lines}
    return {h: {name: int(n) for name, n in found.items()} for h, found in counts.items()}


def changed(run: Run, host: str = "node-1") -> int:
    """Return how many changes a successful run made on a host."""
    assert run.returncode == 0, run.stdout[-5000:]
    return recap(run)[host]["changed"]


def objection(result: dict[str, Any]) -> str:
    """Return why a task failed; of a loop, what its items say."""
    items = [str(item["msg"]) for item in result.get("results", []) if item.get("failed")]
    return "\n".join(items or [str(result["msg"])])


def sentences(role: str, cases: Iterable[dict[str, Any]], folder: Path, **facts: Any) -> list[str]:
    """Show inputs to a role's validation, all in one run; return what it says to each.

    No host is asked. The host of a case is called case-<number>; "" stands for no objection.
    `folder` is an empty one for what the run needs, `facts` are what a host would tell of itself.
    """
    local = {
        "ansible_connection": "local",
        "ansible_python_interpreter": "{{ ansible_playbook_python }}",
        "ansible_become": False,
    }
    hosts = {f"case-{number}": local | inputs for number, inputs in enumerate(cases)}
    (folder / "hosts.json").write_text(json.dumps({"cases": {"hosts": hosts}}))
    validate = {"import_role": {"name": role, "tasks_from": "validate.yml"}}
    known = [{"set_fact": {**facts, "cacheable": True}}] if facts else []
    tasks = {"hosts": "cases", "gather_facts": False, "tasks": [*known, validate]}
    (folder / "play.json").write_text(json.dumps([tasks]))
    command = ["ansible-playbook", str(folder / "play.json")]
    for source in (*inventories(), folder / "hosts.json"):
        command += ["--inventory", str(source)]
    run = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json"},
    )  # fmt: skip
    assert_no_secret(run.stdout)
    answer = json.loads(run.stdout)
    assert {counts["changed"] for counts in answer["stats"].values()} == {0}
    answers = dict.fromkeys(hosts, "")
    for task in answer["plays"][0]["tasks"]:
        answers |= {h: objection(r) for h, r in task["hosts"].items() if r.get("failed")}
    return list(answers.values())


def secrets(state: Path | None = None) -> dict[str, Any]:
    """Return a scenario's generated secrets, by default of the one whose tests these are."""
    state = state or Path(os.environ["ODSP_STATE_DIR"])
    return dict(yaml.safe_load((state / "secrets/group_vars/all/vault.yml").read_text()))


def told(text: str, known: dict[str, Any]) -> list[str]:
    """Return the beginnings of the secrets, generated or of a scenario's inventory, in a text."""
    values = [v for k, v in known.items() if isinstance(v, str) and k != "vault_ca_certificate"]
    values += known.get("vault_user_passwords", {}).values()
    # Of a key, a line that is its own alone.
    needles = [value.splitlines()[1 if "PRIVATE KEY" in value else 0] for value in values]
    assert needles
    written = re.findall(r"not-a-secret[-\w]*|BEGIN [A-Z ]*PRIVATE KEY", text)
    return [f"{needle[:3]}…" for needle in needles if needle in text] + written


def assert_no_secret(text: str) -> None:
    """None of the scenario's secrets is in the text."""
    found = told(text, secrets())
    assert found == [], f"Ansible's output tells {found}"
