"""The benchmark's own environments and folders, outside the checkout."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(__file__).parent / "peers"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "odsp/bench"
#: Debian's own for all: Triton's Python backend needs exactly the one it was built for.
PYTHON = Path("/usr/bin/python3")
#: The product is measured with what its role installs.
PRODUCT_LOCK = ROOT / "roles/model_server/files/requirements.txt"


class NotAvailableError(Exception):
    """A system cannot be measured; the message says why in one sentence."""


def find_uv() -> str:
    """The program uv: on PATH, or of the controller's environment that `make` installs."""
    found = shutil.which("uv") or shutil.which("uv", path=ROOT / ".venv/bin")
    if not found:
        raise NotAvailableError("uv is not there; `make controller` installs it into .venv.")
    return found


def build(peer: str) -> Path:
    """The programs (`bin`) of a peer's environment, built now if its lock is a new one."""
    lock = PRODUCT_LOCK if peer == "odsp" else PEERS / peer / "requirements.txt"
    digest = hashlib.sha256(lock.read_bytes() + os.fsencode(PYTHON.resolve())).hexdigest()[:12]
    folder = CACHE / "environments" / f"{peer}-{digest}"
    complete = folder / "complete"
    if not complete.exists():
        for older in folder.parent.glob(f"{peer}-*"):
            shutil.rmtree(older)
        uv = find_uv()
        _run([uv, "venv", "--quiet", "--python", PYTHON, folder])
        _run(
            [
                *(uv, "pip", "install", "--quiet", "--python", folder / "bin/python"),
                *("--require-hashes", "--only-binary", ":all:", "--requirement", lock),
                # No files shared with another environment: PSS would count them by halves.
                *("--link-mode", "copy", "--compile-bytecode"),
            ]
        )
        complete.touch()
    return folder / "bin"


def version(programs: Path, package: str) -> str:
    """The version of a package in an environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return _run([programs / "python", "-c", code]).strip()


def commit() -> str:
    """Of this checkout."""
    return _run(["git", "-C", ROOT, "describe", "--always", "--dirty"]).strip()


def _run(command: list[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = " ".join(done.stderr.split())[-400:]
        raise NotAvailableError(f"{Path(command[0]).name} failed: {words}")
    return done.stdout
