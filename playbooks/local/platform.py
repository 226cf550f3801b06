"""The platform on this machine: up, down, status, verify and a shell on a host.

Drives the playbooks a real site runs by hand, phase by phase, with one line of progress; the full
output of each phase is kept in .odsp/log/.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
STATE = Path(os.environ.get("ODSP_STATE_DIR") or ROOT / ".odsp").absolute()
CACHE = Path(
    os.environ.get("ODSP_CACHE_DIR")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "odsp"
).absolute()
LOCAL = ROOT / "inventories/local"
#: What needs root goes through it: podman, and whatever makes hosts.
AS_ROOT = str(ROOT / "playbooks/local/as_root.sh")
#: Seconds after which a phase without news says what it is doing.
HEARTBEAT_S = 10
BIN = Path(sys.executable).parent


class PhaseFailedError(Exception):
    """A phase ended with an error; the message says where to look."""


def say(text: str = "") -> None:
    """Print one line at once."""
    print(text, flush=True)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Announce a phase and the seconds it took."""
    started = time.monotonic()
    say(f"== {name}")
    try:
        yield
    finally:
        say(f"   {name}: {time.monotonic() - started:.0f} s")


def run(log_name: str, command: list[str], *, quiet: bool = False) -> str:
    """Run a program of a phase, show its progress and return its output.

    Shows each play, and the current task every HEARTBEAT_S seconds; what a failed task said, unless
    `quiet`. Raises PhaseFailedError.
    """
    log = STATE / "log" / f"{log_name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    current, spoke, started = "", time.monotonic(), time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    done = threading.Event()

    def heartbeat() -> None:
        nonlocal spoke
        while not done.wait(1):
            if time.monotonic() - spoke >= HEARTBEAT_S and current:
                spoke = time.monotonic()
                say(f"   {spoke - started:4.0f} s  {current}")

    threading.Thread(target=heartbeat, daemon=True).start()
    with log.open("w") as file:
        for line in process.stdout:
            file.write(line)
            lines.append(line)
            if found := re.match(r"(PLAY|TASK) \[(.*?)\] \**$", line):
                current = found[2]
                if found[1] == "PLAY":
                    spoke = time.monotonic()
                    say(f"   {spoke - started:4.0f} s  {current}")
    code = process.wait()
    done.set()
    output = "".join(lines)
    if code:
        if not quiet:
            say(failure(lines))
        raise PhaseFailedError(f"{log_name} failed; everything it said is in {log}")
    return output


def failure(lines: list[str]) -> str:
    """Return what a playbook said from its first error on, without the recap."""
    text = "".join(lines)
    start = min((i for i in (text.find("[ERROR]"), text.find("fatal:")) if i >= 0), default=-1)
    tail = text[start:] if start >= 0 else "".join(lines[-30:])
    return tail.split("PLAY RECAP")[0][-6000:].rstrip()


def environment() -> dict[str, str]:
    """Return the environment of the playbooks: this checkout's configuration, plain output."""
    conf = STATE / "containers.conf"
    return {
        **os.environ,
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_DISPLAY_SKIPPED_HOSTS": "1",  # else a task is only named when it is over
        "ODSP_STATE_DIR": str(STATE),
        "ODSP_CACHE_DIR": str(CACHE),  # the caller's, for root too
        # podman refuses one that does not exist, as before the first `make up`.
        "CONTAINERS_CONF": str(conf if conf.exists() else os.devnull),
        "PATH": f"{BIN}:{os.environ['PATH']}:/usr/sbin:/sbin",
    }


def playbook(name: str, *, root: bool = False) -> int:
    """Run a playbook as a phase of its own; return how many changes it made."""
    command = [str(BIN / "ansible-playbook"), name]
    output = run(Path(name).stem, [AS_ROOT, *command] if root else command)
    return sum(int(n) for n in re.findall(r"\bchanged=(\d+)", output))


def settings() -> dict[str, Any]:
    """Return the plain variables of the local inventory and its secrets."""
    result: dict[str, Any] = {}
    for file in sorted((LOCAL / "group_vars/all").glob("*.yml")):
        result.update(yaml.safe_load(file.read_text()) or {})
    return result


def machine() -> dict[str, Any]:
    """Return what playbooks/local/create.yml wrote down; empty before the first `make up`."""
    file = STATE / "machine.json"
    return json.loads(file.read_text()) if file.exists() else {}


def authenticate() -> None:
    """Have sudo ask for its password before a phase begins to talk; it remembers for a while."""
    if subprocess.run([AS_ROOT, "true"], check=False).returncode:
        raise SystemExit(1)  # it has said why


