"""playbooks/validate.yml refuses each broken inventory in one sentence and changes nothing."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
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
PLAYBOOK = "playbooks/validate.yml"
READING_HOSTS = "Read the facts of the hosts"
READING_SCHEDULER = "Read the release of the scheduler's host"
DIGEST = hashlib.sha256(Path("/bin/sh").read_bytes()).hexdigest()

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
            "odsp_address": "127.0.0.1",
            "ansible_become": False,
            "ansible_python_interpreter": "/usr/bin/python3",
            **dict.fromkeys(SECRETS, "not-a-secret"),
        },
    }


class Encrypted(str):
    """A text that stands in YAML as `!vault`."""

    __slots__ = ()


yaml.SafeDumper.add_representer(
    Encrypted, lambda dumper, text: dumper.represent_scalar("!vault", text, style="|")
)


def program(name: str) -> str:
    """Return the path of a program of Ansible."""
    own = ROOT / ".venv/bin" / name
    found = str(own) if own.exists() else shutil.which(name)
    assert found, f"{name} is not installed"
    return found


class Refusal:
    """What ansible-playbook said about an inventory."""

    def __init__(self, path: Path, site: Site, *arguments: str, common: bool = True) -> None:
        """Write the inventory and validate it."""
        folder = path / "site"
        (folder / "group_vars").mkdir(parents=True, exist_ok=True)
        (folder / "hosts.yml").write_text(yaml.safe_dump(site["groups"]))
        (folder / "group_vars/all.yml").write_text(yaml.safe_dump(site["all"]))
        chain = ["-i", "inventories/common"] if common else []
        done = subprocess.run(
            [program("ansible-playbook"), *chain, "-i", str(folder), PLAYBOOK, *arguments],
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
    assert READING_SCHEDULER not in answer.output


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
    "user name too short for the store": (
        lambda site: site["all"].update(
            odsp_users=[{"name": "al"}], vault_user_passwords={"al": "not-a-secret"}
        ),
        ["edge-1", "odsp_users names al", "3 characters"],
    ),
    "user named like an account of the store": (
        lambda site: site["all"].update(
            odsp_users=[{"name": "mlflow"}], vault_user_passwords={"mlflow": "not-a-secret"}
        ),
        ["edge-1", "odsp_users names mlflow", "use another name"],
    ),
    "password too long for bcrypt": (
        give(vault_user_passwords={"ada": "e" * 73}),
        ["edge-1", "vault_user_passwords", "ada", "72 bytes"],
    ),
    "password too short for the store": (
        give(vault_user_passwords={"ada": "short"}),
        ["edge-1", "vault_user_passwords", "ada", "8 characters"],
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
        ["core-1", "minio_binary_sha256", DIGEST],
    ),
    "binary that is not there": (
        add("minio", "core-1", minio_binary="/nonexistent", minio_binary_sha256="0" * 64),
        ["core-1", "minio_binary is /nonexistent", "correct the path"],
    ),
    "binary by a way that the role does not know": (
        add("minio", "core-1", minio_binary="ftp://store.example/m", minio_binary_sha256="0" * 64),
        ["core-1", "minio_binary is ftp://store.example/m", "write the whole path"],
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


class Vault:
    """Encrypts as an operator would."""

    def __init__(self, folder: Path) -> None:
        """Choose a password."""
        password = folder / "password"
        password.write_text("opens the vault\n")
        self.open = ["--vault-password-file", str(password)]
        self.text = Encrypted(self.run("encrypt_string", "not-a-secret").partition("\n")[2])

    def run(self, *arguments: str) -> str:
        """Return what ansible-vault prints, without the margin."""
        done = subprocess.run(
            [program("ansible-vault"), *arguments, *self.open],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return re.sub("^ +", "", done.stdout, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Vault:
    """Return a vault that all tests share, as opening it takes time."""
    return Vault(tmp_path_factory.mktemp("vault"))


@pytest.fixture
def encrypted(tmp_path: Path, site: Site, vault: Vault) -> Site:
    """Return the good inventory with every secret encrypted on its own."""
    return site | {
        "all": site["all"]
        | dict.fromkeys(SECRETS, vault.text)
        | {
            "vault_user_passwords": {"ada": vault.text},
            "odsp_vault_encryption_required": True,
            "odsp_vault_file": str(tmp_path / "site/group_vars/all.yml"),
        }
    }


def test_accepts_secrets_that_are_not_plain(
    tmp_path: Path, encrypted: Site, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encrypted one by one, also within a mapping; in an encrypted file; kept elsewhere."""
    monkeypatch.setenv("ROOT_PASSWORD", "not-a-secret")
    encrypted["all"]["vault_minio_root_password"] = "{{ lookup('env', 'ROOT_PASSWORD') }}"
    whole = tmp_path / "site/group_vars/postgres.yml"
    whole.parent.mkdir(parents=True)
    whole.write_text("---\nvault_mlflow_database_password: not-a-secret\n")
    vault.run("encrypt", str(whole))
    answer = Refusal(tmp_path, encrypted, *vault.open)
    assert answer.returncode == 0, answer.output


