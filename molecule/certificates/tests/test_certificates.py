"""What an operator asks of certificates: do they open the right doors, in time, and only those?"""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import pki
import playbook
import pytest
import scenario

PLAY = Path(__file__).parents[1] / "converge.yml"
PORT = 8443
UNIT = "odsp-probe.service"
PATH = f"{scenario.TLS}/probe"
OTHER_KEY = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256"
PRIVATE = ["root:root 644", "root:probe 640", "root:probe 640"]
DAY = 86400

# A component: as an account of its own it serves what lies on the disk now, to holders of a
# certificate of the platform.
SERVER = """
import socket, ssl
listener = socket.create_server(("0.0.0.0", 8443))
while True:
    connection, _ = listener.accept()
    connection.settimeout(60)
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
    socket.create_connection(("127.0.0.1", 8443), timeout=60), server_hostname=sys.argv[1]
) as peer:
    print(peer.recv(5).decode())
"""


@pytest.fixture(scope="module", autouse=True)
def server(host: Any) -> Iterator[None]:
    """Run the component, after a reboot too."""
    program, unit = "/usr/local/lib/odsp-probe.py", f"/etc/systemd/system/{UNIT}"
    text = (
        "[Service]\nUser=probe\nGroup=probe\nRestart=always\n"
        f"ExecStart=/usr/bin/python3 {program}\n[Install]\nWantedBy=multi-user.target\n"
    )
    for path, content in {program: SERVER, unit: text}.items():
        host.check_output(f"printf %s {shlex.quote(content)} > {path}; chmod 0644 {path}")
    host.check_output(f"systemctl daemon-reload; systemctl enable --quiet --now {UNIT}")
    wait_for_server(host)
    yield
    host.check_output(f"systemctl disable --quiet --now {UNIT}; rm {unit} {program}")


def wait_for_server(host: Any) -> None:
    """Wait until the component takes connections."""

    def listens() -> bool:
        """Tell whether the component takes connections."""
        return bool(host.socket(f"tcp://0.0.0.0:{PORT}").is_listening)

    scenario.wait_until(listens)


def ask(
    host: Any, name: str = "node-1", pem: str = f"{PATH}.pem", interpreter: str = "python3"
) -> str:
    """Return what the component answers to this name, or the error."""
    command = host.run(f"{interpreter} -c {shlex.quote(CLIENT)} {name} '{pem}'")
    lines = (command.stdout + command.stderr).strip().splitlines()
    return str(lines[-1]) if lines else "nothing"


def converge(
    *arguments: str, tags: str = "certificates", sources: tuple[Path, ...] = (), **inputs: Any
) -> int:
    """Run the role as the scenario's converge step did, with other inputs; return its changes."""
    run = playbook.play(PLAY, "--tags", tags, *arguments, sources=sources, **inputs)
    return scenario.changed(run)


def files(host: Any) -> str:
    """Return what tells one state of the three files from another."""
    return str(host.check_output(f"sha256sum {PATH}.crt {PATH}.key {PATH}.pem"))


def permissions(host: Any) -> list[str]:
    """Return who may do what with certificate, key, and both in one."""
    shown = host.check_output(f"stat -c '%U:%G %a' {PATH}.crt {PATH}.key {PATH}.pem")
    return str(shown).splitlines()


def authority_inputs(name: str) -> dict[str, Any]:
    """Return inputs that give the platform another authority, which began a month ago."""
    pair = pki.certify(name)
    return {
        "base_ca_certificate": pair.pem,
        "certificates_ca_certificate": pair.pem,
        "certificates_ca_private_key": pair.key_pem,
    }


def days_left(host: Any) -> int:
    """Return for how many whole days the certificate is valid still."""
    end = f"openssl x509 -noout -enddate -in {PATH}.crt | cut -d= -f2"
    return int(host.check_output(f'echo $(( ($(date -d "$({end})" +%s) - $(date +%s)) / {DAY} ))'))


def test_certificate_is_good_for_every_name_and_no_other(host: Any) -> None:
    """Real clients verify it by name and by address; under another name they leave."""
    address = host.ansible.get_variables()["odsp_address"]
    for name in ("node-1", address, "probe.test", "fd00::10:8443"):
        assert ask(host, name) == "hello", name
    for name in ("elsewhere", "127.0.0.1", "test"):
        assert "mismatch" in ask(host, name), name


def test_certificate_opens_doors_that_ask_for_one(host: Any) -> None:
    """The pair in one file makes its holder known; without it, or with a stranger's, none opens."""
    assert ask(host) == "hello"
    assert "CERTIFICATE_REQUIRED" in ask(host, pem="")
    with scenario.foreign_pair(host, "node-1") as stranger:
        assert "UNKNOWN_CA" in ask(host, pem=f"{stranger}.pem")


