"""Hosts in containers, as far as it can be told without any: images that age, the way to root."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from house import ROOT, some

LOCAL = ROOT / "playbooks/local"
AS_ROOT = LOCAL / "as_root.sh"
NOBODY = 65534
DAY = 24 * 3600


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return image.py with an empty cache and no mmdebstrap."""
    for name, folder in (("ODSP_CACHE_DIR", "cache"), ("PATH", "bin")):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(name, str(tmp_path / folder))
    (tmp_path / "cache/images").mkdir()
    monkeypatch.delenv("ODSP_DEBIAN_MIRRORS", raising=False)
    spec = importlib.util.spec_from_file_location("image", LOCAL / "image.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def archive(image: ModuleType, days: int) -> Path:
    """Put an archive of this age into the cache."""
    path: Path = image.archive_of("trixie")
    path.write_text("old")
    os.utime(path, (time.time() - days * DAY,) * 2)
    return path


def bring_mmdebstrap(tmp_path: Path, script: str) -> None:
    """Install a program of that name; it is given what the real one would be given."""
    program = tmp_path / "bin/mmdebstrap"
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)


WRITES_ITS_TARGET = 'for word; do case $word in *.part) echo -n new > "$word";; esac; done'


def test_young_archive_is_used_as_it_is(image: ModuleType) -> None:
    """Nothing is built, hence no mmdebstrap needed."""
    path = archive(image, days=29)
    image.refresh("trixie", path)
    assert path.read_text() == "old"


def test_old_archive_is_renewed_under_a_new_name(image: ModuleType, tmp_path: Path) -> None:
    """Podman knows the old one by its name: under the same name the new one would never be used."""
    bring_mmdebstrap(tmp_path, WRITES_ITS_TARGET)
    path = archive(image, days=31)
    before = image.image_name(path)
    image.refresh("trixie", path)
    after = image.image_name(path)
    assert path.read_text() == "new"
    assert after != before
    assert image.superseded([before, after], after) == [before]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("script", ["", "echo first; echo no network; exit 1"])
def test_old_archive_serves_while_none_can_be_built(
    image: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], script: str
) -> None:
    """Without a network, or mmdebstrap, hosts can still be made; one line says from what."""
    if script:
        bring_mmdebstrap(tmp_path, script)
    path = archive(image, days=45)
    image.refresh("trixie", path)
    assert path.read_text() == "old"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "45 days old" in said
    assert ("no network" if script else "mmdebstrap") in said


def test_without_any_archive_a_failed_build_is_an_error(image: ModuleType, tmp_path: Path) -> None:
    """There is nothing to fall back to."""
    bring_mmdebstrap(tmp_path, "echo no network; exit 1")
    with pytest.raises(RuntimeError, match="no network"):
        image.refresh("trixie", image.archive_of("trixie"))


