#!/usr/bin/env python3
"""Build the bare Debian image that stands for a new VM, once for each release and package list.

It holds what a cloud image holds: systemd, an SSH server and Python, nothing of the platform.
It is made by mmdebstrap from Debian's archive, kept in the cache outside the checkout, and imported
into podman under a name that carries the digest of its recipe and the time it was built. Prints
that name.
"""

from __future__ import annotations

import argparse
import calendar
import fcntl
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

PACKAGES = (
    "systemd,systemd-sysv,dbus,python3,python3-apt,sudo,iproute2,"
    "ca-certificates,openssh-server,openssl"
)
RECIPE = (
    "--variant=minbase",
    f"--include={PACKAGES}",
    # A new VM makes host keys and a machine id of its own.
    "--customize-hook=rm -f $1/etc/ssh/ssh_host_* $1/etc/machine-id",
    # No package lists yet: their directory must look as old as it is empty, or hosts would not ask
    # for them. mmdebstrap's own cleaning comes after the hooks and would make it look new.
    "--skip=cleanup/apt/lists",
    "--customize-hook=find $1/var/lib/apt/lists -type f -delete",
    "--customize-hook=touch --date=@0 $1/var/lib/apt/lists",
    # Nobody sits at its console.
    (
        "--customize-hook=systemctl --root=$1 mask systemd-firstboot.service "
        "systemd-networkd-wait-online.service"
    ),
)
#: Age after which an image is built anew, so that new hosts start from current packages (seconds).
MAX_AGE_S = 30 * 24 * 3600
#: Seconds after which a build says again that it is at work.
HEARTBEAT_S = 10


def say(text: str) -> None:
    """Tell how the work goes; standard output is for the image's name."""
    print(text, file=sys.stderr, flush=True)


def mirrors() -> list[str]:
    """Return the mirrors of ODSP_DEBIAN_MIRRORS (space-separated); none = mmdebstrap's own."""
    return os.environ.get("ODSP_DEBIAN_MIRRORS", "").split()


def cache_dir() -> Path:
    """Return the directory of cached images, outside every checkout."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("ODSP_CACHE_DIR") or f"{base}/odsp") / "images"


def archive_of(release: str) -> Path:
    """Return where the archive of a release is kept; its name carries what it is made by."""
    recipe = " ".join([*RECIPE, release, *mirrors()])
    return cache_dir() / f"{release}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.tar"


def image_name(archive: Path) -> str:
    """Return the name under which podman knows an archive: its recipe, and when it was built."""
    release, digest = archive.stem.split("-")
    return f"localhost/odsp-{release}:{digest}-{stamp(archive.stat().st_mtime)}"


def stamp(seconds: float) -> str:
    """Return a time (seconds since 1970) as a part of a name; later ones sort later."""
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(seconds))


def superseded(known: Iterable[str], name: str) -> list[str]:
    """Return the images that `name` replaces, and those of other recipes past their age."""
    parts = re.compile(r"(.+):([0-9a-f]{12})-(\d{14})")
    result = []
    if own := parts.fullmatch(name):
        built = calendar.timegm(time.strptime(own[3], "%Y%m%d%H%M%S"))
        for other in filter(None, map(parts.fullmatch, known)):
            limit = own[3] if other[2] == own[2] else stamp(built - MAX_AGE_S)
            if other[1] == own[1] and other[3] < limit:
                result.append(other[0])
    return result


def bootstrap(release: str, archive: Path) -> None:
    """Write the tar archive of a bare system, atomically.

    Raises RuntimeError with mmdebstrap's last lines when it fails.
    """
    for left in archive.parent.glob(f"{release}-*.part"):  # of builds that were interrupted
        left.unlink()
    part = archive.with_name(f"{release}-{os.getpid()}.part")
    command = ["mmdebstrap", *RECIPE, "--format=tar", "--quiet", release, str(part), *mirrors()]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        elapsed = 0
        while True:
            try:
                process.wait(HEARTBEAT_S)
                break
            except subprocess.TimeoutExpired:
                elapsed += HEARTBEAT_S
                say(f"image {release}: bootstrapping Debian, {elapsed} s")
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"mmdebstrap failed: {log.read()[-2000:].strip()}")
    give_to_owner_of_folder(part)
    part.rename(archive)


def give_to_owner_of_folder(file: Path) -> None:
    """Let a file that root makes belong to the user whose cache it lies in."""
    owner = file.parent.stat()
    os.chown(file, owner.st_uid, owner.st_gid)


def refresh(release: str, archive: Path) -> None:
    """Build the archive if it is missing or too old; an old one serves while none can be built."""
    age = time.time() - archive.stat().st_mtime if archive.exists() else None
    if age is not None and age < MAX_AGE_S:
        return
    try:
        bootstrap(release, archive)
    except (OSError, RuntimeError) as error:
        if age is None:
            raise
        reason = str(error).splitlines()[-1]
        days = int(age // (24 * 3600))
        say(f"image {release}: not renewed, {days} days old and used all the same ({reason})")


def remove_old_archives(archive: Path) -> None:
    """Remove this release's archives of other recipes past their age."""
    release, _ = archive.stem.split("-")
    for other in archive.parent.glob(f"{release}-*.tar"):
        if other != archive and time.time() - other.stat().st_mtime > MAX_AGE_S:
            other.unlink()


def import_into_podman(archive: Path, name: str) -> None:
    """Import the archive unless podman knows it; then remove the images it replaces."""
    if subprocess.run(["podman", "image", "exists", name], check=False).returncode == 0:
        return
    subprocess.run(["podman", "import", str(archive), name], check=True, capture_output=True)
    repository = f"--filter=reference={name.partition(':')[0]}"
    listing = ["podman", "images", "--format={{.Repository}}:{{.Tag}}", repository]
    known = subprocess.run(listing, check=True, capture_output=True).stdout.decode().split()
    for old in superseded(known, name):
        # podman refuses while a container uses it: then it stays.
        subprocess.run(["podman", "rmi", old], check=False, capture_output=True)


def main() -> int:
    """Print the image's name; build and import it first if it is not there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("release", choices=["bookworm", "trixie"])
    release: str = parser.parse_args().release
    archive = archive_of(release)
    archive.parent.mkdir(parents=True, exist_ok=True)
    lock_file = archive.with_name(f"{release}.lock")
    with lock_file.open("w") as lock:
        give_to_owner_of_folder(lock_file)
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            refresh(release, archive)
            name = image_name(archive)
            import_into_podman(archive, name)
            remove_old_archives(archive)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            detail = getattr(error, "stderr", b"") or b""
            say(f"image {release}: {error} {detail.decode()}")
            return 1
    print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
