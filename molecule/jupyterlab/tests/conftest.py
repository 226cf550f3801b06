"""Both ways to JupyterLab: with a certificate of the platform on the host, and through the door."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import scenario
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

UNIT = "odsp-jupyterlab.service"
#: JupyterLab's own environment: what its pages have in the browser, notebook.py has from there.
PYTHON = "/opt/odsp/jupyterlab/current/bin/python"
NOTEBOOK = (Path(__file__).parent / "notebook.py").read_text()
PAIR = f"{scenario.TLS}/jupyterlab"

#: A request as a page sends it if v["page"], else a bare one.
ASK = """
import email.utils, requests
try:
    with requests.Session() as session:
        session.trust_env, session.verify, session.headers = False, v["authority"], v["headers"]
        session.cert = (v["pair"] + ".crt", v["pair"] + ".key") if v["pair"] else None
        session.auth = tuple(v["user"]) or None
        if v["page"]:
            session.get(v["base"] + "lab", timeout=60).raise_for_status()
            session.headers["X-XSRFToken"] = session.cookies["_xsrf"]
        url = v["base"] + v["path"]
        answer = session.request(v["method"], url, json=v["body"], timeout=60)
        date = email.utils.parsedate_to_datetime(answer.headers["Date"]).timestamp()
        print(json.dumps([answer.status_code, answer.text, date]))
except requests.RequestException as failure:
    print(json.dumps([0, str(failure), 0]))
"""


@dataclass(frozen=True)
class Answer:
    """What a request came to. Without an answer its status is 0, and the text says why."""

    status: int
    text: str
    #: What the server took for the time (seconds since 1970).
    date: float


@pytest.fixture(scope="module")
def inputs(host: Any) -> dict[str, Any]:
    """Return the roles' inputs for this host."""
    return {
        "jupyterlab_base_url": "/jupyter/",
        "nginx_listen_port": 443,
        **host.ansible.get_variables(),
    }


@pytest.fixture(scope="module")
def home(host: Any, inputs: dict[str, Any]) -> str:
    """Return the owner's home."""
    return str(host.user(inputs["jupyterlab_user"]).home)


@pytest.fixture(scope="module")
def base(inputs: dict[str, Any]) -> str:
    """Return the URL of JupyterLab on this host."""
    where = "{jupyterlab_listen_address}:{jupyterlab_listen_port}".format(**inputs)
    return f"https://{where}{inputs['jupyterlab_base_url']}"


@pytest.fixture(scope="module")
def door(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return where and as whom the owner of the notebooks comes through the door."""
    owner = inputs["jupyterlab_user"]
    return {
        "base": f"https://localhost:{inputs['nginx_listen_port']}{inputs['jupyterlab_base_url']}",
        "user": [owner, inputs["nginx_user_passwords"][owner]],
        "pair": "",
    }


@pytest.fixture(scope="module")
def ask(host: Any, base: str) -> Callable[..., Answer]:
    """Return a function that sends a request to JupyterLab, by default past the door."""

    def asked(path: str = "api/status", method: str = "GET", **options: Any) -> Answer:
        values: dict[str, Any] = {
            "base": base,
            "pair": PAIR,
            "user": [],
            "headers": {},
            "page": False,
            "body": None,
            "authority": scenario.CA,
        }
        values |= {"path": path, "method": method} | options
        return Answer(*scenario.python(host, ASK, PYTHON, **values))

    return asked


@pytest.fixture(scope="module")
def answers(ask: Any) -> Callable[[], bool]:
    """Return a question: does JupyterLab answer?"""

    def answered() -> bool:
        """Tell whether JupyterLab answers to a certificate of the platform."""
        return bool(ask().status == 200)

    return answered


@pytest.fixture(scope="module")
def door_leads_in(ask: Any, door: dict[str, Any]) -> Callable[[], bool]:
    """Return a question: does JupyterLab answer through the door?"""

    def answered() -> bool:
        """Tell whether JupyterLab answers through the door."""
        return bool(ask(**door).status == 200)

    return answered


@pytest.fixture(scope="module")
def save(ask: Any) -> Callable[[str, str], Answer]:
    """Return a function that saves a text as the owner's file, as the editor does."""

    def saved(name: str, text: str) -> Answer:
        body = {"type": "file", "format": "text", "content": text}
        answer: Answer = ask(f"api/contents/{name}", "PUT", body=body, page=True)
        return answer

    return saved


@pytest.fixture(scope="module")
def run(host: Any, base: str) -> Callable[..., dict[str, Any]]:
    """Return a function that runs code in a new kernel and returns what that came to."""

    def ran(code: str, **options: Any) -> dict[str, Any]:
        values = {"base": base, "pair": PAIR, "authority": scenario.CA, "code": code} | options
        program = f"{NOTEBOOK}\nprint(json.dumps(run_cell(**v['asked'])))"
        return dict(scenario.python(host, program, PYTHON, asked=values))

    return ran


@pytest.fixture(scope="module")
def cell(host: Any, run: Any) -> Callable[..., str]:
    """Return a function that runs code in a new kernel and returns what it prints."""

    def printed(code: str, **options: Any) -> str:
        said = run(code, **options)
        good = not said["error"] and not said["died"]
        assert good, f"{said}\n{scenario.journal(host, UNIT)}"
        return str(said["printed"]).strip()

    return printed


@pytest.fixture(scope="module")
def issued(host: Any) -> Any:
    """Return a context manager that makes a certificate of the platform's own authority.

    It yields the path on the host, less .crt and .key, as scenario.foreign_pair does.
    """
    known, made = scenario.secrets(), "/root/odsp-issued"
    authority = x509.load_pem_x509_certificate(known["vault_ca_certificate"].encode())
    signer = serialization.load_pem_private_key(known["vault_ca_private_key"].encode(), None)

    @contextmanager
    def issue(name: str) -> Iterator[str]:
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(authority.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
            .sign(signer, hashes.SHA256())  # type: ignore[arg-type]
        )
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write = """
import os
os.umask(0o077)
for ending, text in v["files"].items():
    open(v["made"] + ending, "w").write(text)
print(json.dumps(True))
"""
        shown = certificate.public_bytes(serialization.Encoding.PEM).decode()
        files = {".crt": shown, ".key": pem.decode()}
        scenario.python(host, write, made=made, files=files)
        try:
            yield made
        finally:
            host.check_output(f"rm -f {made}.crt {made}.key")

    return issue
