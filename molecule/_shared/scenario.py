"""What every component's tests ask: is it confined, is its secret private, does it survive?"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import socket
import ssl
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from playbook import ROOT, changed, converge, layer, recap, secrets, sentences

__all__ = [
    "CA",
    "ROOT",
    "TLS",
    "assert_confined",
    "at_work",
    "changed",
    "converge",
    "foreign_pair",
    "handshake",
    "journal",
    "kill",
    "layer",
    "main_pid",
    "name_of",
    "places_of",
    "python",
    "reboot",
    "recap",
    "refuses_strangers",
    "restarted",
    "secrets",
    "sentences",
    "strike",
    "units",
    "wait_until",
    "watched_arguments",
]

TLS = "/etc/odsp/tls"
CA = f"{TLS}/ca.crt"
#: Where a program that works meanwhile has its files.
AT_WORK = "/run/at-work"

# Looks at all processes again and again; tells what those are called that are given a secret.
WATCHER = """
import os, pathlib, re, time
needles = pathlib.Path(v["needles"]).read_bytes().splitlines()
secret, seen = re.compile(b"|".join(map(re.escape, needles))), set()
pathlib.Path(v["running"]).touch()
while os.path.exists(v["running"]):
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/cmdline", "rb") as file:
                given = file.read().replace(bytes(1), b" ")
        except OSError:  # it has ended
            continue
        if secret.search(given):
            told = secret.sub(lambda one: b"<needle %d>" % needles.index(one[0]), given)
            seen.add(told.decode(errors="replace"))
            pathlib.Path(v["running"] + ".seen").write_text("\\n".join(seen))
    time.sleep(0.005)
print(json.dumps(sorted(seen)))
"""

# Shakes hands, then waits for the server's opinion of the client: it sends a ticket, or an alert.
HANDSHAKE = """
import socket, ssl, time
said, tls = [], ssl.create_default_context(cafile=v["ca"])
tls.check_hostname = False
if v["pair"]:
    tls.load_cert_chain(v["pair"] + ".crt", v["pair"] + ".key")
address, port = v["where"].rsplit(":", 1)
with socket.create_connection((address, int(port)), timeout=30) as plain:
    try:
        with tls.wrap_socket(plain) as end:
            said.append("Verification: OK")
            end.settimeout(0.1)
            over = time.monotonic() + 30
            while not end.session.has_ticket and time.monotonic() < over:
                try:
                    end.recv(1)
                    break
                except TimeoutError:
                    pass
    except (ssl.SSLError, ConnectionError) as refusal:
        said.append(str(refusal))
print(json.dumps(said))
"""


def name_of(host: Any) -> str:
    """Return the host's name in the inventory."""
    return str(host.backend.get_pytest_id().rsplit("://")[-1])


def journal(host: Any, unit: str, since: float | None = None) -> str:
    """Return the unit's last lines, or all since a time on the host (seconds since 1970).

    What was written before is among them: lines on their way to the journal are waited for.
    """
    which = "--lines 50" if since is None else f"--since @{since:.6f}"
    return str(host.run(f"journalctl --sync; journalctl --no-pager --unit {unit} {which}").stdout)


def assert_confined(
    host: Any, unit: str, user: str, *, exposure: float, capabilities: str = ""
) -> None:
    """The unit runs, is enabled, and cannot touch the rest of the host.

    `exposure` is the ceiling of systemd's own score: 0 is locked up, 10 is free.
    """
    service = host.service(unit)
    assert service.is_enabled, unit
    assert service.is_running, journal(host, unit)
    properties = service.systemd_properties
    assert properties["User"] == user
    assert properties["ProtectSystem"] == "strict"
    assert properties["NoNewPrivileges"] == "yes"
    # systemd shows an empty list as no line at all.
    assert properties.get("CapabilityBoundingSet", "") == capabilities
    verdict = host.check_output(f"systemd-analyze security --no-pager {unit} | tail -n 1")
    score = re.search(r"for \S+: ([0-9.]+) ", verdict)
    assert score, verdict
    assert float(score[1]) <= exposure, verdict


def wait_until(question: Callable[[], Any], seconds: float = 120) -> None:
    """Ask until the answer is yes; fail when it never is."""
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {question.__doc__}"
        time.sleep(0.5)


def main_pid(host: Any, unit: str) -> int:
    """Return the unit's main process, 0 while it has none."""
    return int(host.check_output(f"systemctl show --value --property MainPID {unit}"))


def kill(host: Any, unit: str) -> None:
    """Kill the unit's processes without warning and wait until systemd has started new ones."""
    before = main_pid(host, unit)
    host.check_output(f"systemctl kill --signal KILL {unit}")

    def restarted() -> bool:
        """Tell whether the unit runs again, as a new process."""
        return host.service(unit).is_running and main_pid(host, unit) not in (0, before)

    wait_until(restarted)


