"""Faults that tests bring about on a scenario's hosts, and take back."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from playbook import inventories
from scenario import TLS, main_pid, name_of, secrets, wait_until

FAKETIME = "/usr/lib/*/faketime/libfaketimeMT.so.1"
# Under what Debian 12 has of it, Python's own time.sleep() ends with an error.
SLEEP = """
import select, time
def sleep(seconds):
    select.select([], [], [], seconds)
time.sleep = sleep
"""

# Eats more than the unit may have, as a part of the unit; the kernel is told whom to end first.
EATER = """
import sys
open("/proc/self/oom_score_adj", "w").write("500")
print("begins", flush=True)
hoard = []
for _ in range(int(sys.argv[1]) // 8):
    hoard.append(b"x" * 2**23)
print("has it all")
"""


@dataclass
class SmallDisk:
    """A file system of a few MiB under a unit's folder."""

    host: Any
    folder: str

    def fill(self) -> None:
        """Leave not a single block."""
        filler = f"{self.folder}/.odsp-filler"

        def is_full() -> bool:
            """Write until no block is left; what runs there may have freed one meanwhile."""
            for block in ("1M", "4k"):
                self.host.run(f"dd if=/dev/zero bs={block} conv=notrunc oflag=append of={filler}")
            return int(self.host.check_output(f"stat -f -c %a {self.folder}")) == 0

        wait_until(is_full)

    def free(self) -> None:
        """Make room again."""
        self.host.check_output(f"rm -f {self.folder}/.odsp-filler")


@contextmanager
def full_disk(host: Any, unit: str, folder: str, mib: int = 96) -> Iterator[SmallDisk]:
    """Run the unit with its folder on a small file system that a test can fill.

    What the unit writes meanwhile is gone afterwards; what it had before is there.
    """
    small = "/run/odsp-small-disk"
    host.check_output(f"systemctl stop {unit}")
    try:
        host.check_output(
            f"mkdir -p {small} && mount -t tmpfs -o size={mib}m odsp-small-disk {small} && "
            f"chmod --reference {folder} {small} && chown --reference {folder} {small} && "
            f"cp -a {folder}/. {small} && mount --bind {small} {folder}"
        )
        host.check_output(f"systemctl start {unit}")
        yield SmallDisk(host, folder)
    finally:
        host.run(f"systemctl stop {unit}")
        host.run(f"umount -l {folder}; umount -l {small}; rmdir {small}")
        host.check_output(f"systemctl reset-failed {unit}; systemctl start {unit}")


def memory_group(host: Any, unit: str) -> str:
    """Return the folder of the unit's memory controller, of cgroup v1 or v2."""
    group = host.check_output(f"systemctl show --value --property ControlGroup {unit}").strip()
    for root in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup"):
        if host.file(f"{root}{group}/cgroup.procs").exists:
            return f"{root}{group}"
    raise AssertionError(f"{unit} has no memory controller at {group}")


@contextmanager
def memory_limit(host: Any, unit: str, mib: int) -> Iterator[None]:
    """Let a unit, which must have a limit of its own, have less memory for the moment (MiB)."""
    shown = f"systemctl show --value --property MemoryMax {unit}"
    own = host.check_output(shown).strip()
    assert own.isdigit() and int(own) >= mib * 2**20, f"{unit} may take {own} bytes"
    host.check_output(f"systemctl set-property --runtime {unit} MemoryMax={mib}M MemorySwapMax=0")
    try:
        yield
    finally:
        host.check_output(f"rm -rf /run/systemd/system.control/{unit}.d; systemctl daemon-reload")
        assert host.check_output(shown).strip() == own


def assert_limits_hold(host: Any) -> None:
    """This host heeds the limits of units at all: some containers do not."""
    run = "systemd-run --quiet --wait --pipe --property"
    eat = f"{run} MemoryMax=64M python3 -c 'print(len(bytes([1]) * 2**28))'"
    assert "268435456" not in host.run(f"{eat} || true").stdout, "MemoryMax is not heeded here"
    fork = f"{run} TasksMax=5 sh -c 'for i in 1 2 3 4 5 6 7 8; do sleep 60 & done'"
    assert "fork" in host.run(f"{fork} || true").stderr.lower(), "TasksMax is not heeded here"


@contextmanager
def little_memory(host: Any, unit: str, mib: int = 64) -> Iterator[None]:
    """Leave a unit what its processes hold now and `mib` more (MiB); one of them must be killed.

    For a client that asks too much of the unit; the unit itself must not start anew.
    """
    group = memory_group(host, unit)
    held = int(host.run(f"sed -nE 's/^(total_rss|anon) //p' {group}/memory.stat").stdout)
    killed = f"sed -n 's/^oom_kill //p' {group}/memory.events {group}/memory.oom_control"
    before = int(host.run(killed).stdout)
    with memory_limit(host, unit, held // 2**20 + mib):
        yield
        assert int(host.run(killed).stdout) > before, f"{mib} MiB more were enough"


def eat_memory(host: Any, unit: str, mib: int = 64) -> None:
    """Let a part of the unit take more than the unit may have; it must be killed for that.

    The limit is lowered for the moment to what the unit has now and `mib` more (MiB).
    """
    group = memory_group(host, unit)
    usage = f"cat {group}/memory.current {group}/memory.usage_in_bytes 2>/dev/null"
    limit = int(host.run(usage).stdout.split()[0]) // 2**20 + mib
    eater = f"echo $$ > {group}/cgroup.procs; exec python3 -c {shlex.quote(EATER)} {2 * limit}"
    with memory_limit(host, unit, limit):
        eaten = host.run(f"sh -c {shlex.quote(eater)}")
    # It began, and nothing but the kernel ended it.
    said = (eaten.rc != 0, eaten.stdout.split(), "Error" in eaten.stderr)
    assert said == (True, ["begins"], False), f"{limit} MiB stopped nobody: {said}"


@contextmanager
def stopped(host: Any, unit: str) -> Iterator[None]:
    """Let a unit be away: connections to it are refused."""
    host.check_output(f"systemctl stop {unit}")
    try:
        yield
    finally:
        host.check_output(f"systemctl start {unit}")


@contextmanager
def frozen(host: Any, unit: str) -> Iterator[None]:
    """Let a unit hang: the kernel takes connections for it, and nothing answers."""
    host.check_output(f"systemctl kill --signal STOP {unit}")
    try:
        yield
    finally:
        host.check_output(f"systemctl kill --signal CONT {unit}")


@dataclass
class Clock:
    """The clock as a unit sees it."""

    host: Any
    file: str

    def jump(self, seconds: int) -> None:
        """Let the clock be off by so many seconds from the true time, from now on."""
        # In one step: who reads half of it, as programs do at every look at the clock, ends.
        self.host.check_output(
            f"echo '{seconds:+d}' > {self.file}.new; mv {self.file}.new {self.file}"
        )


@dataclass
class ClockOfModules(Clock):
    """The clock as Ansible's modules on a host see it."""

    python: str
    sources: list[Path]


def faketime(host: Any, file: str) -> str:
    """Return the environment that gives a dynamic program the clock of a file."""
    if host.run(f"ls {FAKETIME}").rc:
        host.check_output(
            "apt-get -qq update && apt-get -qq install --no-install-recommends libfaketime"
        )
    library = host.check_output(f"ls {FAKETIME}").strip()
    return (
        f"LD_PRELOAD={library} FAKETIME_TIMESTAMP_FILE={file} FAKETIME_NO_CACHE=1 "
        "FAKETIME_DONT_FAKE_MONOTONIC=1 DONT_FAKE_MONOTONIC=1 FAKETIME_DISABLE_SHM=1"
    )


def pythons_waits(host: Any, file: str) -> str:
    """Return the environment in which a program of Python with many threads waits under that clock.

    It finds in the folder `<file>.d` how to sleep. Without FAKETIME_WAIT_MS, what Debian has of the
    library ends waits by the monotonic clock at once: threads wait 5 ms for each other.
    """
    text = shlex.quote(SLEEP)
    host.check_output(f"mkdir -p {file}.d && printf %s {text} > {file}.d/sitecustomize.py")
    return f"FAKETIME_WAIT_MS=5 PYTHONPATH={file}.d"


@contextmanager
def clock(host: Any, unit: str, *, python: bool = False) -> Iterator[Clock]:
    """Run the unit with a clock that a test can move while it runs; for dynamic programs only."""
    file, folder = f"/run/odsp-clock-{unit}", f"/run/systemd/system/{unit}.d"
    settings = faketime(host, file)
    if python:
        settings += f" {pythons_waits(host, file)}"
    moved = Clock(host, file)
    moved.jump(0)

    def is_faked() -> bool:
        """Tell whether the unit's main process has the library that moves its clock."""
        return bool(host.run(f"grep -q faketime /proc/{main_pid(host, unit)}/maps").rc == 0)

    try:
        host.check_output(
            f"mkdir -p {folder} && printf '[Service]\\nEnvironment=%s\\n' '{settings}' "
            f"> {folder}/clock.conf && systemctl daemon-reload && systemctl restart {unit}"
        )
        wait_until(is_faked)
        yield moved
    finally:
        host.run(f"rm -rf {folder} {file}*; systemctl daemon-reload; systemctl reset-failed {unit}")
        host.check_output(f"systemctl restart {unit}")


@contextmanager
def clock_of_modules(host: Any, folder: Path) -> Iterator[ClockOfModules]:
    """Give Ansible's modules on the host, and what they run, a clock that a test can move.

    Files keep the kernel's times. `folder` is one on the controller for the inventory that a run
    needs as its last source.
    """
    file, python, inventory = "/run/odsp-clock", "/root/odsp-python", folder / "clock.json"
    settings = faketime(host, file)
    text = f'#!/bin/sh\nexec env {settings} /usr/bin/python3 "$@"\n'
    own = {name_of(host): {"ansible_python_interpreter": python}}
    inventory.write_text(json.dumps({"all": {"hosts": own}}))
    moved = ClockOfModules(host, file, python, [*inventories(), inventory])
    moved.jump(0)
    try:
        host.check_output(f"printf %s {shlex.quote(text)} > {python}; chmod 0755 {python}")
        yield moved
    finally:
        host.check_output(f"rm -f {file} {python}")


def ended_yesterday(pem: str) -> str:
    """Return the platform's certificate as its authority would have signed it a month ago."""
    known, old = secrets(), x509.load_pem_x509_certificate(pem.encode())
    authority = x509.load_pem_x509_certificate(known["vault_ca_certificate"].encode())
    key = serialization.load_pem_private_key(known["vault_ca_private_key"].encode(), None)
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(authority.subject)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=30))
        .not_valid_after(now - timedelta(days=1))
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    signed = builder.sign(key, hashes.SHA256())  # type: ignore[arg-type]
    return signed.public_bytes(serialization.Encoding.PEM).decode()


@contextmanager
def expired_certificate(host: Any, name: str, unit: str) -> Iterator[None]:
    """Run the unit with a certificate of the platform that ended yesterday.

    A certificate that was renewed meanwhile stays; else the former one comes back.
    """
    backup, path = "/root/odsp-certificate", f"{TLS}/{name}"
    old = base64.b64encode(
        ended_yesterday(host.check_output(f"cat {path}.crt") + "\n").encode()
    ).decode()
    host.check_output(
        f"umask 077; mkdir {backup} && cp -a {path}.crt {path}.key {path}.pem {backup}/ && "
        f"echo {old} | base64 -d > {backup}/expired && cat {backup}/expired > {path}.crt && "
        f"cat {path}.crt {path}.key > {path}.pem"
    )
    try:
        host.run(f"systemctl restart {unit}")
        yield
    finally:
        if host.run(f"cmp -s {backup}/expired {path}.crt").rc == 0:
            host.run(f"cp -a {backup}/{name}.* {TLS}/; systemctl restart {unit}")
        host.check_output(f"rm -rf {backup}")
