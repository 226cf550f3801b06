"""What another converge with other inputs does to notebooks: just that, and no more."""

from __future__ import annotations

import json
from typing import Any

import pytest
import scenario

UNIT = "odsp-jupyterlab.service"


def converge(changes: dict[str, Any] | None = None) -> None:
    """Converge with other inputs, or put the scenario's own back."""
    run = scenario.site("--tags", "jupyterlab,nginx", "--extra-vars", json.dumps(changes or {}))
    assert run.returncode == 0, run.stdout + run.stderr


def test_another_port_and_size(
    host: Any, inputs: dict[str, Any], base: str, ask: Any, cell: Any
) -> None:
    """JupyterLab restarts and the door does not; the way through it leads to the new port."""
    moved = base.replace(":8888", ":9888")
    changes = {
        "odsp_jupyterlab_port": 9888,
        "jupyterlab_memory_max": "3G",
        "jupyterlab_environment_extra": {"GREETING": "hello"},
    }
    before = scenario.units(host)
    try:
        converge(changes)
        assert scenario.restarted(before, scenario.units(host)) == {UNIT}
        limit = host.check_output(f"systemctl show --value --property MemoryMax {UNIT}")
        assert int(limit) == 3 * 2**30
        code = "import os; print(os.environ['GREETING'])"
        assert cell(code, door=True).strip() == "hello"
        assert ask(at=moved)[0] == "200"
        assert ask()[0] == "refused"
    finally:
        converge()
    assert ask()[0] == "200"
    assert ask(at=moved)[0] == "refused"
    assert cell("import os; print(os.environ.get('GREETING'))", door=True).strip() == "None"
    assert inputs["odsp_jupyterlab_port"] == 8888


@pytest.mark.once
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("jupyterlab_user", "root"),
        ("jupyterlab_user", "groupless"),
        ("jupyterlab_listen_port", 80),
        ("jupyterlab_base_url", "jupyter"),
        ("jupyterlab_memory_max", "lots"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(host: Any, variable: str, value: Any) -> None:
    """It names host, variable and remedy, and changes nothing."""
    before = scenario.units(host)
    if value == "groupless":
        host.check_output("useradd --no-user-group --gid users groupless")
    try:
        tags = ("--tags", "jupyterlab_account")
        run = scenario.site(*tags, "--extra-vars", json.dumps({variable: value}))
    finally:
        host.run("userdel groupless")
    assert run.returncode != 0
    said = [line for line in run.stdout.splitlines() if line.strip().startswith("msg: ")]
    assert len(said) == 1 and f"node-1: {variable} is " in said[0] and str(value) in said[0], said
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert scenario.units(host) == before