def strike(host: Any, unit: str, blow: str) -> None:
    """Let one of three things happen to a unit: `restart`, `kill` (without warning), `reboot`."""
    if blow == "kill":
        kill(host, unit)
    elif blow == "reboot":
        reboot(host)
    else:
        assert blow == "restart", blow
        host.check_output(f"systemctl restart {unit}")


def program(code: str, values: Mapping[str, Any]) -> str:
    """Return a shell's command that says a program in Python: `code`, `values` as the dict `v`."""
    text = f"import json\nv = json.loads({json.dumps(values)!r})\n{code}"
    return f"echo {base64.b64encode(text.encode()).decode()} | base64 -d"


def python(
    host: Any,
    code: str,
    interpreter: str = "python3",
    environment: Mapping[str, str] | None = None,
    **values: Any,
) -> Any:
    """Run Python on the host with `values` as the dict `v`; return its last line, read as JSON."""
    settings = " ".join(f"{name}={shlex.quote(text)}" for name, text in (environment or {}).items())
    answer = host.run(f"{program(code, values)} | env {settings} timeout 300 {interpreter} -")
    assert answer.rc == 0, answer.stdout + answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


@contextmanager
def at_work(
    host: Any, code: str, interpreter: str = "python3", seconds: int = 120, **values: Any
) -> Iterator[Callable[[], Any]]:
    """Let Python work on the host meanwhile, for so many seconds at most.

    The program has `values` as the dict `v`; when it is at work it makes the file v["running"].
    Yields a function that removes that file, waits for the program's end and returns its last
    line, read as JSON.
    """
    unit, folder = "at-work.service", AT_WORK
    running, shown = f"{folder}/running", "systemctl show --value --property"
    written, outputs = program(code, {**values, "running": running}), ("said", "complained")
    host.check_output(
        f"rm -rf {folder}; mkdir {folder} && {written} > {folder}/program && "
        f"systemd-run --quiet --unit {unit} --remain-after-exit "
        f"--property StandardOutput=file:{folder}/said "
        f"--property StandardError=file:{folder}/complained "
        f"timeout --kill-after 5 {seconds} {interpreter} {folder}/program"
    )

    def over() -> bool:
        """Tell whether the program at work has ended."""
        state = host.check_output(f"{shown} SubState {unit}").strip()
        return state in ("exited", "failed")

    def begun() -> bool:
        """Tell whether the program is at work, or has ended."""
        return host.file(running).exists or over()

    def last_word() -> Any:
        """Return what the program said at its end; it ended well."""
        host.check_output(f"rm -f {running}")
        wait_until(over, seconds + 10)
        said, complained = (host.file(f"{folder}/{name}").content_string for name in outputs)
        result = host.check_output(f"{shown} Result {unit}").strip()
        assert result == "success", f"{result}: {said}{complained}"
        return json.loads(said.splitlines()[-1])

    try:
        wait_until(begun)
        assert host.file(running).exists, last_word()
        yield last_word
    finally:
        host.run(f"systemctl stop {unit}; systemctl reset-failed {unit}; rm -rf {folder}")


@contextmanager
def foreign_pair(host: Any, name: str) -> Iterator[str]:
    """Make a certificate of no authority on the host; yield its path less .crt, .key and .pem."""
    made = "/root/odsp-foreign"
    host.check_output(
        f"umask 077; openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes "
        f"-subj /CN={name} -days 1 -keyout {made}.key -out {made}.crt 2>/dev/null; "
        f"cat {made}.crt {made}.key > {made}.pem"
    )
    try:
        yield made
    finally:
        host.check_output(f"rm -f {made}.*")


def handshake(host: Any, where: str, pair: str = "") -> str:
    """Return what a client hears of TLS at an address and port: that all is well, or a refusal.

    `pair` is the path of a certificate and its key, less .crt and .key.
    """
    return "".join(f"{line}\n" for line in python(host, HANDSHAKE, where=where, pair=pair, ca=CA))


def refuses_strangers(address: str, port: int) -> str:
    """Ask from another host, by TLS but without a certificate; return how the server refuses."""
    context = ssl.create_default_context(cadata=secrets()["vault_ca_certificate"])
    with (
        socket.create_connection((address, port), timeout=30) as raw,
        context.wrap_socket(raw, server_hostname=address) as connection,
    ):
        try:
            # One hears of the refusal unasked; who writes may find only a closed connection.
            answer = b""
            with suppress(TimeoutError):
                answer = connection.recv(100)
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            answer += connection.recv(100)
        except (ssl.SSLError, ConnectionError) as refusal:
            return str(refusal)
    assert not answer, answer
    return "closed"


