#!/usr/bin/python
"""Ansible module: password files for nginx, whole files, hashed with bcrypt by passlib."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib

try:
    import bcrypt as _bcrypt  # noqa: F401  passlib imports it late, with a message of its own
    from passlib.hash import bcrypt

    MISSING = ""
except ImportError as absent:
    MISSING = missing_required_lib(str(absent.name))

DOCUMENTATION = r"""
---
module: htpasswd_file
short_description: Password files for nginx that hold exactly the listed users
description:
  - Each file is written as a whole; users that are not listed vanish.
  - A line is kept if its hash has the wanted cost and fits the password. The new file replaces the
    old one in a single step, so that a reader sees either.
  - Passwords over 72 bytes are refused, because bcrypt ignores what comes after.
options:
  passwords: {description: Password of every user by name., type: dict, required: true}
  rounds: {description: Cost of the hashes as the power of two., type: int, default: 12}
  files:
    description: The files and who is in them.
    type: list
    elements: dict
    required: true
    suboptions:
      path: {description: File on the host., type: path, required: true}
      users: {description: Names; each needs a password., type: list, elements: str, required: true}
extends_documentation_fragment: [ansible.builtin.files]
requirements: [passlib, bcrypt]
author: [ODSP]
"""

EXAMPLES = r"""
- name: Let Ada in
  htpasswd_file:
    passwords: {ada: "{{ password }}"}
    rounds: 6
    files: [{path: /etc/odsp/nginx/htpasswd, users: [ada]}]
    owner: root
    group: www-data
    mode: "0640"
"""

RETURN = r"""
written:
  description: Files that were or would be written, with whose line is new and who vanishes.
  type: list
  elements: dict
  returned: always
"""

NAME = re.compile(r"[a-z_][a-z0-9_.-]{0,31}")
LONGEST_PASSWORD = 72


def fault(passwords: dict[str, Any], files: list[dict[str, Any]], rounds: int) -> str:
    """Return what is wrong with the input in one sentence without any password, or nothing."""
    if not 4 <= rounds <= 12:
        return f"rounds is {rounds}; choose 4 to 12"
    for name, password in passwords.items():
        if not NAME.fullmatch(name):
            return f"{name!r} is no user name: use up to 32 of a-z, 0-9, _ . -, first a letter or _"
        if not isinstance(password, str) or not password:
            return f"the password of {name} is empty or no text"
        if "\0" in password:
            return f"the password of {name} holds a NUL character"
        if len(password.encode()) > LONGEST_PASSWORD:
            return f"the password of {name} has over {LONGEST_PASSWORD} bytes, which bcrypt cuts"
    for file in files:
        for name in file["users"]:
            if name not in passwords:
                return f"{name} shall be in {file['path']}, but has no password"
    return ""


def read(path: str) -> str:
    """Return the file's text; nothing if there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (FileNotFoundError, UnicodeDecodeError):
        return ""


def lines(text: str) -> dict[str, str]:
    """Return the hashes of the file by user name."""
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


class Hasher:
    """Hashes and verifies, each password once for all files."""

    def __init__(self, rounds: int) -> None:
        self.scheme = bcrypt.using(rounds=rounds, ident="2y")
        self.prefix = f"$2y${rounds:02d}$"
        self.known: dict[str, str] = {}

    def fits(self, password: str, present: str) -> bool:
        """Tell whether the present hash is as we would make it and belongs to the password."""
        try:
            return present.startswith(self.prefix) and bool(self.scheme.verify(password, present))
        except ValueError:
            return False

    def line(self, name: str, password: str, present: str) -> str:
        """Return the user's hash: the present one if it fits."""
        if self.known.get(name) != present and self.fits(password, present):
            self.known.setdefault(name, present)
            return present
        if name not in self.known:
            self.known[name] = str(self.scheme.hash(password))
        return self.known[name]


def replace(module: AnsibleModule, path: str, text: str) -> None:
    """Put the text in the file's place in one step, never open to more than shall read it."""
    handle, new = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".htpasswd-")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        module.set_fs_attributes_if_different(
            module.load_file_common_arguments(module.params, path=new), False
        )
        os.replace(new, path)
    except BaseException:
        os.unlink(new)
        raise


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "passwords": {"type": "dict", "required": True, "no_log": True},
            "rounds": {"type": "int", "default": 12},
            "files": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "path": {"type": "path", "required": True},
                    "users": {"type": "list", "elements": "str", "required": True},
                },
            },
        },
        add_file_common_args=True,
        supports_check_mode=True,
    )
    passwords, files, rounds = (module.params[key] for key in ("passwords", "files", "rounds"))
    if problem := fault(passwords, files, rounds):
        module.fail_json(msg=problem + ".")
    if MISSING and module.check_mode:
        module.exit_json(changed=True, written=[{"path": file["path"]} for file in files])
    if MISSING:
        module.fail_json(msg=MISSING)
    logging.getLogger("passlib").setLevel(logging.ERROR)  # it warns of every newer bcrypt

    hasher, changed, written = Hasher(rounds), False, []
    for file in files:
        path, old = file["path"], read(file["path"])
        present, exists = lines(old), os.path.lexists(file["path"])
        wanted = {
            name: hasher.line(name, passwords[name], present.get(name, ""))
            for name in sorted(set(file["users"]))
        }
        text = "".join(f"{name}:{line}\n" for name, line in wanted.items())
        if text != old or not exists:
            new = [name for name, line in wanted.items() if present.get(name) != line]
            gone = sorted(set(present) - set(wanted))
            written.append({"path": path, "new": new, "gone": gone})
            changed = True
            if not module.check_mode:
                replace(module, path, text)
        elif module.set_fs_attributes_if_different(
            module.load_file_common_arguments(module.params, path=path), False
        ):
            changed = True
    module.exit_json(changed=changed, written=written)


if __name__ == "__main__":
    main()
