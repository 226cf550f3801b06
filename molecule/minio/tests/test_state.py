"""The module minio_state against a real server: does it repair, remove, and leave alone?"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import holes
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

ROLE = Path(__file__).resolve().parents[3] / "roles/minio"
ROOT_PASSWORD = secrets.token_hex(16)
SECRET = secrets.token_hex(16)


def make_certificate(folder: Path) -> Path:
    """Write a self-signed certificate as the server wants it; return the file to trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "store")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("store"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "public.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "private.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return folder / "public.crt"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Run a server with TLS and return the module's arguments for it."""
    folder = tmp_path_factory.mktemp("minio")
    (folder / "certs").mkdir()
    ca = make_certificate(folder / "certs")
    build = [sys.executable, str(ROLE / "files/build/build.py")]
    binary = subprocess.run(build, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    port, console_port = holes.free_ports()
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "MINIO_ROOT_USER": "root-of-test",
        "MINIO_ROOT_PASSWORD": ROOT_PASSWORD,
        "MINIO_UPDATE": "off",
    }
    command = [binary, "server", "--quiet", "--certs-dir", str(folder / "certs")]
    command += ["--address", f"127.0.0.1:{port}", "--console-address", f"127.0.0.1:{console_port}"]
    log = (folder / "log").open("wb")
    with subprocess.Popen([*command, str(folder / "data")], env=env, stdout=log, stderr=log) as it:
        yield {
            "address": "127.0.0.1",
            "port": port,
            "server_name": "store",
            "ca": str(ca),
            "root_user": "root-of-test",
            "root_password": ROOT_PASSWORD,
            "buckets": ["one", "two"],
            "accounts": [
                {"name": "one", "secret_key": SECRET, "buckets": ["one"]},
                {"name": "two", "secret_key": SECRET[::-1], "buckets": ["two"]},
            ],
        }
        it.kill()
    log.close()


def run(arguments: dict[str, Any], *, check_mode: bool = False) -> dict[str, Any]:
    """Run the module as Ansible does and return its answer."""
    given = {"ANSIBLE_MODULE_ARGS": arguments | {"_ansible_check_mode": check_mode}}
    done = subprocess.run(
        [sys.executable, str(ROLE / "library/minio_state.py")],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    for secret in (ROOT_PASSWORD, SECRET, SECRET[::-1]):
        assert secret not in done.stdout + done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def admin(server: dict[str, Any]) -> Any:
    """Return an administrator's client, to change things by hand."""
    minio = pytest.importorskip("minio")
    urllib3 = pytest.importorskip("urllib3")
    return minio.MinioAdmin(
        endpoint=f"127.0.0.1:{server['port']}",
        credentials=minio.credentials.StaticProvider(server["root_user"], ROOT_PASSWORD),
        http_client=urllib3.PoolManager(ca_certs=server["ca"]),
    )


def test_dry_run_first_run_second_run(server: dict[str, Any]) -> None:
    """A dry run tells and does nothing, the first run does it, the second has nothing to do."""
    told = run(server, check_mode=True)["actions"]
    assert len(told) == 4
    assert run(server)["actions"] == told
    assert run(server)["changed"] is False
    assert run(server, check_mode=True)["changed"] is False


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("secret", {"secret_key": "another-secret"}),
        ("status", {"status": "off"}),
        (
            "policy",
            {
                "policy": {
                    "Version": "2012-10-17",
                    "Statement": [
                        {"Effect": "Allow", "Action": ["s3:*"], "Resource": ["arn:aws:s3:::*"]}
                    ],
                }
            },
        ),
    ],
)
def test_repairs_what_was_changed_by_hand(
    server: dict[str, Any], fault: str, change: dict[str, Any]
) -> None:
    """A secret, a state or a policy that drifted is found and put right."""
    run(server)
    client = admin(server)
    # The server takes an update without a policy for one that removes the policy.
    policy = json.loads(json.loads(client.get_service_account("one"))["policy"])
    client.update_service_account(access_key="one", **({"policy": policy} | change))
    assert run(server)["actions"] == [f"write account one ({fault})"]
    assert run(server)["changed"] is False


def test_removes_its_own_accounts_and_no_others(server: dict[str, Any]) -> None:
    """An account that is no longer listed goes; one made by somebody else stays."""
    run(server)
    client = admin(server)
    client.add_service_account(access_key="by-hand", secret_key="made-by-hand", name="mine")
    fewer = server | {"accounts": server["accounts"][:1]}
    assert run(fewer)["actions"] == ["remove account two"]
    assert "by-hand" in client.list_service_account(server["root_user"])
    taken = {"name": "by-hand", "secret_key": "some-secret", "buckets": ["one"]}
    refused = run(server | {"accounts": [taken]})
    assert refused["failed"] and "did not make" in refused["msg"]
    client.delete_service_account("by-hand")


def test_wrong_root_password_and_wrong_server_are_told(server: dict[str, Any]) -> None:
    """What cannot be done is said in a sentence, and never taken for done."""
    refused = run(server | {"root_password": "not-the-password"})
    assert refused["failed"] and "refuses the root user" in refused["msg"]
    refused = run(server | {"server_name": "somebody-else", "timeout": 1})
    assert refused["failed"] and "somebody-else" in refused["msg"]