def test_interrupted_build_leaves_nothing_for_good(image: ModuleType, tmp_path: Path) -> None:
    """The next one removes what it had written."""
    bring_mmdebstrap(tmp_path, WRITES_ITS_TARGET)
    path: Path = image.archive_of("trixie")
    path.with_name("trixie-1.part").write_text("half")
    path.with_name("bookworm-1.part").write_text("of another release, perhaps at work")
    image.refresh("trixie", path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["bookworm-1.part", path.name]


def test_recipe_and_mirrors_name_the_archive(
    image: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another mirror may hold other packages."""
    plain = image.archive_of("trixie")
    monkeypatch.setenv("ODSP_DEBIAN_MIRRORS", "https://mirror.example/debian")
    assert image.archive_of("trixie") != plain


def test_only_replaced_images_are_removed(image: ModuleType) -> None:
    """Those of another recipe may be another checkout's, until they are too old for it as well."""
    own = "localhost/odsp-trixie:0123456789ab-20260615120000"
    kept = [
        own,
        "localhost/odsp-trixie:0123456789ab-20260616120000",
        "localhost/odsp-trixie:ba9876543210-20260601120000",
        "localhost/odsp-bookworm:0123456789ab-20260101120000",
        "localhost/odsp-trixie:latest",
        "<none>:<none>",
    ]
    replaced = [
        "localhost/odsp-trixie:0123456789ab-20260614120000",
        "localhost/odsp-trixie:ba9876543210-20260501120000",
    ]
    assert image.superseded([*kept, *replaced], own) == replaced


def test_old_archives_of_other_recipes_are_removed(image: ModuleType) -> None:
    """The cache does not grow with every change of the recipe."""
    path = archive(image, days=1)
    for name, days in {"trixie-aa.tar": 31, "trixie-bb.tar": 1, "bookworm-cc.tar": 31}.items():
        other = path.with_name(name)
        other.touch()
        os.utime(other, (time.time() - days * DAY,) * 2)
    image.remove_old_archives(path)
    left = {p.name for p in path.parent.iterdir()}
    assert left == {path.name, "trixie-bb.tar", "bookworm-cc.tar"}


def as_nobody(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run as_root.sh for `env` without being root, with only a few programs in reach."""
    for name in ("bash", "env", "id"):
        (folder / name).symlink_to(str(shutil.which(name)))
    return subprocess.run(
        ["bash", "-c", AS_ROOT.read_text(), str(AS_ROOT), "env"],
        check=False, capture_output=True, text=True, cwd="/", stdin=subprocess.DEVNULL,
        env={"PATH": str(folder), **environment},
        user=NOBODY if os.getuid() == 0 else None,
    )  # fmt: skip


@pytest.fixture
def programs() -> Iterator[Path]:
    """Return a folder for programs that other users may enter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def test_without_root_and_sudo_one_sentence_says_what_to_do(programs: Path) -> None:
    """No command that cannot work is tried."""
    done = as_nobody(programs)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "sudo is not installed" in done.stderr and "as root" in done.stderr


def test_what_root_reads_gets_through_sudo(programs: Path) -> None:
    """Sudo drops the environment: each variable that the local programs read must be named."""
    sudo = programs / "sudo"
    # Like the real one, of the environment it keeps what --preserve-env names.
    sudo.write_text(
        """#!/bin/bash
        for word; do
          case $word in
            -n) exit 0 ;;
            --preserve-env=*) keep=,${word#*=}, ;;
          esac
        done
        for name in $(compgen -e); do [[ $keep == *,$name,* ]] || unset "$name"; done
        exec /usr/bin/env
        """
    )
    sudo.chmod(0o755)
    read = set()
    for file in ("image.py", "extra_ca_certificates.py"):
        text = (LOCAL / file).read_text()
        read |= set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", text))
    # Resolved for the caller before: ODSP_CACHE_DIR.
    read -= {"XDG_CACHE_HOME"}
    read |= {"ODSP_STATE_DIR", "ANSIBLE_CONFIG", "CONTAINERS_CONF", "http_proxy", "HTTPS_PROXY"}
    wanted = {name: f"value of {name}" for name in some(read)}
    done = as_nobody(programs, SECRET="nobody asked for it", **wanted)
    assert done.returncode == 0, done.stderr
    kept = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert wanted.items() <= kept.items()
    assert "SECRET" not in kept
    owner = NOBODY if os.getuid() == 0 else os.getuid()
    assert kept["ODSP_OWNER"].split(":")[0] == str(owner)


@pytest.mark.parametrize("inventory", ["inventories/local", "molecule/_shared/inventory"])
def test_delegated_tasks_show_no_template(inventory: str, tmp_path: Path) -> None:
    """The controller is not one of the hosts whose address is looked up."""
    play = tmp_path / "play.yml"
    play.write_text(
        "- {hosts: one, gather_facts: false, tasks: ["
        "{ansible.builtin.command: 'true', delegate_to: localhost}]}"
    )
    program = Path(sys.executable).with_name("ansible-playbook")
    done = subprocess.run(
        [program, "--inventory", "one,", "--inventory", str(ROOT / inventory), play],
        check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
    )  # fmt: skip
    assert "[one -> localhost]" in done.stdout, done.stdout + done.stderr
