#!/usr/bin/env python3
"""Build the bare Debian image that stands for a new VM, once for each release and package list.

It holds what a cloud image holds: systemd, an SSH server and Python, nothing of the platform.
It is made by mmdebstrap from Debian's archive, kept in the cache outside the checkout, and imported
into podman under a name that carries the digest of what made it. Prints that name.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACKAGES = (
    "systemd,systemd-sysv,dbus,python3,python3-apt,sudo,iproute2,ca-certificates,openssh-server,openssl"
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


def mirrors() -> list[str]:
    """Return the mirrors of ODSP_DEBIAN_MIRRORS (space-separated); none = mmdebstrap's own."""
    return os.environ.get("ODSP_DEBIAN_MIRRORS", "").split()


def cache_dir() -> Path:
    """Return the directory of cached images, outside every checkout."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("ODSP_CACHE_DIR") or f"{base}/odsp") / "images"


def bootstrap(release: str, target: Path) -> None:
    """Write the tar archive of a bare system to `target`, atomically.

    Raises RuntimeError with mmdebstrap's last lines when it fails.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        archive, log = Path(scratch) / "image.tar", Path(scratch) / "log"
        command = ["mmdebstrap", *RECIPE, "--quiet", release, str(archive), *mirrors()]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            started = time.monotonic()
            while process.poll() is None:
                time.sleep(1)
                elapsed = int(time.monotonic() - started)
                if elapsed % 10 == 0:
                    print(f"image {release}: bootstrapping Debian, {elapsed} s", file=sys.stderr)
        if process.returncode:
            raise RuntimeError(f"mmdebstrap failed: {log.read_text()[-2000:]}")
        archive.rename(target)


def main() -> int:
    """Print the image's name; build and import it first if it is not there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("release", choices=["bookworm", "trixie"])
    parser.add_argument("--archive-only", action="store_true", help="leave podman alone")
    arguments = parser.parse_args()
    release: str = arguments.release
    digest = hashlib.sha256(" ".join([*RECIPE, release, *mirrors()]).encode()).hexdigest()[:12]
    name = f"localhost/odsp-{release}:{digest}"
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{release}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        target = cache / f"{release}-{digest}.tar"
        fresh = target.exists() and time.time() - target.stat().st_mtime < MAX_AGE_S
        try:
            if not fresh:
                bootstrap(release, target)
            if not arguments.archive_only:
                known = subprocess.run(["podman", "image", "exists", name], check=False)
                if known.returncode:
                    subprocess.run(
                        ["podman", "import", str(target), name], check=True, capture_output=True
                    )
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            detail = getattr(error, "stderr", b"") or b""
            print(f"image {release}: {error} {detail.decode()}", file=sys.stderr)
            return 1
    print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
