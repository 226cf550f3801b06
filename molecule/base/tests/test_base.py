"""What an operator asks of every host: whom does it trust, and is it in order?"""

from __future__ import annotations

import base64
import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import scenario
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PORT = 8443
SETTINGS = "/etc/odsp/openssl.cnf"
UV = "/opt/odsp/uv/current/uv"

# Serves TLS and ends every connection without a farewell, as Dask's peers do.
SERVER = """
import os, socket, ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1])
context.maximum_version = getattr(ssl.TLSVersion, sys.argv[2])
listener = socket.create_server(("127.0.0.1", int(sys.argv[3])))
while True:
    connection, _ = listener.accept()
    try:
        with context.wrap_socket(connection, server_side=True) as peer:
            peer.sendall(b"hello")
            socket.socket(fileno=os.dup(peer.fileno())).shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
"""
# Says what it read, then how the connection ended.
CLIENT = """
import socket, ssl, sys
context = ssl.create_default_context(cafile=sys.argv[2] or None)
plain = socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=10)
with context.wrap_socket(
    plain, server_hostname="service.test", suppress_ragged_eofs=False
) as peer:
    print(peer.recv(5).decode(), peer.version(), repr(peer.recv(1)))
"""

Pair = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def certify(name: str, issuer: Pair | None = None) -> Pair:
    """Return a certificate with its key: an authority, or a server that one vouches for."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(
                issuer[1].public_key() if issuer else key.public_key()
            ),
            False,
        )
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=issuer is None,
                crl_sign=False,
                encipher_only=False,
                decipher_only=False,
            ),
            True,
        )
    )  # fmt: skip
    return builder.sign(issuer[1] if issuer else key, hashes.SHA256()), key


def pem(certificate: x509.Certificate) -> str:
    """Return a certificate as inventories write it."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


