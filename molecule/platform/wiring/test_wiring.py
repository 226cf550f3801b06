"""Does everything exist where the inventory's groups say, and nothing else?

Asked of the hosts and servers of any topology; what they should say stands in topology.py.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests
from botocore.exceptions import ClientError
from topology import (
    ACCOUNTS,
    DATABASES,
    MUTUAL,
    PORTS,
    PRIVATE_BUCKET,
    ROUTES,
    TOLD,
    Platform,
    read_topology,
)

#: Whether PostgreSQL asks this host for a password, for each database with its owner.
KNOCK = """
import socket, ssl, struct
def knock(database):
    with socket.create_connection((QUESTION["address"], 5432), 60) as plain:
        plain.sendall(struct.pack("!ii", 8, 80877103))
        assert plain.recv(1) == b"S"
        tls = ssl.create_default_context(cafile="/etc/odsp/tls/ca.crt")
        with tls.wrap_socket(plain, server_hostname=QUESTION["address"]) as secure:
            words = f"user\\0{database}\\0database\\0{database}\\0\\0".encode()
            secure.sendall(struct.pack("!ii", 8 + len(words), 196608) + words)
            return {b"R": "password", b"E": "refused"}[secure.recv(1)]
print(json.dumps({database: knock(database) for database in QUESTION["databases"]}))
"""
#: What JupyterLab says to each component's certificate on this host.
SHOW = """
import http.client, ssl
def show(component):
    tls = ssl.create_default_context(cafile="/etc/odsp/tls/ca.crt")
    tls.load_cert_chain(f"/etc/odsp/tls/{component}.crt", f"/etc/odsp/tls/{component}.key")
    connection = http.client.HTTPSConnection(QUESTION["address"], 8888, timeout=60, context=tls)
    connection.request("GET", "/jupyter/api/status")
    return connection.getresponse().status
print(json.dumps({component: show(component) for component in QUESTION["components"]}))
"""


@pytest.fixture(scope="session")
def platform() -> Platform:
    """Return the platform that the scenario's own inventory describes."""
    inventory = Path(os.environ["MOLECULE_INVENTORY_FILE"])
    return Platform(read_topology(inventory), inventory.parent)


def test_units_and_certificates_are_their_components_own(platform: Platform) -> None:
    """A host runs the units of its groups, after every boot, and holds their certificates alone."""
    for host in platform.topology.hosts:
        said, installed = platform.look(host), platform.topology.installed(host)
        assert set(said["enabled"]) == {f"odsp-{one}.service" for one in installed}, host
        present = platform.topology.present(host)
        assert set(said["active"]) >= {f"odsp-{one}.service" for one in present}, host
        assert set(said["active"]) <= {f"odsp-{one}.service" for one in installed}, host
        assert set(said["keys"]) == installed, host


def test_only_components_listen(platform: Platform) -> None:
    """Beside SSH, the network reaches what the host's groups bring and nothing else."""
    for host in platform.topology.hosts:
        ends = [end.rsplit(":", 1) for end in platform.look(host)["listening"]]
        heard = {int(port) for address, port in ends if not address.startswith(("127.", "[::1]"))}
        installed = platform.topology.installed(host)
        if "dask_worker" in installed:  # workers and their nannies take whatever ports are free
            heard = {port for port in heard if port < 32768}
        present = platform.topology.present(host)
        assert heard - {22} >= {port for one in present for port in PORTS[one]}, host
        assert heard - {22} <= {port for one in installed for port in PORTS[one]}, host


def test_each_port_shows_the_certificate_of_its_host(platform: Platform) -> None:
    """Whoever answers is the component of that host; most hang up on those who show none."""
    for component, hosts in platform.topology.groups.items():
        for host in hosts:
            for port in PORTS[component] if component != "postgres" else ():
                certificate, silence = platform.greet(host, port)
                subject = dict(pair for part in certificate["subject"] for pair in part)
                names = {value for _, value in certificate["subjectAltName"]}
                assert subject["commonName"] == f"{component}.{host}"
                assert {host, platform.addresses[host]} <= names
                assert bool(silence) == (component in MUTUAL), (component, port, silence)


def test_the_door_leads_to_what_exists(platform: Platform) -> None:
    """What exists has a route and a tile, asks who it is, and answers; the rest has none."""
    topology = platform.topology
    if not topology.has("nginx"):
        return  # there is no door
    door = f"https://{platform.addresses[topology.host('nginx')]}"
    user = next(iter(platform.secrets["vault_user_passwords"].items()))
    for path in ROUTES.values():
        assert requests.get(door + path, verify=platform.ca, timeout=30).status_code == 401, path
        answer = requests.get(door + path, verify=platform.ca, auth=user, timeout=60)
        assert answer.status_code == (200 if path in topology.routes else 404), path
    start = requests.get(door, verify=platform.ca, auth=user, timeout=30)
    tiles = re.findall(r'class="tile" href="([^"]+)"', start.text)
    assert sorted(tiles) == sorted(topology.routes)


