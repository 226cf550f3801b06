"""What the repository may hold: locks that prove every byte, no secret, no private place."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from house import PUBLIC, ROOT, below, name_of, some, tracked

LOCKS = some(
    file
    for file in tracked()
    if (file.name == "requirements.txt" or file.parent.name == "requirements")
    and file.suffix == ".txt"
)
#: Written in pieces, so that this file passes its own test.
REGISTRIES = [
    ".".join(parts)
    for parts in (
        ("deb", "debian", "org"),
        ("security", "debian", "org"),
        ("pypi", "org"),
        ("files", "pythonhosted", "org"),
        ("proxy", "golang", "org"),
        ("sum", "golang", "org"),
        ("registry", "npmjs", "org"),
        ("docker", "io"),
    )
]


def text_of(file: Path) -> str:
    """Return a file's text, nothing for a binary one."""
    try:
        return file.read_text()
    except UnicodeDecodeError:
        return ""


@pytest.mark.parametrize("lock", LOCKS, ids=name_of)
def test_lock_proves_every_byte(lock: Path) -> None:
    """Each requirement is one version with hashes, and no line says where it comes from."""
    text = lock.read_text()
    assert "://" not in text
    entries = some(re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip()))
    for entry in entries:
        assert re.match(r"[a-z0-9._-]+(\[[a-z,]+\])?==[^ ]+", entry), entry.splitlines()[0]
        assert "--hash=sha256:" in entry, entry.splitlines()[0]


@pytest.mark.parametrize("lock", LOCKS, ids=name_of)
def test_lock_holds_what_was_asked_for(lock: Path) -> None:
    """Every requirement of the .in file is in the lock made from it, at the version it names."""
    wanted = re.findall(
        r"^([A-Za-z0-9._-]+)(?:\[[a-z,]+\])?(==[^\s;#]+)?",
        lock.with_suffix(".in").read_text(),
        re.MULTILINE,
    )
    text = lock.read_text()
    for name, version in some((n, v) for n, v in wanted if not n.startswith("-")):
        normal = re.sub(r"[-_.]+", "-", name).lower()
        assert re.search(rf"^{re.escape(normal + (version or '=='))}", text, re.MULTILINE), name


def test_compute_has_one_lock() -> None:
    """Scheduler, workers and notebooks are the same environment: links to one file."""
    locks = {
        ROOT / f"roles/{r}/files/requirements.txt"
        for r in ("dask_scheduler", "dask_worker", "jupyterlab")
    }
    assert len({os.path.realpath(lock) for lock in locks}) == 1
    assert sum(not lock.is_symlink() for lock in locks) == 1


def test_no_registry_is_named() -> None:
    """Which registries a machine may reach is its own configuration."""
    for file in tracked():
        text = text_of(file)
        assert [host for host in REGISTRIES if re.search(rf"(?<![\w.-]){host}\b", text)] == [], (
            name_of(file)
        )


def test_no_private_path_is_named() -> None:
    """No file knows where its author worked."""
    private = re.compile(r"(?<![\w.])/(work|tmp/b)/|/home/(?!debian|\{|<|\$)[a-z]+/|/Users/")
    for file in tracked():
        assert private.search(text_of(file).replace(private.pattern, "")) is None, name_of(file)


def test_no_private_key_is_kept() -> None:
    """A key in the tree is everybody's."""
    key = re.compile(r"-----BEGIN (?:\w+ )?PRIVATE KEY-----\n[A-Za-z0-9+/]{40}")
    for file in tracked():
        assert key.search(text_of(file)) is None, name_of(file)


def test_no_vault_file_is_kept_in_the_open() -> None:
    """An inventory's secrets are encrypted or not in the repository."""
    for file in tracked():
        if file.name == "vault.yml":
            assert file.read_text().startswith("$ANSIBLE_VAULT"), name_of(file)


def test_shell_programs_stop_at_the_first_error() -> None:
    """A script that goes on after an error proves nothing."""
    scripts = some(
        f for f in tracked() if f.suffix == ".sh" or f.name.endswith(".sh.j2") or f.name == "run"
    )
    for file in scripts:
        assert re.search(r"^set -eu", file.read_text(), re.MULTILINE), name_of(file)


@pytest.mark.parametrize("role", PUBLIC)
def test_scenario_says_only_what_is_special(role: str) -> None:
    """What scenarios share is said once, in .config/molecule/config.yml."""
    text = (ROOT / f"molecule/{role}/molecule.yml").read_text()
    assert len(text.splitlines()) <= 30
    assert "test_sequence" not in text


def test_every_yaml_file_begins_like_one() -> None:
    """`---` first."""
    for file in some(f for f in tracked() if f.suffix in {".yml", ".yaml"}):
        assert file.read_text().startswith(("---\n", "$ANSIBLE_VAULT")), name_of(file)


def test_python_versions_agree() -> None:
    """Every lock is made for the older of the two Debian releases."""
    assert 'requires-python = ">=3.11"' in (ROOT / "model_server/pyproject.toml").read_text()
    assert below(".config/requirements")
