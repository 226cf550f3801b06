"""What exists where, as an inventory's groups say; and the platform that should agree.

Nothing here is read from the inventory's wiring: it is what the wiring is compared with.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import playbook
import scenario
import testinfra
import yaml

STATE = Path(os.environ.get("ODSP_STATE_DIR", "."))

#: The TCP ports each component takes at its host's address; the system chooses those of workers.
PORTS: dict[str, tuple[int, ...]] = {
    "postgres": (5432,),
    "minio": (9000, 9001),
    "mlflow": (5000,),
    "dask_scheduler": (8786, 8787),
    "dask_worker": (),
    "jupyterlab": (8888,),
    "model_server": (8000,),
    "nginx": (443,),
}
#: Those that greet nobody without a certificate of the platform.
MUTUAL = ("mlflow", "dask_scheduler", "jupyterlab", "model_server")
ROUTES = {
    "jupyterlab": "/jupyter/",
    "mlflow": "/mlflow/",
    "dask_scheduler": "/dask/",
    "minio": "/minio/",
    "model_server": "/inference/",
}
#: Who has a database, with an owner of the same name.
DATABASES = ("mlflow", "model_server")
#: Who has an account at the object store, and the bucket it is for.
ACCOUNTS = {"mlflow": "mlflow", "jupyterlab": "jupyterlab", "dask_worker": "jupyterlab"}
#: The bucket that is for programs only, hence not for users of the door.
PRIVATE_BUCKET = "mlflow"
SECRETS: dict[str, tuple[str, ...]] = {
    "minio": ("vault_minio_root_password",),
    "mlflow": ("vault_mlflow_database_password", "vault_mlflow_s3_secret_key"),
    "dask_worker": ("vault_dask_worker_s3_secret_key",),
    "jupyterlab": ("vault_jupyterlab_s3_secret_key",),
    "model_server": ("vault_model_server_database_password",),
    "nginx": ("vault_user_passwords",),
}
#: A variable, whose programs find it, and what must exist for that; it leads to the first.
TOLD = (
    ("MLFLOW_TRACKING_URI", ("jupyterlab", "dask_worker"), ("mlflow",)),
    ("AWS_ENDPOINT_URL_S3", ("jupyterlab", "dask_worker"), ("minio",)),
    ("DASK_SCHEDULER_ADDRESS", ("jupyterlab",), ("dask_scheduler",)),
    ("DASK_DISTRIBUTED__DASHBOARD__LINK", ("jupyterlab",), ("nginx", "dask_scheduler")),
)


#: What a host says about itself, in one visit.
LOOK = """
import pathlib, subprocess
def lines(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]
def told(program):
    unit = f"odsp-{program}.service"
    ((pid,),) = lines("systemctl", "show", "--value", "--property=MainPID", unit)
    text = pathlib.Path(f"/proc/{pid}/environ").read_text()
    pairs = (entry.partition("=") for entry in text.split(chr(0)))
    return {name: value for name, _, value in pairs if name in QUESTION["variables"]}
def units(verb, state):
    command = ("systemctl", verb, "--plain", "--no-legend", f"--state={state}", "odsp-*.service")
    return [line[0] for line in lines(*command)]
print(json.dumps({
    "enabled": units("list-unit-files", "enabled"),
    "active": units("list-units", "active"),
    "keys": [path.stem for path in pathlib.Path("/etc/odsp/tls").glob("*.key")],
    "listening": [line[3] for line in lines("ss", "-Hltn")],
    "told": {program: told(program) for program in QUESTION["programs"]},
}))
"""


@dataclass(frozen=True)
class Topology:
    """Which hosts are in which group.

    `formerly` are members of groups that the inventory no longer names: their units, certificates
    and data stay until somebody removes them, what others granted them is gone.
    """

    groups: Mapping[str, list[str]]
    formerly: Mapping[str, list[str]] = field(default_factory=dict)

    def has(self, *groups: str) -> bool:
        """Tell whether each of these components exists."""
        return all(self.groups.get(group) for group in groups)

    def had(self, group: str) -> bool:
        """Tell whether this component exists or once did."""
        return self.has(group) or bool(self.formerly.get(group))

    @property
    def hosts(self) -> list[str]:
        """All hosts of the inventory."""
        return sorted({host for members in self.groups.values() for host in members})

    def host(self, group: str) -> str:
        """Return the one host of a group."""
        (host,) = self.groups[group]
        return host

    def present(self, host: str) -> set[str]:
        """Return the components that the inventory gives a host."""
        return {name for name, members in self.groups.items() if host in members}

    def installed(self, host: str) -> set[str]:
        """Return these, and those it gave it formerly."""
        return self.present(host) | Topology(self.formerly).present(host)

    @property
    def routes(self) -> set[str]:
        """The door's routes."""
        return {path for group, path in ROUTES.items() if self.has(group, "nginx")}

    @property
    def databases(self) -> set[str]:
        """The databases; data outlives the inventory's word for it."""
        return {name for name in DATABASES if self.had(name) and self.has("postgres")}

    @property
    def accounts(self) -> dict[str, str]:
        """The object store's accounts for programs, each with its bucket."""
        return {a: b for a, b in ACCOUNTS.items() if self.has(a, "minio")}

    @property
    def buckets(self) -> set[str]:
        """The object store's buckets; data outlives the inventory's word for it."""
        return {b for a, b in ACCOUNTS.items() if self.had(a) and self.has("minio")}

    @property
    def shared_buckets(self) -> set[str]:
        """The buckets of whoever may enter the door; none of them is a user while there is none."""
        return {*self.accounts.values()} - {PRIVATE_BUCKET} if self.has("nginx") else set()

    @property
    def secrets(self) -> set[str]:
        """The secrets that were made."""
        own = {name for group, names in SECRETS.items() if self.had(group) for name in names}
        return {"vault_ca_certificate", "vault_ca_private_key"} | own

    @property
    def links(self) -> list[tuple[str, str]]:
        """The links of the proof with the host each ends at."""
        groups = self.groups
        found = [(f"{g} answers", h) for g, hosts in groups.items() for h in hosts]
        if self.has("jupyterlab", "dask_scheduler"):
            found += [
                ("a notebook's Client() finds every worker", self.host("dask_scheduler")),
                ("every worker host trains", groups["dask_worker"][0]),
            ]
        if self.has("jupyterlab", "mlflow"):
            found += [
                ("the run is logged and its model registered", self.host("mlflow")),
                ("the run is a row in PostgreSQL", self.host("postgres")),
                ("the model is an object in MinIO", self.host("minio")),
                ("the proof removes what it made", self.host("mlflow")),
            ]
        if self.has("jupyterlab", "mlflow", "model_server"):
            first = self.groups["model_server"][0]  # any of them answers, so the first is named
            found += [
                ("the door loads the model", first),
                ("predictions equal the model's own", first),
                ("the door unloads the model", first),
            ]
        if self.has("nginx"):
            paths = sorted({"/", *self.routes})
            found += [(f"{path} asks who it is", self.host("nginx")) for path in paths]
        return sorted(found)


