"""What an operator asks of every host: whom does it trust, and is it in order?"""

from __future__ import annotations

import base64
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pki
import playbook
import pytest
import scenario

PLAY = scenario.ROOT / "playbooks/base.yml"
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
plain = socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=60)
with context.wrap_socket(
    plain, server_hostname="service.test", suppress_ragged_eofs=False
) as peer:
    print(peer.recv(5).decode(), peer.version(), repr(peer.recv(1)))
"""


@contextmanager
def serving(host: Any, issuer: pki.Pair, newest: str = "TLSv1_3") -> Iterator[None]:
    """Run a TLS server on the host whose certificate is the issuer's."""
    pair = pki.certify("service.test", issuer)
    both = base64.b64encode((pair.key_pem + pair.pem).encode()).decode()
    unit, file = "test-server.service", "/root/test-server.pem"
    host.check_output(f"umask 077; echo {both} | base64 -d > {file}")
    server = f"/usr/bin/python3 -c {shlex.quote(SERVER)} {file} {newest} {PORT}"

    def listens() -> bool:
        """Tell whether the server takes connections."""
        return bool(host.socket(f"tcp://127.0.0.1:{PORT}").is_listening)

    try:
        host.check_output(f"systemd-run --quiet --collect --unit {unit} {server}")
        scenario.wait_until(listens)
        yield
    finally:
        host.check_output(f"systemctl stop {unit}; rm -f {file}")


def ask(host: Any, authority: str = "", settings: str = "") -> Any:
    """Read from the server as an account without rights; return what the client said."""
    environment = f"OPENSSL_CONF={settings} " if settings else ""
    client = f"python3 -c {shlex.quote(CLIENT)} {PORT} '{authority}'"
    return host.run(f"setpriv --reuid nobody --clear-groups env {environment}{client}")


def converge(*arguments: str, **inputs: Any) -> int:
    """Run the role as the scenario's converge step did, with other inputs; return its changes."""
    return scenario.changed(playbook.play(PLAY, *arguments, **inputs))


def test_platform_vouches_for_its_services_and_nobody_else(host: Any) -> None:
    """Any account can verify the platform's certificates; the system trusts nobody new."""
    with serving(host, pki.platform()):
        good, by_system = ask(host, scenario.CA, SETTINGS), ask(host)
    assert good.stdout.split()[:2] == ["hello", "TLSv1.3"], good.stderr
    assert "CERTIFICATE_VERIFY_FAILED" in by_system.stderr
    with serving(host, pki.certify("Somebody else")):
        assert "CERTIFICATE_VERIFY_FAILED" in ask(host, scenario.CA, SETTINGS).stderr


def test_further_authority_is_trusted_until_it_is_left_out(host: Any) -> None:
    """The whole system trusts what the site lists, and no longer once the line is gone."""
    further = pki.certify("Authority of a proxy")
    present = host.ansible.get_variables()["odsp_extra_ca_certificates"]
    inputs = {"base_extra_ca_certificates": [*present, further.pem]}
    store = "/usr/local/share/ca-certificates/odsp"
    with serving(host, further):
        assert "CERTIFICATE_VERIFY_FAILED" in ask(host).stderr
        try:
            assert converge("--check", **inputs) == 1
            assert "CERTIFICATE_VERIFY_FAILED" in ask(host).stderr, "a dry run has changed the host"
            assert converge(**inputs) == 1
            assert ask(host, settings=SETTINGS).stdout.startswith("hello")
            # As a run leaves it that ended before the system's store was made anew.
            host.check_output(
                f"mv {store} /root/away; rm {store}.done; "
                f"update-ca-certificates --fresh >/dev/null; mv /root/away {store}"
            )
            assert "CERTIFICATE_VERIFY_FAILED" in ask(host).stderr
            assert converge(**inputs) == 1
            assert ask(host, settings=SETTINGS).stdout.startswith("hello")
        finally:
            last = converge()
        assert last == 1
        assert "CERTIFICATE_VERIFY_FAILED" in ask(host).stderr


def test_connection_closed_without_farewell_is_an_end(host: Any) -> None:
    """The platform's settings are in force in a real client; without them it sees an error."""
    with serving(host, pki.platform()):
        ours, plain = ask(host, scenario.CA, SETTINGS), ask(host, scenario.CA)
    assert ours.stdout.strip() == "hello TLSv1.3 b''", ours.stderr
    # The older release's Python needs nobody to tell it.
    assert ("UNEXPECTED_EOF" in plain.stderr) == (host.system_info.codename != "bookworm")


def test_site_s_own_tls_policy_is_kept(host: Any) -> None:
    """Stricter settings of the system reach the platform's clients with the next run."""
    system, policy = "/etc/ssl/openssl.cnf", "MinProtocol = TLSv1.3"
    backup = "/root/openssl.cnf"
    sections = f"openssl_conf=a\\n[a]\\nssl_conf=b\\n[b]\\nsystem_default=c\\n[c]\\n{policy}\\n"
    with serving(host, pki.platform(), newest="TLSv1_2"):
        assert ask(host, scenario.CA, SETTINGS).stdout.startswith("hello TLSv1.2")
        host.check_output(f"cp -a {system} {backup} && printf '{sections}' > {system}")
        try:
            assert converge("--check") == 1
            assert ask(host, scenario.CA, SETTINGS).stdout.startswith("hello TLSv1.2")
            assert converge() == 1
            refused = ask(host, scenario.CA, SETTINGS)
        finally:
            host.check_output(f"mv {backup} {system}")
            last = converge()
        assert "PROTOCOL" in refused.stderr.upper(), refused.stdout
        assert last == 1
        assert ask(host, scenario.CA, SETTINGS).stdout.startswith("hello TLSv1.2")


