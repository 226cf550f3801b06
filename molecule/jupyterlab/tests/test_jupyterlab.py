"""What an operator asks of notebooks: does a cell run, are others refused, are secrets private?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import scenario

UNIT = "odsp-jupyterlab.service"
PAIR = f"{scenario.TLS}/jupyterlab"
SAVED = (200, 201)


def test_unit_is_confined(host: Any, inputs: dict[str, Any]) -> None:
    """The server runs as the user, starts at every boot, and cannot touch the rest of the host."""
    assert inputs["jupyterlab_user"] != "root"
    scenario.assert_confined(host, UNIT, inputs["jupyterlab_user"], exposure=1.6)


def test_a_cell_runs_as_the_user_with_everything_ready(
    host: Any, inputs: dict[str, Any], home: str, cell: Any
) -> None:
    """A kernel is the user's, in the user's home, and finds what the inventory promised."""
    promised = inputs["jupyterlab_environment"]
    for name in ("MLFLOW_TRACKING_URI", "AWS_SECRET_ACCESS_KEY", "DASK_SCHEDULER_ADDRESS"):
        assert promised[name], name
    code = f"""
import getpass, json, os, sys
import boto3, distributed, mlflow, sklearn
values = {{key: os.environ.get(key) for key in {sorted(promised)!r}}}
print(json.dumps([getpass.getuser(), os.getcwd(), sys.prefix, values]))
"""
    user, folder, prefix, values = json.loads(cell(code))
    assert user == inputs["jupyterlab_user"]
    assert folder == home
    assert prefix.startswith("/opt/odsp/jupyterlab/")
    assert values == {key: str(value) for key, value in promised.items()}


def test_other_accounts_cannot_read_along(host: Any, inputs: dict[str, Any], cell: Any) -> None:
    """A kernel talks to the server by sockets in a private directory, not by ports of the host."""
    code = """
import json
from ipykernel.connect import get_connection_info
info = get_connection_info(unpack=True)
print(json.dumps([info["transport"], info["ip"]]))
"""
    transport, path = json.loads(cell(code))
    assert transport == "ipc"
    directory = host.file(str(Path(path).parent))
    assert directory.user == inputs["jupyterlab_user"] and directory.mode & 0o777 == 0o700


def test_user_adds_packages_but_replaces_none(cell: Any) -> None:
    """The user's own packages come after the locked ones, and pip is there to install them."""
    code = """
import json, site, subprocess, sys
own = sys.path.index(site.getusersitepackages())
locked = sys.path.index(site.getsitepackages()[0])
pip = subprocess.run([sys.executable, "-m", "pip", "--version"]).returncode
print("\\n" + json.dumps([locked < own, pip]))
"""
    prepare = "import os, site; os.makedirs(site.getusersitepackages(), exist_ok=True)\n"
    cell(prepare)
    assert json.loads(cell(code).splitlines()[-1]) == [True, 0]


def test_a_cell_runs_through_the_door(
    inputs: dict[str, Any], door: dict[str, Any], cell: Any
) -> None:
    """The owner comes with name and password, and the door hands on the WebSocket."""
    code = "import getpass; print(getpass.getuser())"
    assert cell(code, **door) == inputs["jupyterlab_user"]


def test_who_does_not_come_through_the_door_is_refused(
    host: Any, inputs: dict[str, Any], ask: Any
) -> None:
    """TLS asks for a certificate of the platform; behind it a user and the page's token count."""
    where = "{jupyterlab_listen_address}:{jupyterlab_listen_port}".format(**inputs)
    assert scenario.handshake(host, where, PAIR).split("\n") == ["Verification: OK", ""]
    assert "certificate required" in scenario.handshake(host, where)
    with scenario.foreign_pair(host, inputs["jupyterlab_client_names"][0]) as pair:
        assert "alert unknown ca" in scenario.handshake(host, where, pair)
    owner, somebody = inputs["jupyterlab_user"], "somebody"
    assert ask(headers={"X-Forwarded-User": owner}).status == 200
    assert ask(headers={"X-Forwarded-User": somebody}).status == 403
    bare = ask("api/kernels", "POST", body={})
    assert bare.status == 403 and "_xsrf" in bare.text


def test_a_certificate_of_another_component_is_refused(
    inputs: dict[str, Any], ask: Any, issued: Any
) -> None:
    """The platform's authority vouches for many; of these only the door comes in."""
    (door,) = inputs["jupyterlab_client_names"]
    for name, status in ((door, 200), ("minio.node-1", 403), (f"{door}0", 403)):
        with issued(name) as pair:
            for page in ("api/status", "api/contents", "api/kernels"):
                assert ask(page, pair=pair).status == status, (name, page)


def test_plain_text_gets_no_answer(base: str, ask: Any) -> None:
    """Whoever speaks HTTP without TLS is cut off without a word."""
    assert ask().status == 200
    plain = ask(base=base.replace("https", "http", 1))
    assert plain.status == 0, plain
    assert "Connection reset" in plain.text or "without response" in plain.text, plain


def test_other_hosts_are_refused(inputs: dict[str, Any]) -> None:
    """Whoever sees the port from elsewhere and has no certificate of the platform gets nothing."""
    where = (inputs["jupyterlab_listen_address"], inputs["jupyterlab_listen_port"])
    assert "certificate required" in scenario.refuses_strangers(*where)


def test_secrets_are_private(host: Any, inputs: dict[str, Any]) -> None:
    """Only root and the user read the key and the environment; nothing else tells a secret."""
    group = inputs["jupyterlab_user"]
    for path in (f"{PAIR}.key", f"{PAIR}.pem", "/etc/odsp/jupyterlab.env"):
        found = host.file(path)
        assert (found.user, found.group, found.mode) == ("root", group, 0o640)
    key = host.file(f"{PAIR}.key").content_string.splitlines()[1]
    account = inputs["jupyterlab_environment"]["AWS_SECRET_ACCESS_KEY"]
    password = inputs["nginx_user_passwords"][inputs["jupyterlab_user"]]
    assert scenario.places_of(host, key, account, password) == []


@pytest.mark.parametrize("blow", ["restart", "kill", "reboot"])
def test_survives(
    host: Any, home: str, door: dict[str, Any], door_leads_in: Any, cell: Any, save: Any, blow: str
) -> None:
    """The server starts by itself, and through the door what was saved is there."""
    assert save("kept.txt", f"before the {blow}").status in SAVED
    scenario.strike(host, UNIT, blow)
    scenario.wait_until(door_leads_in, 120)
    assert cell("print(open('kept.txt').read())", **door) == f"before the {blow}"
    file = host.file(f"{home}/kept.txt")
    assert file.user == door["user"][0] and file.mode & 0o007 == 0