def test_private_key_is_private(host: Any) -> None:
    """Only root and the component read it, and it is on this host alone."""
    assert permissions(host) == PRIVATE
    probe, nobody = (
        f"LC_ALL=C setpriv --reuid {user} --regid {group} --clear-groups"
        for user, group in (("probe", "probe"), ("nobody", "nogroup"))
    )
    for kind in ("key", "pem"):
        assert host.run(f"{probe} cat {PATH}.{kind}").rc == 0
        assert "Permission denied" in host.run(f"{nobody} cat {PATH}.{kind}").stderr
        assert "Permission denied" in host.run(f"{probe} tee {PATH}.{kind}").stderr
    line = host.check_output(f"sed -n 2p {PATH}.key")
    assert scenario.places_of(host, line) == []
    state = Path(os.environ["ODSP_STATE_DIR"])
    assert not [f for f in state.rglob("*") if f.is_file() and line.encode() in f.read_bytes()]
    assert host.run(f"ls {PATH}.*.new").rc != 0, "a former key is left"


def test_opened_permissions_are_closed_again(host: Any) -> None:
    """A key that somebody opened is private after the next run, and still the same."""
    before = files(host)
    host.check_output(f"chmod 0644 {PATH}.key; chgrp nogroup {PATH}.pem")
    assert converge("--check") == 1
    assert host.file(f"{PATH}.key").mode == 0o644
    assert converge() == 1
    assert permissions(host) == PRIVATE
    assert files(host) == before


def test_certificate_is_renewed_in_time(host: Any) -> None:
    """It stays while enough days are left and is made anew, with a new key, when not."""
    before, left = files(host), days_left(host)
    assert converge(certificates_renew_days=left - 1) == 0
    inputs: dict[str, Any] = {
        "certificates_renew_days": left + 1,
        "certificates_valid_days": left + 30,
    }
    assert converge("--check", **inputs) == 1
    assert files(host) == before
    assert converge(**inputs) == 3
    assert not set(files(host).split()[::2]) & set(before.split()[::2])
    assert days_left(host) in (left + 29, left + 30)
    assert permissions(host) == PRIVATE
    assert ask(host) == "hello"
    assert converge(**inputs) == 0


def test_pair_survives_a_reboot(host: Any) -> None:
    """After a restart of the host the component serves with the same pair, and it stays."""
    before = files(host)
    scenario.reboot(host)
    wait_for_server(host)
    assert ask(host) == "hello"
    assert converge() == 0
    assert (files(host), permissions(host)) == (before, PRIVATE)


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
    assert converge() == 3
    assert ask(host) == "hello"


def test_changed_names_are_followed_both_ways(host: Any) -> None:
    """A name that is left out is no longer vouched for; a new one is good at once."""
    further = "fd00::10:8443"
    assert ask(host, further) == "hello"
    try:
        assert converge(certificates_extra_names=["probe.test"]) == 3
        assert "mismatch" in ask(host, further)
        assert ask(host, "probe.test") == "hello"
    finally:
        back = converge()
    assert back == 3
    assert ask(host, further) == "hello"


def test_changed_authority_is_followed(host: Any) -> None:
    """With another authority one run replaces every certificate; the old one is worth nothing."""
    inputs = authority_inputs("Next authority")
    host.check_output(f"install -m 0600 {PATH}.pem /root/former.pem")
    try:
        assert converge(tags="base_trust,certificates", **inputs) == 4
        assert ask(host) == "hello"
        assert "UNKNOWN_CA" in ask(host, pem="/root/former.pem")
    finally:
        back = converge(tags="base_trust,certificates")
        host.check_output("rm /root/former.pem")
    assert back == 4
    assert ask(host) == "hello"


@pytest.mark.once
def test_run_that_is_cut_off_leaves_the_old_pair(host: Any) -> None:
    """Killed after it asked for a certificate, a run leaves the old one; the next finishes."""
    before = files(host)
    inputs: dict[str, Any] = {"certificates_extra_names": ["cut.test"]}
    # The shell that installs the new pair waits for somebody to read this.
    host.check_output(f"mkfifo {PATH}.crt.new")
    run = playbook.start(PLAY, "--tags", "certificates", **inputs)

    def waits() -> bool:
        """Tell whether the new key is there, and a shell of the run has nothing at work."""
        idle = "for pid in $(pgrep -xf 'sh -s'); do pgrep -P $pid >/dev/null || exit 0; done; false"
        return bool(host.run(f"test -e {PATH}.key.new && sh -c {shlex.quote(idle)}").rc == 0)

    try:
        scenario.wait_until(waits, 180)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        host.run("pkill -KILL -xf 'sh -s'")
        host.check_output(f"rm {PATH}.crt.new")
        playbook.assert_no_secret(run.communicate()[0])
    assert files(host) == before
    assert ask(host) == "hello"
    assert converge(**inputs) == 3
    assert ask(host, "cut.test") == "hello"
    assert not host.file(f"{PATH}.key.new").exists
    assert converge() == 3