def places_of(host: Any, *given: str) -> list[str]:
    """Return where anyone on the host could read a secret: arguments, the journal, open files."""
    assert all(len(secret) >= 8 for secret in given), "too short to be looked for"
    needles, text = "/root/odsp-needles", base64.b64encode("\n".join(given).encode()).decode()
    host.check_output(f"umask 077; echo {text} | base64 -d > {needles}")
    try:
        looks = {
            "arguments": f"cat /proc/[0-9]*/cmdline 2>/dev/null | grep -acF -f {needles}",
            # Without sudo's lines: they quote the tests' own commands.
            "journal": rf"journalctl --no-pager | grep -v ' sudo\[' | grep -cF -f {needles}",
            "files": "find /etc /home /opt/odsp /run /srv /tmp /usr/local /var -xdev -type f "
            f"-perm -o=r -exec grep -lF -f {needles} {{}} + 2>/dev/null",
        }
        answers = {place: host.run(look).stdout.strip() for place, look in looks.items()}
    finally:
        host.check_output(f"rm -f {needles}")
    return [f"{place}: {found}" for place, found in answers.items() if found not in ("", "0")]


@contextmanager
def watched_arguments(host: Any, *given: str) -> Iterator[None]:
    """Watch what processes of the host are given as arguments: no secret may be among it.

    All are looked at every few milliseconds. Two marks, shown for a tenth of a second, less than a
    task of Ansible takes, and again until they are seen, prove that this sees something, from the
    beginning to the end.
    """
    assert all(len(secret) >= 8 for secret in given), "too short to be looked for"
    marks, needles = [uuid.uuid4().hex, uuid.uuid4().hex], "/root/odsp-watched"
    text = base64.b64encode("\n".join([*marks, *given]).encode()).decode()

    def show(number: int) -> None:
        def is_noticed() -> bool:
            """Show a mark; tell whether the watcher has seen it."""
            host.check_output(f"sleep 0.1; : {marks[number]}")
            return bool(host.run(f"grep -qF '<needle {number}>' {AT_WORK}/running.seen").rc == 0)

        wait_until(is_noticed, 20)

    host.check_output(f"umask 077; echo {text} | base64 -d > {needles}")
    try:
        with at_work(host, WATCHER, seconds=300, needles=needles) as end:
            show(0)
            yield
            show(1)
            seen = end()
    finally:
        host.check_output(f"rm -f {needles}")
    shown = {mark for mark in ("<needle 0>", "<needle 1>") for line in seen if mark in line}
    assert len(shown) == len(marks), f"the watcher saw only {shown}"
    assert [line for line in seen if not any(mark in line for mark in shown)] == []


def units(host: Any) -> dict[str, str]:
    """Return the platform's units on the host, each with what names its present run."""
    shown = host.check_output("systemctl show --property=Id,InvocationID 'odsp-*.service'")
    blocks = (dict(line.split("=", 1) for line in b.splitlines()) for b in shown.split("\n\n"))
    return {block["Id"]: block.get("InvocationID", "") for block in blocks if "Id" in block}


def restarted(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """Return the units that are running anew; a reload is no restart."""
    return {unit for unit in before | after if before.get(unit) != after.get(unit)}


def podman(*arguments: str) -> None:
    """Have podman do something to the scenario's containers."""
    sudo = [] if os.getuid() == 0 else ["sudo", "--preserve-env=CONTAINERS_CONF"]
    configuration = str(Path(os.environ["ODSP_STATE_DIR"]) / "containers.conf")
    environment = {**os.environ, "CONTAINERS_CONF": configuration}
    subprocess.run([*sudo, "podman", *arguments], check=True, capture_output=True, env=environment)


def reboot(host: Any, seconds: float = 300) -> None:
    """Restart the host and wait until it has started everything that it starts by itself."""
    machine = json.loads((Path(os.environ["ODSP_STATE_DIR"]) / "machine.json").read_text())
    name = name_of(host)
    podman("restart", "--time", "30", f"{machine['platform']}-{name}")

    def reachable() -> bool:
        """Tell whether the host takes SSH connections."""
        try:
            with socket.create_connection((machine["hosts"][name], 22), timeout=2) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    wait_until(reachable, seconds)

    def started() -> bool:
        """Tell whether systemd has no start job left."""
        try:
            state = host.run("systemctl is-system-running").stdout.strip()
        except RuntimeError:  # sshd was there before the accounts
            return False
        return state in ("running", "degraded")

    wait_until(started, seconds)