def read_topology(inventory: Path) -> Topology:
    """Return the topology that an inventory file in YAML describes."""
    tree = yaml.safe_load(inventory.read_text())
    members = {
        group: sorted((tree[group] or {}).get("hosts") or {}) for group in PORTS & tree.keys()
    }
    return Topology({group: hosts for group, hosts in members.items() if hosts})


@dataclass(frozen=True)
class Platform:
    """The scenario's hosts under an inventory, which is the scenario's own or a changed one."""

    topology: Topology
    inventory: Path
    #: What the hosts said since the last playbook.
    said: dict[str, dict[str, Any]] = field(default_factory=dict)

    def play(self, name: str, *arguments: str) -> playbook.Run:
        """Run a playbook as an operator does; its output must hold no secret."""
        self.said.clear()
        sources = (*playbook.inventories()[:-1], self.inventory)
        return playbook.play(scenario.ROOT / "playbooks" / name, *arguments, sources=sources)

    def verify(self) -> dict[str, Any]:
        """Walk the data's way through the platform; return the verdict."""
        verdict = STATE / "verdict.json"
        verdict.unlink(missing_ok=True)
        run = self.play("verify.yml")
        assert verdict.exists(), run.stdout[-3000:] + run.stderr[-3000:]
        return dict(json.loads(verdict.read_text()))

    def changed(self, groups: Mapping[str, list[str]], folder: Path) -> Platform:
        """Return this platform under an inventory with other groups, written to a folder."""
        tree = {group: {"hosts": dict.fromkeys(hosts)} for group, hosts in groups.items()}
        (folder / "hosts.yml").write_text(yaml.safe_dump(tree))
        had = self.topology.groups
        formerly = {g: hosts for g, hosts in had.items() if not groups.get(g)}
        return Platform(Topology(groups, formerly), folder, self.said)

    @cached_property
    def addresses(self) -> dict[str, str]:
        """The hosts' addresses."""
        return dict(json.loads((STATE / "machine.json").read_text())["hosts"])

    @property
    def secrets(self) -> dict[str, Any]:
        """The scenario's secrets."""
        return scenario.secrets()

    @cached_property
    def ca(self) -> str:
        """A file with the platform's authority."""
        path = STATE / "wiring-ca.crt"
        path.write_text(self.secrets["vault_ca_certificate"])
        return str(path)

    def on(self, host: str) -> Any:
        """Return a host to run commands on, as root."""
        inventory = STATE / "testinfra.yml"
        return testinfra.get_host(f"ansible://{host}?sudo=true", ansible_inventory=str(inventory))

    def look(self, host: str) -> dict[str, Any]:
        """Return what a host says about its units, certificates, ports and programs' variables."""
        if host not in self.said:
            programs = {program for _, told, _ in TOLD for program in told}
            present = {p for p in programs if host in self.topology.groups.get(p, [])}
            question = {"variables": [name for name, _, _ in TOLD], "programs": sorted(present)}
            self.said[host] = self.ask(host, LOOK, question)
        return self.said[host]

    def ask(self, host: str, program: str, question: object) -> Any:
        """Run a Python program on a host; it reads QUESTION and prints the answer as JSON."""
        return scenario.python(
            self.on(host), f"QUESTION = v['question']\n{program}", question=question
        )

    def greet(self, host: str, port: int, name: str = "") -> tuple[Mapping[str, Any], str]:
        """Shake hands without a certificate of one's own and say something.

        Returns the peer's certificate, and why it did not answer, if so.
        """
        tls = ssl.create_default_context(cafile=self.ca)
        address = self.addresses[host]
        with (
            socket.create_connection((address, port), 60) as plain,
            tls.wrap_socket(plain, server_hostname=name or address) as secure,
        ):
            certificate: Mapping[str, Any] = secure.getpeercert() or {}
            try:
                secure.sendall(b"GET / HTTP/1.0\r\n\r\n")
                return certificate, "" if secure.recv(1) else "closed"
            except (ssl.SSLError, ConnectionError) as refused:
                return certificate, str(refused)
