"""What an operator asks of certificates: do they open the right doors, in time, and only those?"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import faults
import pytest
import scenario
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PORT = 8443
UNIT = "odsp-probe.service"
PATH = "/etc/odsp/tls/probe"
OTHER_KEY = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256"
CLOSED = "CERTIFICATE_VERIFY_FAILED"
PRIVATE = ["root:root 644", "root:probe 640", "root:probe 640"]

# A component: as an account of its own it serves what lies on the disk now, to holders of a
# certificate of the platform.
SERVER = """
import socket, ssl
listener = socket.create_server(("0.0.0.0", 8443))
while True:
    connection, _ = listener.accept()
    connection.settimeout(10)
    try:
        context = ssl.create_default_context(
            ssl.Purpose.CLIENT_AUTH, cafile="/etc/odsp/tls/ca.crt"
        )
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain("/etc/odsp/tls/probe.crt", "/etc/odsp/tls/probe.key")
        with context.wrap_socket(connection, server_side=True) as peer:
            peer.sendall(b"hello")
            peer.unwrap()
    except OSError as error:
        print(error, flush=True)
        connection.close()
"""
# Trusts the platform, asks for a name, shows a certificate or none.
CLIENT = """
import socket, ssl, sys
context = ssl.create_default_context(cafile="/etc/odsp/tls/ca.crt")
if sys.argv[2]:
    context.load_cert_chain(sys.argv[2])
with context.wrap_socket(
    socket.create_connection(("127.0.0.1", 8443), timeout=10), server_hostname=sys.argv[1]
) as peer:
    print(peer.recv(5).decode())
"""


@pytest.fixture(scope="module", autouse=True)
def server(host: Any) -> Iterator[None]:
    """Run the component."""
    unit = (
        "[Service]\nUser=probe\nGroup=probe\nRestart=always\n"
        "ExecStart=/usr/bin/python3 /run/odsp-probe.py\n"
    )
    for path, text in {"/run/odsp-probe.py": SERVER, f"/run/systemd/system/{UNIT}": unit}.items():
        host.check_output(f"printf %s {shlex.quote(text)} > {path}; chmod 0644 {path}")
    host.check_output(f"systemctl daemon-reload; systemctl start {UNIT}")
    scenario.wait_until(lambda: host.socket(f"tcp://0.0.0.0:{PORT}").is_listening)
    yield
    host.check_output(f"systemctl stop {UNIT}; rm /run/systemd/system/{UNIT} /run/odsp-probe.py")


def ask(host: Any, name: str = "node-1", pem: str = f"{PATH}.pem") -> str:
    """Return what the component answers to this name, or the error."""
    command = host.run(f"python3 -c {shlex.quote(CLIENT)} {name} '{pem}'")
    lines = (command.stdout + command.stderr).strip().splitlines()
    return str(lines[-1]) if lines else "nothing"


def start(*arguments: str, **inputs: Any) -> subprocess.Popen[str]:
    """Start the scenario's playbook with other inputs."""
    sources = [
        scenario.ROOT / "inventories/common",
        scenario.ROOT / "molecule/_shared/inventory",
        Path(os.environ["ODSP_STATE_DIR"]) / "secrets",
        Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent,
    ]
    playbook = Path(__file__).parents[1] / "converge.yml"
    command = ["ansible-playbook", str(playbook), "--diff", "--extra-vars", json.dumps(inputs)]
    command += [part for source in sources for part in ("--inventory", str(source))]
    return subprocess.Popen(
        [*command, *arguments], text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1"},
    )  # fmt: skip


def converge(*arguments: str, tags: str = "certificates", **inputs: Any) -> Any:
    """Run the role as the scenario's converge step did, with other inputs; no key is told."""
    process = start("--tags", tags, *arguments, **inputs)
    output, _ = process.communicate()
    assert "PRIVATE KEY" not in output
    assert scenario.secrets()["vault_ca_private_key"].splitlines()[1] not in output
    return subprocess.CompletedProcess("ansible-playbook", process.returncode, output, "")


def changed(run: subprocess.CompletedProcess[str]) -> int:
    """Return how many changes a successful run made."""
    assert run.returncode == 0, run.stdout
    return scenario.recap(run)["node-1"]["changed"]


def files(host: Any) -> str:
    """Return what tells one state of the three files from another."""
    return str(host.check_output(f"sha256sum {PATH}.crt {PATH}.key {PATH}.pem"))


