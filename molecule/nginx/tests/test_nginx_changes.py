"""What another converge with other inputs does to the door: just that, and no more."""

from __future__ import annotations

import socket
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import scenario
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

UNIT = "odsp-nginx.service"
#: What stands behind the door.
BEHIND = "odsp-door-test.service"
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
    ("nginx_model_server_timeout_seconds", {"nginx_model_server_timeout_seconds": 0}),
    ("nginx_model_server_max_body_size", {"nginx_model_server_max_body_size": "32 MB"}),
    ("nginx_model_server_max_body_size", {"nginx_model_server_max_body_size": "0"}),
    (
        "nginx_routes",
        {
            "nginx_routes": [
                {"component": "mlflow", "hosts": {"node-1": "a b"}, "port": 1, "server_name": "a"}
            ]
        },
    ),
    (
        "nginx_routes",
        {
            "nginx_routes": [
                {"component": "mlflow", "hosts": {"node-1": "::1"}, "port": 1, "server_name": "a"}
            ]
        },
    ),
    (
        "nginx_routes",
        {"nginx_routes": [{"component": "mlflow", "hosts": {}, "port": 1, "server_name": "a"}]},
    ),
    (
        "nginx_routes",
        {
            "nginx_routes": [
                {
                    "component": "mlflow",
                    "hosts": {"node-1": "192.0.2.1", "node-2": "192.0.2.2"},
                    "port": 1,
                    "server_name": "a",
                }
            ]
        },
    ),
]


