#!/usr/bin/python
"""Ansible module: a Python environment made from a lock with hashes, switched by one link."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: virtual_environment
short_description: Install a locked Python environment and switch to it atomically
description:
  - Installs with uv into C(<root>/<name>/<digest>) and moves the link C(<root>/<name>/current).
  - The digest covers the lock, the wheels and the interpreter, so an upgrade stands beside what it
    replaces, the way back is one link, and an interrupted installation is begun anew. One that
    failed leaves nothing behind.
  - Keeps the environment the link pointed to before and removes older ones.
options:
  name: {description: Component the environment belongs to., type: str, required: true}
  requirements: {description: Text of the lock; every line with hashes., type: str, required: true}
  wheels:
    description: Wheels on the host to install without dependencies.
    type: list
    elements: path
    default: []
  root: {description: Directory of all environments., type: path, default: /opt/odsp}
  uv: {description: Path of uv on the host., type: path, default: /opt/odsp/uv/current/uv}
  index_url: {description: Package index; empty for uv's default., type: str, default: ""}
  python: {description: Interpreter to build on., type: path, default: /usr/bin/python3}
author: [ODSP]
"""

EXAMPLES = r"""
- name: Install MLflow
  virtual_environment:
    name: mlflow
    requirements: "{{ lookup('file', 'requirements.txt') }}"
"""

RETURN = r"""
path: {description: Directory of the environment., type: str, returned: always}
digest: {description: Digest that names it., type: str, returned: always}
"""

MARKER = "complete"


def digest_of(requirements: str, wheels: list[str]) -> str:
    """Return the name of the environment: 16 hex digits over all that makes it."""
    digest = hashlib.sha256(requirements.encode())
    digest.update(f"{sys.version_info[0]}.{sys.version_info[1]}".encode())
    for wheel in wheels:
        digest.update(Path(wheel).read_bytes())
    return digest.hexdigest()[:16]


def install(module: AnsibleModule, path: Path) -> None:
    """Build the environment in place (its scripts name its path), then mark it complete."""
    uv, params = module.params["uv"], module.params
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    module.run_command(
        [uv, "venv", "--quiet", "--clear", "--python", params["python"], str(path)], check_rc=True
    )
    lock = path / "requirements.txt"
    lock.write_text(params["requirements"])
    pip = [uv, "pip", "install", "--quiet", "--python", f"{path}/bin/python"]
    module.run_command([*pip, "--require-hashes", "--requirements", str(lock)], check_rc=True)
    if params["wheels"]:
        module.run_command([*pip, "--no-deps", *params["wheels"]], check_rc=True)
    (path / MARKER).touch()


def switch(link: Path, path: Path) -> None:
    """Point the link to the environment by one rename, and drop all but the previous one."""
    previous = os.readlink(link) if link.is_symlink() else None
    temporary = link.with_name("current.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.name)
    temporary.replace(link)
    for other in link.parent.iterdir():
        if other.is_dir() and not other.is_symlink() and other.name not in (path.name, previous):
            shutil.rmtree(other)


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "requirements": {"type": "str", "required": True},
            "wheels": {"type": "list", "elements": "path", "default": []},
            "root": {"type": "path", "default": "/opt/odsp"},
            "uv": {"type": "path", "default": "/opt/odsp/uv/current/uv"},
            "index_url": {"type": "str", "default": "", "no_log": True},
            "python": {"type": "path", "default": "/usr/bin/python3"},
        },
        supports_check_mode=True,
    )
    os.umask(0o022)
    os.environ["UV_CACHE_DIR"] = "/var/cache/odsp/uv"
    if module.params["index_url"]:
        os.environ["UV_DEFAULT_INDEX"] = module.params["index_url"]
    if module.check_mode and not all(map(os.path.exists, module.params["wheels"])):
        # A first dry run: the wheel is not there.
        module.exit_json(changed=True, path="", digest="")
    digest = digest_of(module.params["requirements"], module.params["wheels"])
    home = Path(module.params["root"]) / module.params["name"]
    path, link = home / digest, home / "current"
    installed = (path / MARKER).exists() and os.access(path / "bin/python", os.X_OK)
    current = link.is_symlink() and os.readlink(link) == digest
    if not module.check_mode:
        if not installed:
            try:
                install(module, path)
            except BaseException:  # fail_json ends by SystemExit
                shutil.rmtree(path, ignore_errors=True)  # perhaps it is what filled the disk
                raise
        if not current:
            switch(link, path)
    module.exit_json(changed=not (installed and current), path=str(path), digest=digest)


if __name__ == "__main__":
    main()