@pytest.mark.once
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


@pytest.mark.once
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
    assert converge() >= 1
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
    assert converge("--check") == 0
    assert host.check_output(state) == "unpacked 2"
    assert converge() == 1
    assert host.check_output(state) == "installed 2"
    assert host.check_output("cat /etc/odsp-test.conf") == "text of the site"
    assert host.check_output("dpkg --audit") == ""


@pytest.mark.once
def test_missing_packages_and_lists_come_back(host: Any) -> None:
    """A host that lost a package, and has no lists as fresh images have none, gets both."""
    candidate = "apt-cache policy openssl | grep -E '^ +[0-9]+ https?://'"
    host.check_output(
        "dpkg --force-depends --remove ca-certificates; "
        "find /var/lib/apt/lists -type f -delete; touch /var/lib/apt/lists"
    )
    assert host.run(candidate).rc != 0
    assert converge("--check") >= 1
    assert not host.package("ca-certificates").is_installed
    assert converge() >= 1
    assert host.package("ca-certificates").is_installed
    assert host.run(candidate).rc == 0
    assert host.check_output("dpkg --audit") == ""


@pytest.mark.once
def test_mirror_that_is_away_stops_nothing(host: Any) -> None:
    """With old lists and no mirror, a host that lacks nothing converges as ever."""
    block = "/etc/apt/apt.conf.d/99-test"
    host.check_output(
        f"echo 'Acquire::http::Proxy \"http://127.0.0.1:9\"; Acquire::Retries 0;' > {block}; "
        "touch --date '3 days ago' /var/lib/apt/lists"
    )
    try:
        assert host.run("apt-get -q update --error-on=any").rc != 0
        assert converge() == 0
    finally:
        host.check_output(f"rm {block}; touch /var/lib/apt/lists")


def test_private_key_of_the_authority_is_not_on_the_host(host: Any) -> None:
    """Nobody who takes over a host can sign for the platform."""
    known = scenario.secrets()
    key, public = (
        known[name].splitlines()[1] for name in ("vault_ca_private_key", "vault_ca_certificate")
    )
    assert scenario.places_of(host, key) == []
    found = []
    for line in (public, key):
        text = base64.b64encode(line.encode()).decode()
        look = f'grep -rlF -- "$(echo {text} | base64 -d)" /etc /opt /root /tmp /usr/local /var'
        found.append(host.run(look).stdout.split())
    assert found == [[scenario.CA], []]


@pytest.mark.once
def test_host_trusts_the_same_after_a_reboot(host: Any) -> None:
    """Nothing of it was for this run of the host only; a further run has nothing to do."""
    scenario.reboot(host)
    with serving(host, pki.platform()):
        good = ask(host, scenario.CA, SETTINGS)
    assert good.stdout.strip() == "hello TLSv1.3 b''", good.stderr
    assert converge() == 0


@pytest.mark.once
def test_wrong_inputs_are_refused_in_one_sentence(tmp_path: Path) -> None:
    """It names host, variable and remedy, and quotes no key."""
    ca, one = pki.certify("Site"), "is not the PEM text of one certificate"
    generate = f"base_ca_certificate {one}; generate it with"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"base_ca_certificate": ca.pem, "base_extra_ca_certificates": [ca.pem]}, ""),
        ({"base_ca_certificate": ""}, generate),
        ({"base_ca_certificate": ca.key_pem}, generate),
        ({"base_ca_certificate": ca.pem + ca.key_pem}, generate),
        (
            {"base_extra_ca_certificates": ["/etc/ssl/proxy.crt"]},
            f"base_extra_ca_certificates has an entry that {one}; list each",
        ),
        (
            {"base_extra_ca_certificates": [ca.pem + ca.pem]},
            f"base_extra_ca_certificates has an entry that {one}; list each",
        ),
        (
            {"base_uv": "/nowhere/uv"},
            "base_uv is /nowhere/uv, which the controller does not have; install",
        ),
    ]
    said = scenario.sentences("base", [inputs for inputs, _ in cases], tmp_path)
    assert said[0] == ""
    for number, (_, sentence) in enumerate(cases[1:], 1):
        assert said[number].startswith(f"case-{number}: {sentence}"), said[number]
        assert said[number].endswith("."), said[number]
        assert ca.key_pem.splitlines()[1] not in said[number]


@pytest.mark.once
def test_wrong_input_changes_nothing(host: Any) -> None:
    """The run ends before the host is touched."""
    state = "sha256sum /etc/odsp/tls/ca.crt /etc/odsp/openssl.cnf; ls -l --time-style=full-iso /etc"
    before = host.check_output(state)
    run = playbook.play(PLAY, base_ca_certificate="", base_extra_ca_certificates=[])
    assert run.returncode != 0
    assert "node-1: base_ca_certificate is not" in run.stdout
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert host.check_output(state) == before