def permissions(host: Any) -> list[str]:
    """Return who may do what with certificate, key, and both in one."""
    return str(host.check_output(f"stat -c '%U:%G %a' {PATH}.crt {PATH}.key {PATH}.pem")).split(
        "\n"
    )


def address(host: Any) -> str:
    """Return the address of the host."""
    return str(host.ansible.get_variables()["odsp_address"])


def authority() -> tuple[str, str]:
    """Return another authority and its private key, as inventories write them."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Next authority")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=999))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=False,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=True,
                crl_sign=True,
                encipher_only=False,
                decipher_only=False,
            ),
            True,
        )
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode(), private.decode()


def test_certificate_is_good_for_every_name_and_no_other(host: Any) -> None:
    """Real clients verify it by name and by address; under another name they leave."""
    for name in ("node-1", address(host), "probe.test", "fd00::10:8443"):
        assert ask(host, name) == "hello", name
    for name in ("elsewhere", "127.0.0.1", "test"):
        assert CLOSED in ask(host, name), name


def test_certificate_opens_doors_that_ask_for_one(host: Any) -> None:
    """The pair in one file makes its holder known; without it the door stays shut."""
    assert ask(host) == "hello"
    assert "CERTIFICATE_REQUIRED" in ask(host, pem="")


def test_private_key_is_private(host: Any) -> None:
    """Only root and the component read it, and it is on this host alone."""
    as_nobody = "setpriv --reuid nobody --regid nogroup --clear-groups"
    for kind in ("key", "pem"):
        assert host.run(f"{as_nobody} cat {PATH}.{kind}").rc != 0
        assert host.run(f"setpriv --reuid probe --regid probe --clear-groups tee {PATH}.{kind}").rc
    line = host.check_output(f"sed -n 2p {PATH}.key")
    assert scenario.places_of(host, line) == []
    state = Path(os.environ["ODSP_STATE_DIR"])
    assert not [f for f in state.rglob("*") if f.is_file() and line.encode() in f.read_bytes()]
    assert host.run(f"ls {PATH}.*.new").rc != 0, "a former key is left"


def test_opened_permissions_are_closed_again(host: Any) -> None:
    """A key that somebody opened is private after the next run, and still the same."""
    before = files(host)
    host.check_output(f"chmod 0644 {PATH}.key; chgrp nogroup {PATH}.pem")
    assert changed(converge("--check")) == 1
    assert host.file(f"{PATH}.key").mode == 0o644
    assert changed(converge()) == 1
    assert permissions(host) == PRIVATE
    assert files(host) == before


def test_certificate_is_renewed_in_time(host: Any) -> None:
    """It stays while enough days are left and is made anew, with a new key, when not."""
    before = files(host)
    assert changed(converge(certificates_renew_days=824)) == 0
    assert (
        changed(converge("--check", certificates_renew_days=826, certificates_valid_days=900)) == 1
    )
    assert files(host) == before
    assert changed(converge(certificates_renew_days=826, certificates_valid_days=900)) == 3
    assert not set(files(host).split()[::2]) & set(before.split()[::2])
    assert permissions(host) == PRIVATE
    assert ask(host) == "hello"
    assert changed(converge(certificates_renew_days=826, certificates_valid_days=900)) == 0


@pytest.mark.once
@pytest.mark.parametrize(
    "damage",
    [
        f"{OTHER_KEY} -out {PATH}.key; cat {PATH}.crt {PATH}.key > {PATH}.pem",
        f"rm {PATH}.key",
        f"head -c 100 {PATH}.pem > {PATH}.x; cat {PATH}.x > {PATH}.pem; rm {PATH}.x",
    ],
    ids=["another key", "no key", "half a pair"],
)
def test_certificate_that_does_not_fit_is_renewed(host: Any, damage: str) -> None:
    """Whatever is left of the pair, e.g. by a run that was cut off, one run makes it whole."""
    host.check_output(damage)
    assert changed(converge()) == 3
    assert ask(host) == "hello"


def test_changed_names_are_followed_both_ways(host: Any) -> None:
    """A name that is left out is no longer vouched for; a new one is good at once."""
    further = "fd00::10:8443"
    assert ask(host, further) == "hello"
    try:
        assert changed(converge(certificates_extra_names=["probe.test"])) == 3
        assert CLOSED in ask(host, further)
        assert ask(host, "probe.test") == "hello"
    finally:
        back = converge()
    assert changed(back) == 3
    assert ask(host, further) == "hello"


def test_changed_authority_is_followed(host: Any) -> None:
    """With another authority one run replaces every certificate; the old one is worth nothing."""
    certificate, key = authority()
    inputs = {
        "base_ca_certificate": certificate,
        "certificates_ca_certificate": certificate,
        "certificates_ca_private_key": key,
    }
    host.check_output(f"install -m 0600 {PATH}.pem /root/former.pem")
    try:
        assert changed(converge(tags="base,certificates", **inputs)) == 4
        assert ask(host) == "hello"
        assert "hello" not in ask(host, pem="/root/former.pem")
    finally:
        back = converge(tags="base,certificates")
        host.check_output("rm /root/former.pem")
    assert changed(back) == 4
    assert ask(host) == "hello"


def test_clock_that_is_behind_may_use_it_at_once(host: Any) -> None:
    """A host whose clock lags some minutes behind the controller's takes a fresh certificate."""
    host.check_output(f"rm {PATH}.key")
    assert changed(converge()) == 3
    early = int(host.check_output("date +%s")) - 30 * 60
    verdict = host.run(f"openssl verify -CAfile {scenario.CA} -attime {early} {PATH}.crt")
    assert verdict.rc == 0, verdict.stderr