def start_build() -> subprocess.Popen[str]:
    """Begin the build of MinIO beside everything else; a finished one answers at once."""
    return subprocess.Popen(
        ["nice", sys.executable, str(ROOT / "roles/minio/files/build/build.py")],
        cwd=ROOT, env=environment(), text=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def write_credentials() -> str:
    """Write what users of the door need into the state, mode 0600; return the first user's name."""
    values = settings()
    user: str = values["odsp_users"][0]["name"]
    password = values["vault_user_passwords"][user]
    for name, text in {
        "password": password + "\n",
        "netrc": f"machine 127.0.0.1 login {user} password {password}\n",
        "ca.crt": values["vault_ca_certificate"],
    }.items():
        path = STATE / name
        with open(path, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(text)
    return user


@contextmanager
def locked() -> Iterator[None]:
    """Let one command at a time change this checkout's hosts. Raises PhaseFailedError."""
    STATE.mkdir(mode=0o700, exist_ok=True)
    with (STATE / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PhaseFailedError("another `make` is at work on this checkout's hosts") from None
        yield


def make_hosts() -> int:
    """Create or start the containers of the inventory; return how many changes that made."""
    with phase("hosts: bare Debian systems in containers"):
        groups = yaml.safe_load((LOCAL / "hosts.yml").read_text()).values()
        wanted = {host for group in groups for host in (group or {}).get("hosts") or {}}
        (CACHE / "images").mkdir(parents=True, exist_ok=True)  # else root would own them
        if wanted - machine().get("hosts", {}).keys():
            # The playbook would build it too, but without a word for a minute.
            image = [str(ROOT / "playbooks/local/image.py"), settings()["local_debian_release"]]
            build = subprocess.run(
                [AS_ROOT, sys.executable, *image],
                check=False, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            if build.returncode:
                raise PhaseFailedError("hosts cannot be made without their image")
        return playbook("playbooks/local/create.yml", root=True)


def up(_: argparse.Namespace) -> None:
    """Bring the platform up from any state, and prove it."""
    started = time.monotonic()
    changes = 0
    authenticate()
    with locked():
        build = None if settings().get("minio_binary") else start_build()
        try:
            changes += make_hosts()
            with phase("secrets"):
                changes += playbook("playbooks/ops/generate_secrets.yml")
                user = write_credentials()
            with phase("platform: ansible-playbook site.yml"):
                changes += playbook("site.yml")
            prove()
        finally:
            if build and build.poll() is None:
                build.terminate()
                build.wait()
    try:
        state = STATE.relative_to(Path.cwd())
    except ValueError:
        state = STATE
    port = machine()["door_port"]
    say(f"""
The platform is up: changed={changes}, {time.monotonic() - started:.0f} s.

  URL       https://127.0.0.1:{port}/
  user      {user}
  password  in {state}/password
  CA        {state}/ca.crt (let your browser and clients trust it)

  curl --cacert {state}/ca.crt --netrc-file {state}/netrc https://127.0.0.1:{port}/inference/loaded_models
""")


def prove() -> None:
    """Walk the data's way and print one line per link; on failure what broke and what to try."""
    verdict = STATE / "verdict.json"
    verdict.unlink(missing_ok=True)
    with phase("proof: ansible-playbook playbooks/verify.yml"):
        try:
            run("verify", [str(BIN / "ansible-playbook"), "playbooks/verify.yml"], quiet=True)
        finally:
            if verdict.exists():
                found = json.loads(verdict.read_text())
                for link in found["links"]:
                    result = "ok  " if link["ok"] else "FAIL"
                    say(f"   {result} {link['ms']:7.0f} ms  {link['name']}")
                if failed := found.get("failure"):
                    say(f"\n{failed['message']}\n{failed.get('journal', '')}")


def verify(_: argparse.Namespace) -> None:
    """Walk the data's way and print one line per link."""
    prove()


def hosts(_: argparse.Namespace) -> None:
    """Create or start the containers of the inventory, nothing else."""
    authenticate()
    with locked():
        make_hosts()


def down(_: argparse.Namespace) -> None:
    """Remove the containers, their network and this checkout's state; secrets and caches stay."""
    if not shutil.which("podman", path=environment()["PATH"]):
        return  # then there never was a host
    authenticate()
    with locked(), phase("down"):
        playbook("playbooks/local/destroy.yml", root=True)


def status(_: argparse.Namespace) -> None:
    """Print every host with its state and the state of each unit."""
    known = machine()
    if not known:
        say("No platform here yet: `make up` makes one.")
        return
    authenticate()
    for host, address in known["hosts"].items():
        name = f"{known['platform']}-{host}"
        state = subprocess.run(
            [AS_ROOT, "podman", "container", "inspect", "--format", "{{.State.Status}}", name],
            env=environment(), capture_output=True, text=True, check=False,
        ).stdout.strip() or "missing"  # fmt: skip
        say(f"{host:<14} {address:<15} {state}")
        if state != "running":
            continue
        units = subprocess.run(
            [AS_ROOT, "podman", "exec", name, "systemctl", "list-units", "--all", "--plain",
             "--no-legend", "odsp-*.service"],
            env=environment(), capture_output=True, text=True, check=False,
        ).stdout  # fmt: skip
        for line in units.splitlines():
            unit, _load, active, sub = line.split()[:4]
            say(f"    {unit:<32} {active} ({sub})")
    say(f"door: https://127.0.0.1:{known['door_port']}/")


def shell(arguments: argparse.Namespace) -> None:
    """Open a shell on a host by SSH."""
    known = machine().get("hosts", {})
    if arguments.host not in known:
        raise PhaseFailedError(
            f"no host {arguments.host!r}: HOST is one of "
            + (", ".join(known) or "(none; run `make up`)")
        )
    user = settings()["ansible_user"]
    os.execvp(
        "ssh",
        ["ssh", "-i", str(STATE / "ssh/id_ed25519"),
         "-o", f"UserKnownHostsFile={STATE}/ssh/known_hosts",
         "-o", "IdentitiesOnly=yes", f"{user}@{known[arguments.host]}"],
    )  # fmt: skip


def main() -> int:
    """Entry point: one command a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    actions: tuple[Callable[[argparse.Namespace], None], ...] = (up, down, hosts, status, verify)
    for action in actions:
        command = commands.add_parser(action.__name__, help=(action.__doc__ or "").splitlines()[0])
        command.set_defaults(action=action)
    command = commands.add_parser("shell", help="open a shell on a host by SSH")
    command.add_argument("host", nargs="?", default="")
    command.set_defaults(action=shell)
    arguments = parser.parse_args()
    try:
        arguments.action(arguments)
    except (PhaseFailedError, subprocess.CalledProcessError) as error:
        say(f"\n{error}")
        return 1
    except KeyboardInterrupt:
        say("\ninterrupted; `make up` goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