def test_databases_are_their_consumers_own(platform: Platform) -> None:
    """Each consumer that exists has one; its host is asked for the password, others go away."""
    topology = platform.topology
    if not topology.has("postgres"):
        return  # there is no database server
    query = "select datname, pg_get_userbyid(datdba) from pg_database where datallowconn"
    command = f"cd / && runuser -u postgres -- psql -h /run/postgresql -XAtF: -c '{query}'"
    rows = platform.on(topology.host("postgres")).check_output(command).split()
    mine = {row for row in rows if not row.endswith(":postgres")}
    assert mine == {f"{name}:{name}" for name in topology.databases}
    question = {
        "address": platform.addresses[topology.host("postgres")],
        "databases": DATABASES,
    }
    for host in topology.hosts:
        wanted = {
            name: "password" if host in topology.groups.get(name, []) else "refused"
            for name in DATABASES
        }
        assert platform.ask(host, KNOCK, question) == wanted, host


class Store:
    """The object store as somebody sees it."""

    def __init__(self, platform: Platform, name: str, secret: str) -> None:
        host = platform.topology.host("minio")
        self.s3: Any = boto3.client(
            "s3",
            endpoint_url=f"https://{platform.addresses[host]}:9000",
            aws_access_key_id=name,
            aws_secret_access_key=secret,
            region_name="us-east-1",
            verify=platform.ca,
        )

    def buckets(self) -> set[str]:
        """Return the names of the buckets."""
        return {bucket["Name"] for bucket in self.s3.list_buckets()["Buckets"]}

    def says(self, bucket: str) -> str:
        """Return what comes of listing a bucket: fine, or the code of the refusal."""
        try:
            self.s3.list_objects_v2(Bucket=bucket)
        except ClientError as refused:
            return str(refused.response["Error"]["Code"])
        return "fine"


def test_the_store_knows_its_consumers(platform: Platform) -> None:
    """Buckets, accounts of programs and users exist for consumers that exist, each for its own."""
    topology, known = platform.topology, platform.secrets
    if not topology.has("minio"):
        return  # there is no object store
    buckets = Store(platform, "odsp", known["vault_minio_root_password"]).buckets()
    assert buckets == topology.buckets
    stranger = secrets.token_hex(16)
    for name in ACCOUNTS:
        store = Store(platform, name, known.get(f"vault_{name}_s3_secret_key", stranger))
        own, other = topology.accounts.get(name), "AccessDenied"
        wanted = {b: "fine" if b == own else other for b in buckets}
        if own is None:
            wanted = dict.fromkeys(buckets, "InvalidAccessKeyId")
        assert {bucket: store.says(bucket) for bucket in buckets} == wanted, name
    for name, password in known.get("vault_user_passwords", {}).items():
        store, shared = Store(platform, name, password), topology.shared_buckets
        refusal = "AccessDenied" if shared else "InvalidAccessKeyId"
        wanted = {b: "fine" if b in shared else refusal for b in buckets | {PRIVATE_BUCKET}}
        assert {bucket: store.says(bucket) for bucket in wanted} == wanted, name


def test_notebooks_are_for_the_door_alone(platform: Platform) -> None:
    """No other component's certificate opens JupyterLab, not even on its own host."""
    topology = platform.topology
    if not topology.has("jupyterlab"):
        return  # there are no notebooks
    address = platform.addresses[topology.host("jupyterlab")]
    for host in topology.hosts:
        shown = sorted(topology.installed(host))
        answers = platform.ask(host, SHOW, {"address": address, "components": shown})
        wanted = {one: 200 if one in ("nginx", "jupyterlab") else 403 for one in shown}
        assert answers == wanted, host


def test_programs_are_told_of_what_exists(platform: Platform) -> None:
    """Notebooks and tasks find the address of each component there is, no trace of others."""
    topology = platform.topology
    for variable, programs, components in TOLD:
        for program in programs:
            for host in topology.groups.get(program, []):
                told = platform.look(host)["told"][program]
                if topology.has(*components):
                    address = platform.addresses[topology.host(components[0])]
                    assert f"/{address}" in told[variable], (host, program)
                else:
                    assert variable not in told, (host, program)


def test_secrets_are_those_of_components(platform: Platform) -> None:
    """No secret is made for what does not exist."""
    assert platform.secrets.keys() == platform.topology.secrets


def test_the_proof_knows_what_exists(platform: Platform) -> None:
    """Its verdict is good and has a link for everything there is, and for nothing else."""
    verdict = platform.verify()
    assert verdict["failure"] is None
    assert verdict["ok"] is True
    links = [(link["name"], link["host"]) for link in verdict["links"]]
    assert sorted(links) == sorted(platform.topology.links)


#: All of the above, for a platform whose inventory has changed.
QUESTIONS = (
    test_units_and_certificates_are_their_components_own,
    test_only_components_listen,
    test_each_port_shows_the_certificate_of_its_host,
    test_the_door_leads_to_what_exists,
    test_databases_are_their_consumers_own,
    test_the_store_knows_its_consumers,
    test_notebooks_are_for_the_door_alone,
    test_programs_are_told_of_what_exists,
    test_secrets_are_those_of_components,
    test_the_proof_knows_what_exists,
)
