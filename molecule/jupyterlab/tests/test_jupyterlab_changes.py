"""What another converge with other inputs does to notebooks: just that, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import scenario

UNIT = "odsp-jupyterlab.service"
TAGS = "jupyterlab,nginx"

#: An input that cannot work: its name, and a value that the sentence repeats.
REFUSED = [
    ("jupyterlab_user", "root"),
    ("jupyterlab_user", "daemon"),
    ("jupyterlab_user", "Ada Lovelace"),
    ("jupyterlab_listen_port", 80),
    ("jupyterlab_listen_port", 70000),
    ("jupyterlab_base_url", "jupyter"),
    ("jupyterlab_memory_max", "lots"),
]


def test_another_port_and_size(
    host: Any, base: str, door: dict[str, Any], door_leads_in: Any, ask: Any, cell: Any
) -> None:
    """JupyterLab restarts and the door does not; the way through it leads to the new port."""
    moved = base.replace(":8888", ":9888")
    code = "import os; print(os.environ.get('GREETING'))"
    before = scenario.units(host)
    try:
        scenario.converge(
            TAGS,
            odsp_jupyterlab_port=9888,
            jupyterlab_memory_max="3G",
            jupyterlab_environment_extra={"GREETING": "hello"},
        )
        changed = scenario.units(host)
        assert scenario.restarted(before, changed) == {UNIT}
        limit = host.check_output(f"systemctl show --value --property MemoryMax {UNIT}")
        assert int(limit) == 3 * 2**30
        scenario.wait_until(door_leads_in)  # a reload of the door ends later than its command
        assert cell(code, **door) == "hello"
        assert ask(base=moved).status == 200
        assert "Connection refused" in ask().text
    finally:
        scenario.converge(TAGS)
    assert scenario.restarted(changed, scenario.units(host)) == {UNIT}
    assert ask().status == 200
    assert "Connection refused" in ask(base=moved).text
    scenario.wait_until(door_leads_in)
    assert cell(code, **door) == "None"


@pytest.mark.once
def test_bad_input_is_refused_in_one_sentence(tmp_path: Path) -> None:
    """Each input that cannot work is named with the host, what it is, and a remedy."""
    cases = [{variable: value} for variable, value in REFUSED]
    said = scenario.sentences("jupyterlab", cases, tmp_path)
    for number, ((variable, value), sentence) in enumerate(zip(REFUSED, said, strict=True)):
        assert sentence.startswith(f"case-{number}: {variable} is "), (value, sentence)
        assert str(value) in sentence and "; " in sentence, sentence
        assert "\n" not in sentence and sentence.endswith("."), sentence


@pytest.mark.once
def test_a_refused_run_changes_nothing(host: Any) -> None:
    """The platform's playbook stops at an account whose group is everybody's; all is as it was."""
    files = "ls -d /home/*; find /etc/odsp /etc/systemd/system -type f -exec sha256sum {} + | sort"
    host.check_output("useradd --no-user-group --gid users groupless")
    try:
        before, running = host.check_output(files), scenario.units(host)
        run = scenario.layer("--tags", TAGS, jupyterlab_user="groupless", odsp_jupyterlab_port=9888)
        after = host.check_output(files)
    finally:
        host.check_output("userdel groupless")
    assert run.returncode != 0
    assert "node-1: jupyterlab_user is 'groupless', an account without a group" in run.stdout
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert (after, scenario.units(host)) == (before, running)
