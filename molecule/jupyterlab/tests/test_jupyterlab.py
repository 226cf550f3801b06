"""What an operator asks of notebooks: does a cell run, are others refused, are secrets private?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import scenario

UNIT = "odsp-jupyterlab.service"
TLS = "/etc/odsp/tls"


def test_unit_is_confined(host: Any, inputs: dict[str, Any]) -> None:
    """The server runs as the user, survives a reboot, and cannot touch the rest of the host."""
    assert inputs["jupyterlab_user"] != "root"
    scenario.assert_confined(host, UNIT, inputs["jupyterlab_user"], 2.3)


def test_a_cell_runs_as_the_user_with_everything_ready(
    host: Any, inputs: dict[str, Any], cell: Any
) -> None:
    """A kernel is the user's, in the user's home, and finds what the inventory promised."""
    keys = sorted(inputs.get("jupyterlab_environment", {}))
    code = f"""
import getpass, json, os, sys
import boto3, distributed, mlflow, sklearn
values = {{key: os.environ.get(key) for key in {keys!r}}}
print(json.dumps([getpass.getuser(), os.getcwd(), sys.prefix, values]))
"""
    user, folder, prefix, values = json.loads(cell(code))
    assert user == inputs["jupyterlab_user"]
    assert folder == host.user(user).home
    assert prefix.startswith("/opt/odsp/jupyterlab/")
    assert values == {key: str(value) for key, value in inputs["jupyterlab_environment"].items()}


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


def test_a_cell_runs_through_the_door(inputs: dict[str, Any], cell: Any) -> None:
    """The owner comes with name and password, and the door hands on the WebSocket."""
    assert (
        cell("import getpass; print(getpass.getuser())", door=True).strip()
        == (inputs["jupyterlab_user"])
    )


def test_who_does_not_come_through_the_door_is_refused(host: Any, ask: Any, base: str) -> None:
    """No certificate: no connection. Another user's name: no access. No XSRF header: no kernel."""
    assert ask()[0] == "200"
    assert ask(certificate="")[0] == "refused"
    assert ask(headers={"X-Forwarded-User": "somebody"})[0] == "403"
    assert ask("api/kernels", method="POST")[0] == "403"
    address = base.split("/")[2].replace(":", "/")
    plain = f"exec 3<>/dev/tcp/{address}; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"
    assert "HTTP/" not in host.run(f'bash -c "{plain}"').stdout


def test_a_certificate_of_another_component_is_refused(host: Any, ask: Any) -> None:
    """The platform's authority vouches for many; only the door's name comes in."""
    name = "odsp-test-stranger"
    host.check_output(
        f"cd /run && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes "
        f"-days 1 -subj /CN=nginx.node-1 -keyout {name}.key -out {name}.crt 2>/dev/null && "
        f"cat {name}.crt {name}.key > {name}.pem"
    )
    try:
        assert ask(certificate=f"/run/{name}.pem")[0] == "refused"
        assert ask(certificate=f"{TLS}/nginx.pem")[0] == "200"
    finally:
        host.check_output(f"rm -f /run/{name}.*")


def test_secrets_are_private(host: Any, inputs: dict[str, Any]) -> None:
    """Only root and the user read the key and the environment; nothing else tells a secret."""
    group = inputs["jupyterlab_user"]
    for path in (f"{TLS}/jupyterlab.key", f"{TLS}/jupyterlab.pem", "/etc/odsp/jupyterlab.env"):
        found = host.file(path)
        assert (found.user, found.group, found.mode) == ("root", group, 0o640)
    key = host.file(f"{TLS}/jupyterlab.key").content_string.splitlines()[1]
    secrets = [key, *(v for k, v in inputs["jupyterlab_environment"].items() if "SECRET" in k)]
    assert [scenario.places_of(host, secret) for secret in secrets] == [[]] * len(secrets)


def home(host: Any, inputs: dict[str, Any]) -> str:
    """Return the owner's home."""
    return str(host.user(inputs["jupyterlab_user"]).home)


def test_comes_back_after_a_crash(host: Any, inputs: dict[str, Any], cell: Any, save: Any) -> None:
    """After kill -9 the server starts by itself, and what was saved is there."""
    assert save("kept.txt", "before the crash") in ("200", "201")
    scenario.kill(host, UNIT)
    scenario.wait_until(lambda: save("again.txt", "after the crash") in ("200", "201"))
    assert cell("print(open('kept.txt').read())").strip() == "before the crash"
    file = host.file(f"{home(host, inputs)}/kept.txt")
    assert file.user == inputs["jupyterlab_user"] and file.mode & 0o007 == 0


def test_is_there_after_a_reboot(cell: Any, host: Any, ask: Any, save: Any) -> None:
    """The host brings the server up by itself, behind the door, with the owner's files."""
    scenario.wait_until(lambda: save("kept.txt", "before the reboot") in ("200", "201"))
    scenario.reboot(host)
    scenario.wait_until(lambda: ask()[0] == "200")
    assert cell("print(open('kept.txt').read())", door=True).strip() == "before the reboot"
