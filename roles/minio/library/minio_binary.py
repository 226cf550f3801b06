#!/usr/bin/python
"""Ansible module: the MinIO server binary on the controller, proven by its digest."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: minio_binary
short_description: Have the MinIO server binary on the controller and know its digest
description:
  - Takes a given file, downloads a given URL, or runs the build program. Runs on the controller.
  - A file whose digest is not the given one is never handed on.
options:
  binary: {description: Path or URL of the binary; empty builds it., type: str, default: ""}
  sha256: {description: SHA-256 the binary must have., type: str, default: ""}
  build_program: {description: Program that builds it; needed without binary., type: path}
  host: {description: Host the binary is for; named in messages., type: str, required: true}
  machine: {description: Architecture of the host as uname names it., type: str, default: x86_64}
author: [ODSP]
"""

EXAMPLES = r"""
- name: Have the binary
  minio_binary: {host: core-1, build_program: /srv/odsp/roles/minio/files/build/build.py}
  delegate_to: localhost
"""

RETURN = r"""
path: {description: The binary on the controller, always called minio., type: str, returned: always}
sha256: {description: Its digest., type: str, returned: always}
"""

# ELF's e_machine and Go's name by uname's name.
MACHINES = {"x86_64": (62, "amd64"), "aarch64": (183, "arm64")}


class BinaryError(Exception):
    """The binary cannot be had; the text is for the operator."""


def digest_of(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_root() -> Path:
    """Return the folder that outlives checkouts; the build program uses the same."""
    base = os.environ.get("ODSP_CACHE_DIR")
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "odsp")
    return Path(base).expanduser().absolute() / "minio"


def check(path: Path, sha256: str, source: str) -> None:
    """Refuse a file that is not the one the inventory names."""
    found = digest_of(path)
    if found != sha256:
        raise BinaryError(
            f"minio_binary_sha256 is {sha256} but {source} has {found}:"
            " correct the digest if you trust the file, or the file"
        )


def given(binary: str, sha256: str) -> Path:
    """Return a cached, proven copy of the binary the operator brings."""
    root = cache_root()
    target = root / f"given-{sha256}" / "minio"
    if target.exists() and digest_of(target) == sha256:
        return target
    root.mkdir(parents=True, exist_ok=True)
    part = root / f"part-{os.getpid()}"
    try:
        if "://" in binary:
            with urllib.request.urlopen(binary, timeout=60) as answer, part.open("wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
        else:
            shutil.copyfile(Path(binary).expanduser(), part)
        check(part, sha256, binary)
        part.chmod(0o755)
        target.parent.mkdir(exist_ok=True)
        part.replace(target)
    except (OSError, ValueError, urllib.error.URLError) as problem:
        raise BinaryError(
            f"minio_binary {binary} cannot be read ({problem}): correct it, or remove the variable"
            " to build MinIO"
        ) from problem
    finally:
        part.unlink(missing_ok=True)
    return target


def built(module: AnsibleModule, goarch: str) -> Path:
    """Return the binary that the build program makes, or made before."""
    program = module.params["build_program"]
    code, out, error = module.run_command([sys.executable, program, "--goarch", goarch])
    if code:
        raise BinaryError(error.strip().splitlines()[-1] if error.strip() else f"{program} failed")
    path = Path(out.strip().splitlines()[-1])
    if module.params["sha256"]:
        check(path, module.params["sha256"], "the binary built here (minio_binary is empty)")
    return path


def check_machine(path: Path, machine: str) -> None:
    """Refuse a program for another kind of processor."""
    with path.open("rb") as file:
        head = file.read(20)
    if head[:4] != b"\x7fELF" or int.from_bytes(head[18:20], "little") != MACHINES[machine][0]:
        raise BinaryError(f"minio_binary is no Linux program for {machine}: give one that is")


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "binary": {"type": "str", "default": ""},
            "sha256": {"type": "str", "default": ""},
            "build_program": {"type": "path"},
            "host": {"type": "str", "required": True},
            "machine": {"type": "str", "default": "x86_64"},
        },
        required_if=[("binary", "", ["build_program"])],
        supports_check_mode=True,
    )
    params = module.params
    try:
        if params["machine"] not in MACHINES:
            raise BinaryError(f"there is no MinIO for {params['machine']} processors here")
        if params["binary"]:
            path = given(params["binary"], params["sha256"].lower())
        else:
            path = built(module, MACHINES[params["machine"]][1])
        check_machine(path, params["machine"])
        module.exit_json(changed=False, path=str(path), sha256=digest_of(path))
    except BinaryError as problem:
        module.fail_json(msg=f"{params['host']}: {problem}.")


if __name__ == "__main__":
    main()
