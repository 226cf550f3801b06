"""What another converge with other inputs does to the door: just that, and no more."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
from contextlib import closing
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import scenario
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

UNIT = "odsp-nginx.service"
SITE_NAME = "door.example"

#: What is wrong, and the variable that the one sentence must name.
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("nginx_user_passwords", {"nginx_user_passwords": {}}),
    ("nginx_user_passwords", {"nginx_user_passwords": {"Ada Lovelace": "not-a-secret"}}),
    ("nginx_user_passwords", {"nginx_user_passwords": {"ada": "x" * 73}}),
    ("nginx_password_rounds", {"nginx_password_rounds": 3}),
    ("nginx_listen_port", {"nginx_listen_port": 70000}),
    ("nginx_redirect_port", {"nginx_redirect_port": 443}),
    ("nginx_listen_addresses", {"nginx_listen_addresses": []}),
    ("nginx_listen_addresses", {"nginx_listen_addresses": ["::1"]}),
    ("nginx_server_names", {"nginx_server_names": ["https://door.example"]}),
    ("nginx_site_name", {"nginx_site_name": '"; }'}),
    ("nginx_certificate", {"nginx_certificate": "/nowhere.crt"}),
    (
        "nginx_certificate",
        {"nginx_certificate": "/nowhere.crt", "nginx_certificate_key": "/nowhere.key"},
    ),
    ("nginx_memory_max", {"nginx_memory_max": "lots"}),
    ("nginx_jupyterlab_user", {"nginx_jupyterlab_user": "nobody"}),
    (
        "nginx_routes",
        {
            "nginx_routes": [
                {"component": "mlflow", "address": "a b", "port": 1, "server_name": "node-1"}
            ]
        },
    ),
    (
        "nginx_routes",
        {
            "nginx_routes": [
                {"component": "mlflow", "address": "::1", "port": 1, "server_name": "node-1"}
            ]
        },
    ),
]


def state(host: Any) -> str:
    """Return what the role has put onto the host, by content and mode."""
    files = "find /etc/odsp /etc/systemd/system/odsp-* -type f"
    sums = host.check_output(f"{files} -exec sha256sum {{}} + -exec stat -c '%n %A %U:%G' {{}} +")
    return "\n".join(sorted(sums.splitlines()))


def converge(changes: dict[str, Any] | None = None) -> None:
    """Converge with other inputs, or put the scenario's own back."""
    run = scenario.site("--tags", "nginx", "--extra-vars", json.dumps(changes or {}))
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def site_certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a certificate of the site's own, its key, and one that does not fit."""
    folder = tmp_path_factory.mktemp("site")
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    for name, key in zip(("site", "other"), keys, strict=True):
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        (folder / f"{name}.key").write_bytes(pem)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SITE_NAME)])
    now = datetime.now(UTC)
    for name, end in (("site", 1), ("ended", -1)):
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(keys[0].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=2))
            .not_valid_after(now + timedelta(days=end))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(SITE_NAME)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(keys[0], hashes.SHA256())
        )
        (folder / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return folder


@pytest.mark.usefixtures("upstream")
def test_fewer_users_and_routes_and_another_port(
    host: Any, ask: Any, held: Any, inputs: dict[str, Any], users: list[list[str]]
) -> None:
    """Who and what is left out has no access any more; nobody else's connection breaks."""
    ada, bob = users
    routes = [r for r in inputs["nginx_routes"] if r["component"] != "dask_scheduler"]
    changes = {"odsp_users": [{"name": "ada"}], "nginx_routes": routes, "nginx_listen_port": 8443}
    before = scenario.units(host)
    try:
        with held():
            converge(changes)
        left, right, page, gone, route = ask(
            {"path": "/", "auth": bob},
            {"path": "/mlflow/", "auth": bob},
            {"path": "/", "auth": ada},
            {"path": "/dask/status", "auth": ada},
            {"path": "/mlflow/", "auth": ada},
            port=8443,
        )
        assert [left["status"], right["status"]] == [401, 401]
        assert [page["status"], gone["status"], route["status"]] == [200, 404, 200]
        assert 'href="/mlflow/"' in page["text"] and "/dask/" not in page["text"]
        (former,) = ask({"path": "/", "auth": ada})
        assert former["status"] == 0 and "ConnectionRefused" in former["text"]
    finally:
        converge()
    back = ask({"path": "/", "auth": bob}, {"path": "/dask/status", "auth": ada})
    assert [answer["status"] for answer in back] == [200, 200]
    assert ask({"path": "/", "auth": ada}, port=8443)[0]["status"] == 0
    assert scenario.restarted(before, scenario.units(host)) == set()


def certificate_of_the_door(inputs: dict[str, Any], authority: str) -> str:
    """Return for which name the door proves itself to who trusts the authority alone."""
    context = ssl.create_default_context(cadata=authority)
    address = (inputs["odsp_address"], inputs["nginx_listen_port"])
    with (
        socket.create_connection(address, timeout=20) as plain,
        context.wrap_socket(plain, server_hostname=SITE_NAME) as secure,
    ):
        shown = secure.getpeercert(binary_form=True)
    assert shown
    subject = x509.load_der_x509_certificate(shown).subject
    return str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


@pytest.mark.long
def test_another_size_and_a_certificate_of_the_site(
    host: Any, ask: Any, inputs: dict[str, Any], users: list[list[str]], site_certificate: Path
) -> None:
    """A new limit restarts; the site's certificate is shown, and gone when it is left out."""
    before = scenario.units(host)
    changes = {
        "nginx_memory_max": "512M",
        "nginx_redirect_port": 8080,
        "nginx_certificate": str(site_certificate / "site.crt"),
        "nginx_certificate_key": str(site_certificate / "site.key"),
    }
    key = "/etc/odsp/tls/nginx-site.key"
    try:
        converge(changes)
        assert scenario.restarted(before, scenario.units(host)) == {UNIT}
        limit = host.check_output(f"systemctl show --value --property MemoryMax {UNIT}")
        assert int(limit) == 512 * 2**20
        authority = (site_certificate / "site.crt").read_text()
        assert certificate_of_the_door(inputs, authority) == SITE_NAME
        assert (host.file(key).group, host.file(key).mode) == ("www-data", 0o640)
        private = (site_certificate / "site.key").read_text().splitlines()[1]
        assert scenario.places_of(host, private) == []
        with closing(HTTPConnection(inputs["odsp_address"], 8080, timeout=20)) as plain:
            plain.request("GET", "/mlflow/?a=1", headers={"Host": SITE_NAME})
            answer = plain.getresponse()
        assert answer.status == 308
        assert answer.headers["Location"] == f"https://{SITE_NAME}/mlflow/?a=1"
    finally:
        converge()
    assert not host.file(key).exists
    assert not host.socket("tcp://0.0.0.0:8080").is_listening
    assert ask({"path": "/", "auth": users[0]})[0]["status"] == 200


def test_bad_input_is_refused_in_one_sentence(site_certificate: Path, tmp_path: Path) -> None:
    """Each input that cannot work is named with the host and a remedy, before anything happens."""
    pairs = {"other.key": "site.crt", "site.key": "ended.crt"}
    refused = [
        *REFUSED,
        *(
            (
                "nginx_certificate",
                {
                    "nginx_certificate": str(site_certificate / certificate),
                    "nginx_certificate_key": str(site_certificate / key),
                },
            )
            for key, certificate in pairs.items()
        ),
    ]
    # A host for each, all in one run: the checks ask the inputs and never the host.
    common = {
        "ansible_connection": "local",
        "ansible_python_interpreter": "{{ ansible_playbook_python }}",
    }
    hosts = {f"bad-{number}": common | bad for number, (_, bad) in enumerate(refused)}
    (tmp_path / "hosts.json").write_text(json.dumps({"bad": {"hosts": hosts}}))
    play = {
        "hosts": "bad",
        "gather_facts": False,
        "tasks": [{"import_role": {"name": "nginx", "tasks_from": "validate.yml"}}],
    }
    (tmp_path / "play.json").write_text(json.dumps([play]))
    sources = [
        scenario.ROOT / "inventories/common",
        scenario.ROOT / "molecule/_shared/inventory",
        Path(os.environ["ODSP_STATE_DIR"]) / "secrets",
        Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent,
        tmp_path / "hosts.json",
    ]
    inventories = [part for source in sources for part in ("--inventory", str(source))]
    run = subprocess.run(
        ["ansible-playbook", str(tmp_path / "play.json"), *inventories],
        check=False, capture_output=True, text=True,
        env={
            **os.environ,
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
        },
    )  # fmt: skip
    told = json.loads(run.stdout)
    failures = {
        host: result["msg"]
        for play_told in told["plays"]
        for task in play_told["tasks"]
        for host, result in task["hosts"].items()
        if result.get("failed")
    }
    for number, (variable, bad) in enumerate(refused):
        sentence = failures.get(f"bad-{number}", "")
        assert sentence.startswith(f"bad-{number}: "), (bad, sentence)
        assert variable in sentence and sentence.count("\n") == 0 and sentence.endswith("."), bad
        assert "not-a-secret" not in sentence
    changed = {name: counts["changed"] for name, counts in told["stats"].items()}
    assert set(changed.values()) == {0}


def test_a_refused_run_changes_nothing(host: Any) -> None:
    """The platform's own playbook stops there, and the host is as it was."""
    before, running = state(host), scenario.units(host)
    bad = {"nginx_password_rounds": 3, "nginx_listen_port": 8443}
    run = scenario.site("--tags", "nginx", "--extra-vars", json.dumps(bad))
    assert run.returncode != 0
    assert "node-1: nginx_password_rounds is 3; choose 4 to 12." in run.stdout
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert (state(host), scenario.units(host)) == (before, running)
