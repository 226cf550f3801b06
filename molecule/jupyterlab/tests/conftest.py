"""Both ways to JupyterLab: with the platform's certificate on the host, and through the door."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scenario

PYTHON = "/opt/odsp/jupyterlab/current/bin/python"
PROGRAM = "/root/odsp-notebook-test.py"  # a reboot empties /run
TLS = "/etc/odsp/tls"

# Asks for a page, as JSON says on stdin, and prints status and text; "refused" if there is no way.
ASK = """
import http.client, json, ssl, sys, urllib.parse
asked = json.load(sys.stdin)
context = ssl.create_default_context(cafile="/etc/odsp/tls/ca.crt")
if asked["certificate"]:
    context.load_cert_chain(asked["certificate"])
parts = urllib.parse.urlsplit(asked["url"])
connection = http.client.HTTPSConnection(parts.netloc, context=context, timeout=20)
try:
    connection.request(asked["method"], parts.path, asked["body"], asked["headers"])
    answer = connection.getresponse()
    text = answer.read().decode()[:100000]
    print(json.dumps([str(answer.status), text, answer.headers.get_all("Set-Cookie") or []]))
except (ssl.SSLError, ConnectionError) as error:
    print(json.dumps(["refused", str(error), []]))
"""


@pytest.fixture(scope="module")
def inputs(host: Any) -> dict[str, Any]:
    """Return the roles' inputs for this host."""
    return {
        "jupyterlab_listen_port": 8888,
        "jupyterlab_base_url": "/jupyter/",
        "nginx_listen_port": 443,
        **host.ansible.get_variables(),
    }


@pytest.fixture(scope="module")
def base(inputs: dict[str, Any]) -> str:
    """Return the URL of JupyterLab on this host."""
    where = "{jupyterlab_listen_address}:{jupyterlab_listen_port}".format(**inputs)
    return f"https://{where}{inputs['jupyterlab_base_url']}"


@pytest.fixture(scope="module", autouse=True)
def program(host: Any) -> Iterator[None]:
    """Have the client of kernels on the host."""
    encoded = base64.b64encode((Path(__file__).parent / "notebook.py").read_bytes()).decode()
    host.check_output(f"echo {encoded} | base64 -d > {PROGRAM}")
    yield
    host.check_output(f"rm -f {PROGRAM}")


@pytest.fixture(scope="module")
def ask(host: Any, base: str) -> Any:
    """Return a function that asks JupyterLab for a page and returns status, text and cookies."""

    def asked(
        path: str = "api/status",
        *,
        certificate: str = f"{TLS}/jupyterlab.pem",
        method: str = "GET",
        body: str | None = None,
        headers: dict[str, str] | None = None,
        at: str = "",
    ) -> tuple[str, str, list[str]]:
        values = {
            "url": (at or base) + path,
            "certificate": certificate,
            "method": method,
            "body": body,
            "headers": headers or {},
        }
        encoded = base64.b64encode(json.dumps(values).encode()).decode()
        command = f"echo {encoded} | base64 -d | {PYTHON} -c {shlex.quote(ASK)}"
        status, text, cookies = json.loads(host.check_output(command))
        return status, text, cookies

    return asked


@pytest.fixture(scope="module")
def save(ask: Any) -> Any:
    """Return a function that saves a text as the owner's file, as the editor does."""

    def saved(name: str, text: str) -> str:
        status, _, cookies = ask("lab")
        cookie = next((c.split(";")[0] for c in cookies if c.startswith("_xsrf=")), "")
        if not cookie:
            return str(status)
        headers = {"Cookie": cookie, "X-XSRFToken": cookie.split("=", 1)[1]}
        body = json.dumps({"type": "file", "format": "text", "content": text})
        return str(ask(f"api/contents/{name}", method="PUT", body=body, headers=headers)[0])

    return saved


@pytest.fixture(scope="module")
def run(host: Any, inputs: dict[str, Any], base: str) -> Any:
    """Return a function that runs code in a new kernel and returns how that ended."""

    def ran(code: str, *, door: bool = False, at: str = "") -> Any:
        values: dict[str, Any] = {"base": at or base, "code": code}
        if door:
            owner = inputs["jupyterlab_user"]
            port, path = inputs["nginx_listen_port"], inputs["jupyterlab_base_url"]
            values |= {
                "base": f"https://localhost:{port}{path}",
                "user": [owner, inputs["nginx_user_passwords"][owner]],
            }
        else:
            values |= {"certificate": f"{TLS}/jupyterlab.crt", "key": f"{TLS}/jupyterlab.key"}
        encoded = base64.b64encode(json.dumps(values).encode()).decode()
        return host.run(f"echo {encoded} | base64 -d | {PYTHON} {PROGRAM}")

    return ran


@pytest.fixture(scope="module")
def cell(host: Any, run: Any) -> Any:
    """Return a function that runs code in a new kernel and returns what it prints."""

    def printed(code: str, **options: Any) -> str:
        answer = run(code, **options)
        told = scenario.journal(host, "odsp-jupyterlab.service") if answer.rc else ""
        assert answer.rc == 0, answer.stdout + answer.stderr + told
        return str(answer.stdout)

    return printed