def state(host: Any) -> str:
    """Return what the role has put onto the host, by content and mode."""
    files = "find /etc/odsp /etc/systemd/system/odsp-* -type f"
    sums = host.check_output(f"{files} -exec sha256sum {{}} + -exec stat -c '%n %A %U:%G' {{}} +")
    return "\n".join(sorted(sums.splitlines()))


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
    names = [x509.DNSName(SITE_NAME), x509.DNSName("localhost")]
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
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(keys[0], hashes.SHA256())
        )
        (folder / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return folder


def certificate_of_the_door(address: tuple[str, int], authority: str) -> str:
    """Return for which name the door proves itself to who trusts the authority alone."""
    context = ssl.create_default_context(cadata=authority)
    with (
        socket.create_connection(address, timeout=20) as plain,
        context.wrap_socket(plain, server_hostname=SITE_NAME) as secure,
    ):
        shown = secure.getpeercert(binary_form=True)
    assert shown
    subject = x509.load_der_x509_certificate(shown).subject
    return str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


@pytest.mark.usefixtures("upstream")
def test_fewer_users_and_routes_another_port_certificate_and_size(
    host: Any, ask: Any, held: Any, inputs: dict[str, Any], users: list[list[str]],
    site_certificate: Path,
) -> None:  # fmt: skip
    """What is left out has no access, what is new is in force; only a new limit restarts."""
    ada, bob = users
    changes = {
        "odsp_users": [{"name": "ada"}],
        "nginx_routes": [r for r in inputs["nginx_routes"] if r["component"] != "dask_scheduler"],
        "nginx_listen_port": 8443,
        "nginx_redirect_port": 8080,
        "odsp_model_server_max_body_size": "1M",
        "nginx_model_server_timeout_seconds": 6,
        "nginx_certificate": str(site_certificate / "site.crt"),
        "nginx_certificate_key": str(site_certificate / "site.key"),
    }
    authority = (site_certificate / "site.crt").read_text()
    key = host.file("/etc/odsp/tls/nginx-site.key")
    limit = f"systemctl show --value --property MemoryMax {UNIT}"
    before, own_limit = scenario.units(host), host.check_output(limit)

    def is_shut(port: int = 0) -> bool:
        """Tell whether nobody listens; a worker from before a reload does for a moment."""
        (former,) = ask({"path": "/", "auth": ada}, port=port)
        return bool(former["status"] == 0 and "ConnectionRefused" in former["text"])

    try:
        with held():
            scenario.converge("nginx", **changes)
        assert scenario.restarted(before, scenario.units(host)) == set()
        address = (inputs["odsp_address"], 8443)
        assert certificate_of_the_door(address, authority) == SITE_NAME
        assert (key.group, key.mode) == ("www-data", 0o640)
        private = (site_certificate / "site.key").read_text().splitlines()[1]
        assert scenario.places_of(host, private) == []
        trust = {"authority": authority}
        left, right, page, gone, route, large, slow, slower = ask(
            {"path": "/", "auth": bob} | trust,
            {"path": "/mlflow/", "auth": bob} | trust,
            {"path": "/", "auth": ada} | trust,
            {"path": "/dask/status", "auth": ada} | trust,
            {"path": "/mlflow/", "auth": ada} | trust,
            {"path": "/inference/x", "auth": ada, "method": "POST", "size": 2**20 + 1} | trust,
            {"path": "/inference/slow/1", "auth": ada, "method": "POST"} | trust,
            {"path": "/inference/slow/60", "auth": ada, "method": "POST"} | trust,
            port=8443,
        )
        assert [left["status"], right["status"]] == [401, 401]
        assert [page["status"], gone["status"], route["status"]] == [200, 404, 200]
        assert (large["status"], "larger than 1048576 bytes" in large["text"]) == (413, True)
        assert [slow["status"], slower["status"], 6 <= slower["seconds"] < 60] == [200, 504, True]
        # By one host alone: what took that long is not repeated.
        assert scenario.journal(host, BEHIND).count("asked for /slow/60") == 1
        assert 'href="/mlflow/"' in page["text"] and "/dask/" not in page["text"]
        scenario.wait_until(is_shut)
        typed = {"path": "/mlflow/?a=1", "plain": True, "headers": {"Host": SITE_NAME}}
        (plain,) = ask(typed, port=8080)
        assert plain["status"] == 308
        assert plain["headers"]["location"] == f"https://{SITE_NAME}:8443/mlflow/?a=1"

        scenario.converge("nginx_service", **changes, nginx_memory_max="512M")
        changed = scenario.units(host)
        assert scenario.restarted(before, changed) == {UNIT}
        assert int(host.check_output(limit)) == 512 * 2**20
    finally:
        scenario.converge("nginx")
    assert scenario.restarted(changed, scenario.units(host)) == {UNIT}
    assert host.check_output(limit) == own_limit
    back = ask({"path": "/", "auth": bob}, {"path": "/dask/status", "auth": ada})
    assert [answer["status"] for answer in back] == [200, 200]
    for port in (8443, 8080):
        assert is_shut(port)
    assert not key.exists


@pytest.mark.once
def test_bad_input_is_refused_in_one_sentence(site_certificate: Path, tmp_path: Path) -> None:
    """Each input that cannot work is named with the host and a remedy, before anything happens."""
    pairs = [("site.crt", "other.key"), ("ended.crt", "site.key")]
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
            for certificate, key in pairs
        ),
    ]
    said = scenario.sentences("nginx", [inputs for _, inputs in refused], tmp_path)
    for number, ((variable, inputs), sentence) in enumerate(zip(refused, said, strict=True)):
        assert sentence.startswith(f"case-{number}: "), (inputs, sentence)
        assert variable in sentence and "\n" not in sentence and sentence.endswith("."), sentence


@pytest.mark.once
def test_a_refused_run_changes_nothing(host: Any) -> None:
    """The platform's own playbook stops there, and the host is as it was."""
    before, running = state(host), scenario.units(host)
    run = scenario.layer("--tags", "nginx", nginx_password_rounds=3, nginx_listen_port=8443)
    assert run.returncode != 0
    assert "node-1: nginx_password_rounds is 3; choose 4 to 12." in run.stdout
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert (state(host), scenario.units(host)) == (before, running)