def test_refuses_a_mapping_with_one_secret_in_plain_text(
    tmp_path: Path, encrypted: Site, vault: Vault
) -> None:
    """One encrypted value does not cover its neighbour."""
    encrypted["all"]["vault_user_passwords"]["grace"] = "not-a-secret"
    answer = Refusal(tmp_path, encrypted, *vault.open)
    answer.says_before_touching_a_host("vault_user_passwords", "ansible-vault encrypt", "all.yml")
    assert "not-a-secret" not in answer.output


ELSEWHERE = {
    "variables of a group": ("group_vars/minio.yml", "---\nvault_minio_root_password: {}\n"),
    "variables of a host": ("host_vars/core-1/keys", "---\nvault_minio_root_password: '{}'\n"),
    "inventory": (
        "more.yml",
        "---\nminio:\n  hosts:\n    core-1:\n      vault_minio_root_password: '{}'\n",
    ),
    "INI inventory": ("more", "[minio]\ncore-1 vault_minio_root_password='{}'\n"),
}


@pytest.mark.parametrize(("name", "text"), ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_refuses_secrets_in_plain_text_elsewhere(
    tmp_path: Path, encrypted: Site, vault: Vault, name: str, text: str
) -> None:
    """A secret is as readable in any other file of the inventory."""
    file = tmp_path / "site" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text.format("not-a-secret"))
    answer = Refusal(tmp_path, encrypted, *vault.open)
    remedy = f"ansible-vault encrypt {os.path.relpath(file, ROOT)}"
    answer.says_before_touching_a_host("core-1", "vault_minio_root_password", remedy)
    assert "not-a-secret" not in answer.output


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve a program of this machine, ten minutes at most; return its URL."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("ODSP_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "store"
    folder.mkdir()
    shutil.copy("/bin/sh", folder / "minio")
    command = ["timeout", "600", sys.executable, "-u", "-m", "http.server", "0"]
    with (
        (tmp_path / "store.log").open("w") as log,
        subprocess.Popen(
            [*command, "--bind", "127.0.0.1", "--directory", str(folder)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as server,
    ):
        try:
            assert server.stdout
            port = re.search(r" port (\d+) ", server.stdout.readline())
            assert port
            yield f"http://127.0.0.1:{port[1]}/minio"
        finally:
            server.terminate()


@pytest.mark.parametrize("arguments", [[], ["--check"]], ids=["run", "check"])
def test_refuses_an_url_with_another_digest(
    tmp_path: Path, site: Site, store: str, arguments: list[str]
) -> None:
    """A download that is not the one the operator means ends here, not in the role."""
    add("minio", "core-1", minio_binary=store, minio_binary_sha256="0" * 64)(site)
    Refusal(tmp_path, site, *arguments).says_before_touching_a_host(
        "core-1", "minio_binary_sha256 is 0000", f"{store} has {DIGEST}", "correct the digest"
    )


def test_downloads_an_url_once(tmp_path: Path, site: Site, store: str) -> None:
    """What was proven lies where the role looks for it; that is no change of a host."""
    add("minio", "core-1", minio_binary=store, minio_binary_sha256=DIGEST)(site)
    for arguments in (["--check"], []):
        answer = Refusal(tmp_path, site, *arguments)
        assert answer.returncode == 0, answer.output
        assert not re.search(r"changed=[1-9]", answer.output), answer.output
    assert (tmp_path / f"cache/minio/given-{DIGEST}/minio").is_file()
    assert (tmp_path / "store.log").read_text().count("GET /minio") == 1


def test_asks_for_an_url_only_where_minio_is(tmp_path: Path, site: Site, store: str) -> None:
    """A store that is away stops MinIO's installation, not the work on another host."""
    gone = store + "-of-yesterday"
    add("minio", "core-1", minio_binary=gone, minio_binary_sha256=DIGEST)(site)
    Refusal(tmp_path, site).says_before_touching_a_host(
        "core-1", f"minio_binary {gone}", "404", "or remove the variable"
    )
    answer = Refusal(tmp_path, site, "--limit", "compute-1")
    assert answer.returncode == 0, answer.output


def test_accepts_several_model_servers(tmp_path: Path, site: Site) -> None:
    """They share a route of the door and a database."""
    site["groups"]["model_server"]["hosts"]["edge-2"] = {}
    answer = Refusal(tmp_path, site)
    assert answer.returncode == 0, answer.output


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


@pytest.mark.parametrize("address", ["core-1.example", "192.0.2.1"], ids=["name", "foreign"])
def test_refuses_an_address_that_is_not_the_hosts(tmp_path: Path, site: Site, address: str) -> None:
    """A name, or what a router translates, is nothing to listen on."""
    site["groups"]["postgres"]["hosts"]["core-1"] = {"odsp_address": address}
    Refusal(tmp_path, site).says("core-1", f"odsp_address is {address}", "set odsp_address to")


def test_refuses_one_port_for_two_components(tmp_path: Path, site: Site) -> None:
    """Two components of one host would fight for it."""
    site["all"]["odsp_mlflow_port"] = 9000
    Refusal(tmp_path, site).says("core-1", "odsp_minio_port and odsp_mlflow_port are both 9000")


def test_refuses_workers_larger_than_their_host(tmp_path: Path, site: Site) -> None:
    """Processes times limit fit into the host."""
    size = {"dask_worker_processes": 2, "dask_worker_memory_limit": "64TiB"}
    site["groups"]["dask_worker"]["hosts"]["compute-2"] = size
    Refusal(tmp_path, site).says(
        "compute-2", "dask_worker_memory_limit 64TiB x 2 dask_worker_processes", "lower one"
    )


FACTS_MODULE = """#!/usr/bin/python
import json
import os
from ansible.module_utils.basic import AnsibleModule

facts = json.loads(os.environ["REPORTED_FACTS"])
AnsibleModule({}).exit_json(ansible_facts={"ansible_" + k: v for k, v in facts.items()})
"""
FACTS = {
    "distribution": "Debian",
    "distribution_major_version": "13",
    "architecture": os.uname().machine,
    "memtotal_mb": 4096,
    "processor_vcpus": 2,
}


def report(path: Path, facts: dict[str, object]) -> dict[str, Any]:
    """Return host variables under which a host reports the facts given here.

    Its Python knows them, so that a host that is asked on behalf of another one tells its own.
    """
    folder = path / "library"
    folder.mkdir(exist_ok=True)
    (folder / "reported_facts.py").write_text(FACTS_MODULE)
    python = path / f"python-{len(list(path.glob('python-*')))}"
    given = shlex.quote(json.dumps(facts))
    python.write_text(f'#!/bin/sh\nREPORTED_FACTS={given} exec /usr/bin/python3 "$@"\n')
    python.chmod(0o755)
    return {
        "ansible_facts_modules": ["reported_facts"],
        "ansible_python_interpreter": str(python),
    }


@pytest.mark.parametrize("limit", [[], ["--limit", "compute-2"]], ids=["all", "limit"])
def test_refuses_two_debian_releases_under_dask(
    tmp_path: Path, site: Site, limit: list[str]
) -> None:
    """Scheduler, workers and notebooks run one Python, also when a worker is added alone."""
    for group in site["groups"].values():
        for name, given in group["hosts"].items():
            release = "12" if name == "compute-2" else "13"
            given.update(report(tmp_path, FACTS | {"distribution_major_version": release}))
    Refusal(tmp_path, site, *limit).says(
        "two Pythons", "Debian 12 on compute-2", "Debian 13 on compute-1", "ansible_host"
    )


def test_limit_asks_the_scheduler_for_a_worker_only(tmp_path: Path, site: Site) -> None:
    """Hosts without the one Python have nothing to compare."""
    answer = Refusal(tmp_path, site, "--limit", "compute-2")
    assert answer.returncode == 0, answer.output
    assert READING_SCHEDULER in answer.output
    site["groups"]["dask_scheduler"]["hosts"]["compute-1"] = copy.copy(UNREACHABLE)
    answer = Refusal(tmp_path, site, "--limit", "core-1")
    assert answer.returncode == 0, answer.output
    assert READING_SCHEDULER not in answer.output


def test_limit_refuses_a_worker_whose_scheduler_is_unreachable(tmp_path: Path, site: Site) -> None:
    """What cannot be compared is not taken for equal."""
    site["groups"]["dask_scheduler"]["hosts"]["compute-1"] = copy.copy(UNREACHABLE)
    Refusal(tmp_path, site, "--limit", "compute-2").says(
        "compute-1", "ansible_host 127.0.0.1", "cannot be reached", "release of compute-2", "start"
    )


def test_refuses_other_systems(tmp_path: Path, site: Site) -> None:
    """Neither another distribution nor another processor can be installed from here."""
    given = site["groups"]["nginx"]["hosts"]["edge-1"]
    given.update(report(tmp_path, FACTS | {"distribution_major_version": "11"}))
    Refusal(tmp_path, site).says("edge-1", "ansible_host is Debian 11", "Debian 12 or 13")
    given.update(report(tmp_path, FACTS | {"architecture": "sparc64"}))
    Refusal(tmp_path, site).says("edge-1", "ansible_host has sparc64", "controller")
