"""playbooks/validate.yml refuses each broken inventory in one sentence and changes nothing."""

from __future__ import annotations

import copy
import hashlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
SECRETS = (
    "vault_ca_certificate",
    "vault_ca_private_key",
    "vault_minio_root_password",
    "vault_mlflow_database_password",
    "vault_mlflow_s3_secret_key",
    "vault_dask_worker_s3_secret_key",
    "vault_jupyterlab_s3_secret_key",
    "vault_model_server_database_password",
)
READING_HOSTS = "Read the facts of the hosts"

Site = dict[str, Any]
Hosts = dict[str, dict[str, Any]]


def hosts(**variables: dict[str, Any]) -> dict[str, Hosts]:
    """Return a group of hosts; core_1 stands for core-1."""
    return {"hosts": {name.replace("_", "-"): given for name, given in variables.items()}}


@pytest.fixture
def site() -> Site:
    """Return an inventory without a fault: groups, and variables of all hosts."""
    return {
        "groups": {
            "postgres": hosts(core_1={}),
            "minio": hosts(core_1={}),
            "mlflow": hosts(core_1={}),
            "dask_scheduler": hosts(compute_1={}),
            "dask_worker": hosts(compute_1={}, compute_2={}),
            "jupyterlab": hosts(edge_1={}),
            "model_server": hosts(edge_1={}),
            "nginx": hosts(edge_1={}),
        },
        "all": {
            "odsp_users": [{"name": "ada"}],
            "vault_user_passwords": {"ada": "not-a-secret"},
            "odsp_vault_encryption_required": False,
            "ansible_connection": "local",
            "ansible_become": False,
            "ansible_python_interpreter": "/usr/bin/python3",
            **dict.fromkeys(SECRETS, "not-a-secret"),
        },
    }