@pytest.fixture(scope="module")
def platform() -> Pair:
    """Return the platform's authority."""
    known = scenario.secrets()
    key = serialization.load_pem_private_key(known["vault_ca_private_key"].encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return x509.load_pem_x509_certificate(known["vault_ca_certificate"].encode()), key


@contextmanager
def serving(host: Any, issuer: Pair, newest: str = "TLSv1_3") -> Iterator[None]:
    """Run a TLS server on the host whose certificate is the issuer's."""
    certificate, key = certify("service.test", issuer)
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    both = base64.b64encode(private + pem(certificate).encode()).decode()
    unit, file = "test-server.service", "/root/test-server.pem"
    host.check_output(f"umask 077; echo {both} | base64 -d > {file}")
    server = f"/usr/bin/python3 -c {shlex.quote(SERVER)} {file} {newest} {PORT}"
    try:
        host.check_output(f"systemd-run --quiet --collect --unit {unit} {server}")
        scenario.wait_until(lambda: host.socket(f"tcp://127.0.0.1:{PORT}").is_listening)
        yield
    finally:
        host.check_output(f"systemctl stop {unit}; rm -f {file}")


def ask(host: Any, authority: str = "", settings: str = "") -> Any:
    """Read from the server as an account without rights; return what the client said."""
    environment = f"OPENSSL_CONF={settings} " if settings else ""
    client = f"python3 -c {shlex.quote(CLIENT)} {PORT} '{authority}'"
    return host.run(f"setpriv --reuid nobody --clear-groups env {environment}{client}")


def converge(*arguments: str, **inputs: Any) -> subprocess.CompletedProcess[str]:
    """Run the role as the scenario's converge step did, with other inputs; no secret is told."""
    sources = [
        scenario.ROOT / "inventories/common",
        scenario.ROOT / "molecule/_shared/inventory",
        Path(os.environ["ODSP_STATE_DIR"]) / "secrets",
        Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent,
    ]
    command = ["ansible-playbook", str(scenario.ROOT / "playbooks/base.yml"), "--diff"]
    command += [part for source in sources for part in ("--inventory", str(source))]
    run = subprocess.run(
        [*command, "--extra-vars", json.dumps(inputs), *arguments],
        check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1"},
    )  # fmt: skip
    assert scenario.secrets()["vault_ca_private_key"].splitlines()[1] not in run.stdout + run.stderr
    return run


def changed(run: subprocess.CompletedProcess[str]) -> int:
    """Return how many changes a successful run made."""
    assert run.returncode == 0, run.stdout + run.stderr
    return scenario.recap(run)["node-1"]["changed"]


def test_platform_vouches_for_its_services_and_nobody_else(host: Any, platform: Pair) -> None:
    """Any account can verify the platform's certificates; the system trusts nobody new."""
    with serving(host, platform):
        good, by_system = ask(host, scenario.CA, SETTINGS), ask(host)
        stranger = ask(host, "/etc/ssl/certs/ca-certificates.crt")
    assert good.stdout.split()[:2] == ["hello", "TLSv1.3"], good.stderr
    assert "CERTIFICATE_VERIFY_FAILED" in by_system.stderr
    assert "CERTIFICATE_VERIFY_FAILED" in stranger.stderr
    with serving(host, certify("Somebody else")):
        assert "CERTIFICATE_VERIFY_FAILED" in ask(host, scenario.CA, SETTINGS).stderr


def test_further_authority_is_trusted_until_it_is_left_out(host: Any) -> None:
    """The whole system trusts what the site lists, and no longer once the line is gone."""
    further = certify("Authority of a proxy")
    present = host.ansible.get_variables()["odsp_extra_ca_certificates"]
    inputs = {"base_extra_ca_certificates": [*present, pem(further[0])]}
    with serving(host, further):
        assert "CERTIFICATE_VERIFY_FAILED" in ask(host).stderr
        try:
            assert changed(converge("--check", **inputs)) == 1
            assert "CERTIFICATE_VERIFY_FAILED" in ask(host).stderr, "a dry run has changed the host"
            assert changed(converge(**inputs)) == 1
            assert ask(host, settings=SETTINGS).stdout.startswith("hello")
            assert changed(converge(**inputs)) == 0
            # As a run leaves it that ended before the store was made anew.
            host.check_output("rm /usr/local/share/ca-certificates/odsp.done")
        finally:
            last = converge()
        assert changed(last) == 1
        assert "CERTIFICATE_VERIFY_FAILED" in ask(host).stderr
    assert changed(converge()) == 0


def test_connection_closed_without_farewell_is_an_end(host: Any, platform: Pair) -> None:
    """The platform's settings are in force in a real client; without them it sees an error."""
    with serving(host, platform):
        ours, plain = ask(host, scenario.CA, SETTINGS), ask(host, scenario.CA)
    assert ours.stdout.strip() == "hello TLSv1.3 b''", ours.stderr
    # The older release's Python needs nobody to tell it.
    assert ("UNEXPECTED_EOF" in plain.stderr) == (host.system_info.codename != "bookworm")


def test_site_s_own_tls_policy_is_kept(host: Any, platform: Pair) -> None:
    """Stricter settings of the system reach the platform's clients with the next run."""
    system, policy = "/etc/ssl/openssl.cnf", "MinProtocol = TLSv1.3"
    backup = "/root/openssl.cnf"
    sections = f"openssl_conf=a\\n[a]\\nssl_conf=b\\n[b]\\nsystem_default=c\\n[c]\\n{policy}\\n"
    with serving(host, platform, newest="TLSv1_2"):
        assert ask(host, scenario.CA, SETTINGS).stdout.startswith("hello TLSv1.2")
        host.check_output(f"cp -a {system} {backup} && printf '{sections}' > {system}")
        try:
            assert changed(converge("--check")) == 1
            assert changed(converge()) == 1
            refused = ask(host, scenario.CA, SETTINGS)
        finally:
            host.check_output(f"mv {backup} {system}")
            last = converge()
        assert "PROTOCOL" in refused.stderr.upper(), refused.stdout
        assert changed(last) == 1
        assert ask(host, scenario.CA, SETTINGS).stdout.startswith("hello TLSv1.2")


def test_any_account_can_make_an_environment_with_uv(host: Any) -> None:
    """The controller's own uv works on the host, for an account without rights too."""
    here = subprocess.run(["uv", "--version"], check=True, capture_output=True, text=True).stdout
    assert host.check_output(f"{UV} --version").split()[1] == here.split()[1]
    folder = host.check_output("setpriv --reuid nobody --clear-groups mktemp -d")
    try:
        as_nobody = f"cd {folder} && setpriv --reuid nobody --clear-groups env HOME={folder}"
        host.check_output(f"{as_nobody} {UV} venv --quiet --python /usr/bin/python3 {folder}/venv")
        host.check_output(f"{as_nobody} {folder}/venv/bin/python -c 'import ssl'")
    finally:
        host.check_output(f"rm -rf {folder}")


@pytest.mark.parametrize(
    "damage",
    [
        "rm /opt/odsp/uv/*.complete; : > $(readlink -f /opt/odsp/uv/current)/uv",
        "ln -sfn 0.0.1 /opt/odsp/uv/current",
    ],
    ids=["copy cut short", "link to another release"],
)
def test_uv_is_made_whole(host: Any, damage: str) -> None:
    """A copy that was cut short, or a way back to an older uv, ends with the controller's uv."""
    before = host.check_output(f"{UV} --version")
    host.check_output(damage)
    assert host.run(f"{UV} --version").stdout != f"{before}\n"
    assert changed(converge()) >= 1
    assert host.check_output(f"{UV} --version") == before


@pytest.fixture
def package(host: Any) -> Iterator[str]:
    """Build a Debian package with a configuration file in two versions; return their folder."""
    folder = "/root/test-package"
    build = """
set -eu
for version in 1 2; do
  root={folder}/$version
  mkdir -p $root/DEBIAN $root/etc
  echo "text of version $version" > $root/etc/odsp-test.conf
  echo /etc/odsp-test.conf > $root/DEBIAN/conffiles
  printf '%s\\n' 'Package: odsp-test' "Version: $version" 'Architecture: all' \
    'Maintainer: nobody <nobody@example.org>' 'Description: a test' > $root/DEBIAN/control
  dpkg-deb --root-owner-group --build $root {folder}/$version.deb >/dev/null
done
"""
    host.check_output(f"sh -c {shlex.quote(build.replace('{folder}', folder))}")
    yield folder
    host.check_output(f"dpkg --purge odsp-test; rm -rf {folder}")


def test_interrupted_package_work_is_finished(host: Any, package: str) -> None:
    """A host whose packages were left half done is put in order; the site's own lines stay."""
    state = "dpkg-query --show --showformat='${db:Status-Status} ${Version}' odsp-test"
    host.check_output(f"dpkg --install {package}/1.deb")
    host.check_output("echo 'text of the site' > /etc/odsp-test.conf")
    host.check_output(f"dpkg --unpack {package}/2.deb")
    assert host.check_output(state) == "unpacked 2"
    assert changed(converge("--check")) == 0
    assert host.check_output(state) == "unpacked 2"
    assert changed(converge()) == 1
    assert host.check_output(state) == "installed 2"
    assert host.check_output("cat /etc/odsp-test.conf") == "text of the site"
    assert host.check_output("dpkg --audit") == ""


def test_lists_of_packages_come_back(host: Any) -> None:
    """A host without lists, as fresh images are, can install packages after a run."""
    candidate = "apt-cache policy openssl | grep -E '^ +[0-9]+ https?://'"
    host.check_output("find /var/lib/apt/lists -type f -delete; touch /var/lib/apt/lists")
    assert host.run(candidate).rc != 0
    assert changed(converge()) == 0
    assert host.run(candidate).rc == 0


def test_mirror_that_is_away_stops_nothing(host: Any) -> None:
    """With old lists and no mirror, a host that lacks nothing converges as ever."""
    block = "/etc/apt/apt.conf.d/99-test"
    host.check_output(
        f"echo 'Acquire::http::Proxy \"http://127.0.0.1:9\"; Acquire::Retries 0;' > {block}; "
        "touch --date '3 days ago' /var/lib/apt/lists"
    )
    try:
        assert changed(converge()) == 0
    finally:
        host.check_output(f"rm {block}; touch /var/lib/apt/lists")


def test_missing_packages_are_installed(host: Any) -> None:
    """A host that lost one of the packages gets it back."""
    host.check_output("dpkg --force-depends --remove ca-certificates")
    assert changed(converge("--check")) >= 1
    assert changed(converge()) >= 1
    assert host.package("ca-certificates").is_installed
    assert host.check_output("dpkg --audit") == ""


def test_private_key_of_the_authority_is_not_on_the_host(host: Any) -> None:
    """Nobody who takes over a host can sign for the platform."""
    key = scenario.secrets()["vault_ca_private_key"].splitlines()[1]
    assert scenario.places_of(host, key) == []
    text = base64.b64encode(key.encode()).decode()
    look = f'grep -rlF -- "$(echo {text} | base64 -d)" /etc /opt /root /tmp /var'
    assert host.run(look).stdout == ""


@pytest.mark.once
@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (
            {"base_ca_certificate": ""},
            "base_ca_certificate is not the PEM text of one certificate; generate it with",
        ),
        (
            {"base_ca_certificate": "-----BEGIN PRIVATE KEY-----\nMA==\n-----END PRIVATE KEY-----"},
            "base_ca_certificate is not the PEM text of one certificate; generate it with",
        ),
        (
            {"base_extra_ca_certificates": ["/etc/ssl/proxy.crt"]},
            "base_extra_ca_certificates has an entry that is not the PEM text of one certificate",
        ),
        (
            {"base_uv": "/nowhere/uv"},
            "base_uv is /nowhere/uv, which the controller does not have; install",
        ),
    ],
    ids=["no authority", "a private key", "a path", "no uv"],
)
def test_bad_input_stops_the_role(host: Any, inputs: dict[str, Any], sentence: str) -> None:
    """One sentence names the host, the variable and the remedy; nothing is changed."""
    state = "sha256sum /etc/odsp/tls/ca.crt /etc/ssl/certs/ca-certificates.crt"
    before = host.check_output(state)
    run = converge(**inputs)
    assert run.returncode != 0
    assert f"node-1: {sentence}" in " ".join(run.stdout.split())
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert host.check_output(state) == before
