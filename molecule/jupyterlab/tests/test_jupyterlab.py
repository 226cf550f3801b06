"""What an operator asks of notebooks: does a cell run, are others refused, are secrets private?"""

from __future__ import annotations

import base64
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

UNIT = "odsp-jupyterlab.service"
PYTHON = "/opt/odsp/jupyterlab/current/bin/python"
TLS = "/etc/odsp/tls"
PAIR = (f"{TLS}/jupyterlab.crt", f"{TLS}/jupyterlab.key")

# Asks for a page and prints the status; "refused" if the peer ends the connection.
ASK = """
import http.client, ssl, sys, urllib.parse
url, certificate, method, *headers = sys.argv[1:]
context = ssl.create_default_context(cafile="/etc/odsp/tls/ca.crt")
if certificate:
    context.load_cert_chain(certificate)
parts = urllib.parse.urlsplit(url)
connection = http.client.HTTPSConnection(parts.netloc, context=context, timeout=20)
try:
    connection.request(method, parts.path, headers=dict(h.split("=", 1) for h in headers))
    print(connection.getresponse().status)
except (ssl.SSLError, ConnectionError):
    print("refused")
"""


@pytest.fixture(scope="module")
def inputs(host: Any) -> dict[str, Any]:
    """Return the role's inputs for this host."""
    return {
        "jupyterlab_listen_address": "127.0.0.1",
        "jupyterlab_listen_port": 8888,
        "jupyterlab_base_url": "/jupyter/",
        **host.ansible.get_variables(),
    }


def base(inputs: dict[str, Any]) -> str:
    """Return the URL of JupyterLab on this host."""
    where = "{jupyterlab_listen_address}:{jupyterlab_listen_port}".format(**inputs)
    return f"https://{where}{inputs['jupyterlab_base_url']}"


def ask(host: Any, url: str, certificate: str, method: str = "GET", *headers: str) -> str:
    """Return the status of a page as text, or "refused"."""
    arguments = " ".join(shlex.quote(text) for text in (ASK, url, certificate, method, *headers))
    return str(host.check_output(f"{PYTHON} -c {arguments}")).strip()


def cell(host: Any, inputs: dict[str, Any], code: str) -> str:
    """Run code in a kernel, by the server's WebSocket, and return what it prints."""
    source = base64.b64encode((Path(__file__).parent / "notebook.py").read_bytes()).decode()
    arguments = " ".join(shlex.quote(text) for text in (base(inputs), *PAIR, code))
    answer = host.run(f"echo {source} | base64 -d | {PYTHON} - {arguments}")
    assert answer.rc == 0, answer.stdout + answer.stderr
    return str(answer.stdout)


def test_unit_is_enabled_running_and_confined(host: Any, inputs: dict[str, Any]) -> None:
    """The server runs as the user, survives a reboot, and cannot touch the rest of the host."""
    unit = host.service(UNIT)
    assert unit.is_enabled and unit.is_running, host.run(f"journalctl -u {UNIT} -n 50").stdout
    properties = unit.systemd_properties
    assert properties["User"] == inputs["jupyterlab_user"] != "root"
    assert properties["ProtectSystem"] == "strict"
    assert properties["NoNewPrivileges"] == "yes"


def test_a_cell_runs_as_the_user_with_everything_ready(host: Any, inputs: dict[str, Any]) -> None:
    """A kernel is the user's, in the user's home, and finds what the inventory promised."""
    keys = sorted(inputs.get("jupyterlab_environment", {}))
    code = f"""
import getpass, json, os, sys
import boto3, distributed, mlflow, sklearn
values = {{key: os.environ.get(key) for key in {keys!r}}}
print(json.dumps([getpass.getuser(), os.getcwd(), sys.prefix, values]))
"""
    user, folder, prefix, values = json.loads(cell(host, inputs, code))
    assert user == inputs["jupyterlab_user"]
    assert folder == host.user(user).home
    assert prefix.startswith("/opt/odsp/jupyterlab/")
    assert values == {key: str(value) for key, value in inputs["jupyterlab_environment"].items()}


def test_other_accounts_cannot_read_along(host: Any, inputs: dict[str, Any]) -> None:
    """A kernel talks to the server by sockets in a private directory, not by ports of the host."""
    code = """
import json
from ipykernel.connect import get_connection_info
info = get_connection_info(unpack=True)
print(json.dumps([info["transport"], info["ip"]]))
"""
    transport, path = json.loads(cell(host, inputs, code))
    assert transport == "ipc"
    directory = host.file(str(Path(path).parent))
    assert directory.user == inputs["jupyterlab_user"] and directory.mode & 0o777 == 0o700


def test_user_adds_packages_but_replaces_none(host: Any, inputs: dict[str, Any]) -> None:
    """The user's own packages come after the locked ones, and pip is there to install them."""
    code = """
import json, site, subprocess, sys
own = sys.path.index(site.getusersitepackages())
locked = sys.path.index(site.getsitepackages()[0])
pip = subprocess.run([sys.executable, "-m", "pip", "--version"]).returncode
print("\\n" + json.dumps([locked < own, pip]))
"""
    prepare = "import os, site; os.makedirs(site.getusersitepackages(), exist_ok=True)\n"
    cell(host, inputs, prepare)
    assert json.loads(cell(host, inputs, code).splitlines()[-1]) == [True, 0]


def test_who_does_not_come_through_the_door_is_refused(host: Any, inputs: dict[str, Any]) -> None:
    """No certificate: no connection. Another user's name: no access. No XSRF header: no kernel."""
    own = f"{TLS}/jupyterlab.pem"
    status, kernels = f"{base(inputs)}api/status", f"{base(inputs)}api/kernels"
    assert ask(host, status, own) == "200"
    assert ask(host, status, "") == "refused"
    assert ask(host, status, own, "GET", "X-Forwarded-User=somebody") == "403"
    assert ask(host, kernels, own, "POST") == "403"


def test_secrets_are_private(host: Any, inputs: dict[str, Any]) -> None:
    """Only root and the user read the key and the environment; no argument holds a secret."""
    group = inputs["jupyterlab_user"]
    for path in (f"{TLS}/jupyterlab.key", "/etc/odsp/jupyterlab.env"):
        found = host.file(path)
        assert (found.user, found.group, found.mode) == ("root", group, 0o640)
    arguments = host.check_output("ps -eo args")
    environment = inputs.get("jupyterlab_environment", {})
    secrets = [value for key, value in environment.items() if "SECRET" in key]
    assert not [secret for secret in secrets if secret in arguments]