class Refusal:
    """What ansible-playbook said about an inventory."""

    def __init__(self, path: Path, site: Site, *arguments: str, common: bool = True) -> None:
        """Write the inventory and validate it."""
        folder = path / "site"
        (folder / "group_vars").mkdir(parents=True, exist_ok=True)
        (folder / "hosts.yml").write_text(yaml.safe_dump(site["groups"]))
        (folder / "group_vars/all.yml").write_text(yaml.safe_dump(site["all"]))
        own = ROOT / ".venv/bin/ansible-playbook"
        program = str(own) if own.exists() else shutil.which("ansible-playbook")
        assert program, "ansible-playbook is not installed"
        chain = ["-i", "inventories/common"] if common else []
        done = subprocess.run(
            [program, *chain, "-i", str(folder), "playbooks/validate.yml", *arguments],
            cwd=ROOT,
            env={**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_LIBRARY": str(path / "library")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        self.returncode = done.returncode
        self.output = done.stdout + done.stderr

    def says(self, *words: str) -> None:
        """Assert that one sentence of the refusal holds all words, and that nothing changed."""
        assert self.returncode != 0, self.output
        lines = [line for line in self.output.splitlines() if all(word in line for word in words)]
        assert lines, f"no line with {words} in:\n{self.output}"
        assert lines[0].strip().endswith("."), lines[0]
        assert not re.search(r"changed=[1-9]", self.output), self.output

    def says_before_touching_a_host(self, *words: str) -> None:
        """Assert the same, and that no host had been asked anything."""
        self.says(*words)
        assert READING_HOSTS not in self.output, self.output


def test_accepts_an_inventory_without_a_fault(tmp_path: Path, site: Site) -> None:
    """The inventory that every other test breaks in one place is good."""
    answer = Refusal(tmp_path, site)
    assert answer.returncode == 0, answer.output
    assert READING_HOSTS in answer.output


def remove(group: str) -> Callable[[Site], None]:
    """Return an edit that empties a group."""
    return lambda site: site["groups"].pop(group) and None


def add(group: str, host: str, **variables: object) -> Callable[[Site], None]:
    """Return an edit that puts a host into a group or gives it variables there."""

    def edit(site: Site) -> None:
        site["groups"][group]["hosts"].setdefault(host, {}).update(variables)

    return edit


def give(**variables: object) -> Callable[[Site], None]:
    """Return an edit that sets variables of all hosts."""
    return lambda site: site["all"].update(variables)


STATIC = {
    "consumer without postgres": (
        remove("postgres"),
        ["core-1", "mlflow needs postgres", "put a host into postgres"],
    ),
    "consumer without minio": (remove("minio"), ["core-1", "mlflow needs minio", "put a host"]),
    "workers without scheduler": (
        remove("dask_scheduler"),
        ["compute-1 and compute-2", "dask_scheduler is empty", "put a host into dask_scheduler"],
    ),
    "scheduler without workers": (
        remove("dask_worker"),
        ["compute-1", "dask_worker is empty", "put a host into dask_worker"],
    ),
    "notebooks without door": (
        remove("nginx"),
        ["edge-1", "jupyterlab needs nginx", "put a host into nginx"],
    ),
    "inference without registry": (
        remove("mlflow"),
        ["edge-1", "model_server needs mlflow", "put a host into mlflow"],
    ),
    "two hosts in a singleton group": (
        add("postgres", "core-2"),
        ["core-1 and core-2", "group postgres", "leave one"],
    ),
    "host named as a group": (
        lambda site: site["groups"].update(minio={"hosts": {"minio": {}}}),
        ["minio is the name of a host and of a group", "rename the host"],
    ),
    "host without an address": (
        add("nginx", "edge-1", ansible_host=""),
        ["edge-1", "ansible_host is empty", "make hosts"],
    ),
    "secret missing": (
        lambda site: site["all"].pop("vault_mlflow_database_password") and None,
        ["core-1", "vault_mlflow_database_password is missing", "generate_secrets.yml"],
    ),
    "secret empty": (
        give(vault_minio_root_password=""),
        ["core-1", "vault_minio_root_password is empty", "generate_secrets.yml"],
    ),
    "user without password": (
        give(odsp_users=[{"name": "ada"}, {"name": "grace"}]),
        ["edge-1", "vault_user_passwords", "grace", "generate_secrets.yml"],
    ),
    "nobody may enter": (give(odsp_users=[]), ["edge-1", "odsp_users", "set it to"]),
    "user name with a colon": (
        give(odsp_users=[{"name": "ada:x"}]),
        ["edge-1", "odsp_users", "ada:x", "give it a name"],
    ),
    "user named twice": (
        give(odsp_users=[{"name": "ada"}, {"name": "ada"}]),
        ["edge-1", "odsp_users names ada 2 times", "leave one"],
    ),
    "worker with no process": (
        add("dask_worker", "compute-2", dask_worker_processes=0),
        ["compute-2", "dask_worker_processes is 0", "at least 1"],
    ),
    "worker with a word for a number": (
        add("dask_worker", "compute-2", dask_worker_threads="many"),
        ["compute-2", "dask_worker_threads is 'many'", "at least 1"],
    ),
    "memory limit without a unit": (
        add("dask_worker", "compute-1", dask_worker_memory_limit=2),
        ["compute-1", "dask_worker_memory_limit is 2", "2GiB"],
    ),
    "binary without its digest": (
        add("minio", "core-1", minio_binary="/bin/sh"),
        ["core-1", "minio_binary_sha256", "set it to"],
    ),
    "URL with half a digest": (
        add("minio", "core-1", minio_binary="https://store.example/m", minio_binary_sha256="ab12"),
        ["core-1", "minio_binary_sha256", "ab12", "set it to"],
    ),
    "binary with another digest": (
        add("minio", "core-1", minio_binary="/bin/sh", minio_binary_sha256="0" * 64),
        ["core-1", "minio_binary_sha256", hashlib.sha256(Path("/bin/sh").read_bytes()).hexdigest()],
    ),
    "binary that is not there": (
        add("minio", "core-1", minio_binary="/nonexistent", minio_binary_sha256="0" * 64),
        ["core-1", "minio_binary is /nonexistent", "correct the path"],
    ),
}


@pytest.mark.parametrize(("edit", "words"), STATIC.values(), ids=STATIC.keys())
def test_refuses_before_touching_a_host(
    tmp_path: Path, site: Site, edit: Callable[[Site], None], words: list[str]
) -> None:
    """Each fault that the inventory's text shows is named with host, variable and remedy."""
    edit(site)
    Refusal(tmp_path, site).says_before_touching_a_host(*words)


def test_refuses_an_inventory_without_the_contract(tmp_path: Path, site: Site) -> None:
    """Whoever forgets inventories/common is told the right command."""
    answer = Refusal(tmp_path, site, common=False)
    answer.says_before_touching_a_host(
        "compute-1", "odsp_inventory_contract", "-i inventories/common -i", "site.yml"
    )


def test_refuses_an_inventory_without_hosts(tmp_path: Path, site: Site) -> None:
    """Nothing to do is a mistake, not a success."""
    site["groups"] = {"postgres": {"hosts": {}}}
    Refusal(tmp_path, site).says_before_touching_a_host("No host is in the inventory", "put one")


def test_refuses_hosts_without_a_component(tmp_path: Path, site: Site) -> None:
    """Hosts that are in no group of the contract would stay empty."""
    site["groups"] = {"database": hosts(core_1={})}
    Refusal(tmp_path, site).says_before_touching_a_host(
        "core-1", "none of the groups", "put a host"
    )


def test_refuses_secrets_in_plain_text(tmp_path: Path, site: Site) -> None:
    """A real site's vault file is encrypted."""
    vault = tmp_path / "vault.yml"
    vault.write_text("---\nvault_minio_root_password: not-a-secret\n")
    site["all"] |= {"odsp_vault_encryption_required": True, "odsp_vault_file": str(vault)}
    answer = Refusal(tmp_path, site)
    answer.says_before_touching_a_host("vault_minio_root_password", "ansible-vault encrypt")
    assert "not-a-secret" not in answer.output


def test_limit_still_checks_the_whole_inventory(tmp_path: Path, site: Site) -> None:
    """A fault elsewhere is found although one host only is asked for."""
    site["groups"]["minio"]["hosts"]["core-2"] = {}
    answer = Refusal(tmp_path, site, "--limit", "compute-1")
    answer.says_before_touching_a_host("core-1 and core-2", "group minio", "leave one")


def test_limit_reads_the_limited_hosts_only(tmp_path: Path, site: Site) -> None:
    """A host that is switched off does not stop work on another one."""
    site["groups"]["postgres"]["hosts"]["core-1"] = copy.copy(UNREACHABLE)
    answer = Refusal(tmp_path, site, "--limit", "compute-1")
    assert answer.returncode == 0, answer.output
    assert "compute-2" not in answer.output


UNREACHABLE = {
    "ansible_connection": "ssh",
    "ansible_host": "127.0.0.1",
    "ansible_port": 1,
    "ansible_timeout": 5,
}


def test_refuses_an_unreachable_host(tmp_path: Path, site: Site) -> None:
    """A host that does not answer is named with its address."""
    site["groups"]["minio"]["hosts"]["core-1"] = copy.copy(UNREACHABLE)
    Refusal(tmp_path, site).says("core-1", "ansible_host 127.0.0.1", "cannot be reached", "start")


def test_refuses_a_port_that_another_program_holds(tmp_path: Path, site: Site) -> None:
    """A program that listens where a component shall listen is named."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        site["all"]["odsp_postgres_port"] = port
        site["groups"]["postgres"]["hosts"]["core-1"] = {"ansible_host": "127.0.0.1"}
        answer = Refusal(tmp_path, site)
    answer.says("core-1", f"port {port}", "odsp_postgres_port", f"pid {os.getpid()}", "stop it")


def test_ignores_the_port_on_another_address(tmp_path: Path, site: Site) -> None:
    """Two programs may listen on one port of two addresses."""
    with socket.create_server(("127.0.0.2", 0)) as other:
        site["all"]["odsp_postgres_port"] = other.getsockname()[1]
        site["groups"]["postgres"]["hosts"]["core-1"] = {"ansible_host": "127.0.0.1"}
        answer = Refusal(tmp_path, site)
    assert answer.returncode == 0, answer.output


def test_refuses_workers_larger_than_their_host(tmp_path: Path, site: Site) -> None:
    """Processes times limit fit into the host."""
    size = {"dask_worker_processes": 2, "dask_worker_memory_limit": "64TiB"}
    site["groups"]["dask_worker"]["hosts"]["compute-2"] = size
    Refusal(tmp_path, site).says(
        "compute-2", "dask_worker_memory_limit 64TiB x 2 dask_worker_processes", "lower one"
    )


FACTS_MODULE = """#!/usr/bin/python
from ansible.module_utils.basic import AnsibleModule

AnsibleModule({}).exit_json(ansible_facts={"ansible_" + k: v for k, v in %r.items()})
"""
FACTS = {
    "distribution": "Debian",
    "distribution_major_version": "13",
    "architecture": os.uname().machine,
    "memtotal_mb": 4096,
    "processor_vcpus": 2,
}


def report(path: Path, facts: dict[str, object]) -> dict[str, Any]:
    """Return host variables under which a host reports the facts given here."""
    (path / "library").mkdir(exist_ok=True)
    name = f"facts_{len(list((path / 'library').iterdir()))}"
    (path / "library" / f"{name}.py").write_text(FACTS_MODULE % facts)
    return {"ansible_facts_modules": [name]}


def test_refuses_two_debian_releases_under_dask(tmp_path: Path, site: Site) -> None:
    """Scheduler, workers and notebooks run one Python."""
    for group in site["groups"].values():
        for name, given in group["hosts"].items():
            release = "12" if name == "compute-2" else "13"
            given.update(report(tmp_path, FACTS | {"distribution_major_version": release}))
    Refusal(tmp_path, site).says(
        "two Pythons", "Debian 12 on compute-2", "Debian 13 on compute-1", "ansible_host"
    )


def test_refuses_other_systems(tmp_path: Path, site: Site) -> None:
    """Neither another distribution nor another processor can be installed from here."""
    given = site["groups"]["nginx"]["hosts"]["edge-1"]
    given.update(report(tmp_path, FACTS | {"distribution_major_version": "11"}))
    Refusal(tmp_path, site).says("edge-1", "ansible_host is Debian 11", "Debian 12 or 13")
    given.update(report(tmp_path, FACTS | {"architecture": "sparc64"}))
    Refusal(tmp_path, site).says("edge-1", "ansible_host has sparc64", "controller")