@pytest.mark.once
def test_run_that_is_cut_off_leaves_the_old_pair(host: Any) -> None:
    """Killed after it asked for a certificate, a run leaves the old one; the next finishes."""
    before = files(host)
    run = start("--tags", "certificates", certificates_extra_names=["cut.test"])
    try:
        scenario.wait_until(lambda: host.file(f"{PATH}.key.new").exists)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
    assert files(host) == before
    assert ask(host) == "hello"
    assert changed(converge(certificates_extra_names=["cut.test"])) == 3
    assert ask(host, "cut.test") == "hello"
    assert not host.file(f"{PATH}.key.new").exists
    assert changed(converge()) == 3


@pytest.mark.fault("full disk", "The old pair stays whole and in use; the next run renews it.")
def test_full_disk_leaves_the_old_pair(host: Any, measured: Callable[[str], None]) -> None:
    """A renewal that finds no room fails and changes nothing that is in use."""
    with faults.full_disk(host, UNIT, "/etc/odsp/tls", mib=1) as disk:
        scenario.wait_until(lambda: ask(host) == "hello")
        before = files(host)
        disk.fill()
        run = converge(certificates_extra_names=["full.test"])
        assert run.returncode != 0
        assert files(host) == before
        assert ask(host) == "hello"
        disk.free()
        assert changed(converge(certificates_extra_names=["full.test"])) == 3
        assert ask(host, "full.test") == "hello"
    measured("the run failed, clients went on with the old certificate; with room again, renewed")


@pytest.mark.fault("expired certificate", "The next run renews it by itself.")
def test_expired_certificate_is_renewed(host: Any, measured: Callable[[str], None]) -> None:
    """Clients refuse what ended yesterday; one run of the role later they are served."""
    with faults.expired_certificate(host, "probe", UNIT):
        scenario.wait_until(lambda: "expired" in ask(host, pem=""))
        assert changed(converge()) == 3
        assert ask(host) == "hello"
    measured("clients refused it; after one run they were served")


@pytest.mark.once
@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (
            {"certificates_host_names": []},
            "certificates_host_names is empty; list the names and addresses of this host",
        ),
        (
            {"certificates_extra_names": ["https://lab.example.org"]},
            'the certificate of probe shall be for "https://lab.example.org"; write one host name',
        ),
        (
            {"certificates_valid_days": 20},
            "certificates_valid_days is 20 and certificates_renew_days 30, so that every run",
        ),
        (
            {"certificates_ca_certificate": authority()[0]},
            "certificates_ca_private_key does not belong to certificates_ca_certificate; keep",
        ),
    ],
    ids=["no name", "a URL", "too short", "another authority's key"],
)
def test_bad_input_stops_the_role(host: Any, inputs: dict[str, Any], sentence: str) -> None:
    """One sentence names the host, what is wrong and the remedy; nothing is changed."""
    before = files(host)
    run = converge(**inputs)
    assert run.returncode != 0
    assert f"node-1: {sentence}" in " ".join(run.stdout.split())
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert files(host) == before