@pytest.mark.fault("full disk", "The old pair stays whole and in use; the next run renews it.")
def test_full_disk_leaves_the_old_pair(host: Any, measured: Callable[[str], None]) -> None:
    """A renewal that finds no room fails and changes nothing that is in use."""
    inputs: dict[str, Any] = {"certificates_extra_names": ["full.test"]}
    with faults.full_disk(host, UNIT, scenario.TLS, mib=1) as disk:
        wait_for_server(host)
        before = files(host)
        disk.fill()
        started = time.monotonic()
        run = playbook.play(PLAY, "--tags", "certificates", **inputs)
        failed = time.monotonic() - started
        assert run.returncode != 0
        assert "no key could be written: is there room in /etc/odsp/tls?" in run.stdout
        assert files(host) == before
        assert ask(host) == "hello"
        disk.free()
        started = time.monotonic()
        assert converge(**inputs) == 3
        renewed = time.monotonic() - started
        assert ask(host, "full.test") == "hello"
    measured(
        f"The run failed after {failed:.0f} s, clients went on with the old certificate; "
        f"with room again, a run of {renewed:.0f} s renewed it."
    )


@pytest.mark.fault("expired certificate", "The next run renews it by itself.")
def test_expired_certificate_is_renewed(host: Any, measured: Callable[[str], None]) -> None:
    """Clients refuse what ended yesterday; one run of the role later they are served."""
    with faults.expired_certificate(host, "probe", UNIT):
        wait_for_server(host)
        assert "expired" in ask(host, pem="")
        started = time.monotonic()
        assert converge() == 3
        took = time.monotonic() - started
        assert ask(host) == "hello"
        left = days_left(host)
    measured(f"Clients refused it; after a run of {took:.0f} s it was good for {left} days.")


@pytest.mark.fault(
    "clock jump",
    "On a host whose clock is a day behind or ahead a good certificate stays, and a fresh one is "
    "good at once.",
)
def test_host_whose_clock_is_a_day_off(
    host: Any, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    """The role, the component and its clients see the moved clock; what differs more is told."""
    with (
        faults.clock(host, UNIT) as components,
        faults.clock_of_modules(host, tmp_path) as modules,
    ):
        authority = authority_inputs("Authority for some time")
        inputs: dict[str, Any] = authority | {"sources": tuple(modules.sources)}

        def ask_after(seconds: int) -> str:
            """Return what the component answers when all clocks on the host are that far off."""
            for clock in (components, modules):
                clock.jump(seconds)
            return ask(host, interpreter=modules.python)

        try:
            for seconds in (-DAY, DAY):
                ask_after(seconds)
                host.check_output(f"rm {PATH}.key")
                assert converge(tags="base_trust,certificates", **inputs) >= 3
                assert ask_after(seconds) == "hello"
                assert converge(**inputs) == 0
            behind, ahead = 24, days_left(host) - 1
            while ask_after(-behind * 3600) == "hello":
                behind += 1
            assert "not yet valid" in ask_after(-behind * 3600)
            while ask_after(ahead * DAY) == "hello":
                ahead += 1
            assert "expired" in ask_after(ahead * DAY)
        finally:
            back = converge(tags="base_trust,certificates")
        assert back == 4
    measured(
        f"A fresh certificate was refused as not yet valid by a clock {behind} h behind, as "
        f"expired by one {ahead} days ahead, and by none in between."
    )


@pytest.mark.once
def test_wrong_inputs_are_refused_in_one_sentence(tmp_path: Path) -> None:
    """It names the host, what is wrong and the remedy, and quotes no key."""
    good = {"certificates_name": "probe", "certificates_host_names": ["here"]}
    other = pki.certify("Other")
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, ""),
        (
            {"certificates_host_names": []},
            "certificates_host_names is empty; list the names and addresses of this host",
        ),
        (
            {"certificates_extra_names": ["https://lab.example.org"]},
            'the certificate of probe shall be for "https://lab.example.org"; write one host name',
        ),
        (
            {"certificates_extra_names": ["a.example.org, b.example.org"]},
            'the certificate of probe shall be for "a.example.org, b.example.org"; write one host',
        ),
        (
            {"certificates_valid_days": 30},
            "certificates_valid_days is 30 and certificates_renew_days 30, so that every run",
        ),
        (
            {"certificates_ca_certificate": other.pem},
            "certificates_ca_private_key does not belong to certificates_ca_certificate; keep",
        ),
        (
            {"certificates_ca_private_key": other.key_pem},
            "certificates_ca_private_key does not belong to certificates_ca_certificate; keep",
        ),
    ]
    said = scenario.sentences("certificates", [good | inputs for inputs, _ in cases], tmp_path)
    assert said[0] == ""
    for number, (_, sentence) in enumerate(cases[1:], 1):
        assert said[number].startswith(f"case-{number}: {sentence}"), said[number]
        assert said[number].endswith("."), said[number]
        assert other.key_pem.splitlines()[1] not in said[number]


@pytest.mark.once
def test_wrong_input_changes_nothing(host: Any) -> None:
    """The run ends before the host is touched."""
    before = files(host), permissions(host)
    run = playbook.play(PLAY, "--tags", "certificates", certificates_valid_days=20)
    assert run.returncode != 0
    assert "node-1: certificates_valid_days is 20" in run.stdout
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert (files(host), permissions(host)) == before
