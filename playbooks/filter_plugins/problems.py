"""Ansible filters: what is wrong with an inventory and with its hosts, one sentence each."""

from __future__ import annotations

import hashlib
import ipaddress
import itertools
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# The groups of the contract and what a host in them cannot do without.
NEEDS: dict[str, tuple[str, ...]] = {
    "postgres": (),
    "minio": (),
    "mlflow": ("postgres", "minio"),
    "dask_scheduler": ("dask_worker",),
    "dask_worker": ("dask_scheduler",),
    "jupyterlab": ("nginx",),
    "model_server": ("mlflow", "postgres", "nginx"),
    "nginx": (),
}
SEVERAL_HOSTS = ("dask_worker", "model_server")

USER_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
#: What bcrypt looks at; nginx knows no longer passwords.
BCRYPT_BYTES = 72
SHA256 = re.compile(r"[0-9a-fA-F]{64}")
MEMORY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}

Problems = Iterator[str]


def parse_memory(value: object) -> int | None:
    """Return the bytes that a text like 2GiB or 500MB means, or None."""
    match = MEMORY.fullmatch(str(value))
    return int(float(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else None


def listed(names: list[str]) -> str:
    """Return names as a reader would say them: a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


@dataclass(frozen=True)
class Inventory:
    """An inventory as the rules see it."""

    hosts: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, list[str]]
    sources: list[str]

    def members(self, group: str) -> list[str]:
        """Return the hosts of a group, none if there is no such group."""
        return list(self.groups.get(group, []))

    def site(self) -> Mapping[str, Any]:
        """Return the variables of one host, for what is the same on all."""
        return self.hosts[self.members("all")[0]]

    def command(self, playbook: str) -> str:
        """Return the command line that runs a playbook on this inventory."""
        paths = [os.path.relpath(source) for source in self.sources]
        if paths == ["inventories/common", "inventories/local"]:
            paths = []
        return " ".join(["ansible-playbook", *(f"-i {path}" for path in paths), playbook])


def contract(inventory: Inventory) -> Problems:
    """The contract is chained before the site; without it no other rule means anything."""
    hosts = inventory.members("all")
    if not hosts:
        place = inventory.sources[-1] if inventory.sources else "inventories/<site>"
        yield (
            f"No host is in the inventory {os.path.relpath(place)}: put one into each group"
            " (postgres, minio ...) that shall exist, as inventories/single/hosts.yml shows."
        )
    elif "odsp_inventory_contract" not in inventory.site():
        sites = [os.path.relpath(source) for source in inventory.sources]
        chain = " ".join(f"-i {path}" for path in ["inventories/common", *sites])
        yield (
            f"{hosts[0]}: odsp_inventory_contract is not set, so this inventory lacks"
            f" inventories/common: run `ansible-playbook {chain} site.yml`."
        )
    elif not any(inventory.members(group) for group in NEEDS):
        yield (
            f"{hosts[0]} and every other host is in none of the groups {listed(list(NEEDS))}:"
            " put a host into each group that shall exist."
        )


def group_sizes(inventory: Inventory) -> Problems:
    """Only workers and model servers come in numbers."""
    for group in NEEDS:
        members = inventory.members(group)
        if len(members) > 1 and group not in SEVERAL_HOSTS:
            yield (
                f"{listed(members)} are all in the group {group}, which takes one host:"
                f" leave one of them in {group}."
            )


def providers(inventory: Inventory) -> Problems:
    """A consumer has its providers."""
    for group, needed in NEEDS.items():
        members = inventory.members(group)
        for provider in needed:
            if members and not inventory.members(provider):
                yield (
                    f"{listed(members)}: {group} needs {provider}, but the group {provider} is"
                    f" empty: put a host into {provider}, or take {listed(members)} out of {group}."
                )


def names_and_addresses(inventory: Inventory) -> Problems:
    """Every host has a name of its own and an address."""
    for host in inventory.members("all"):
        if host in inventory.groups:
            yield (
                f"{host} is the name of a host and of a group: rename the host, for instance to"
                f" {host.replace('_', '-')}-1."
            )
        if not inventory.hosts[host].get("ansible_host", host):
            yield (
                f"{host}: ansible_host is empty, the host does not exist yet: run `make hosts`"
                " for hosts in containers, or set its address in the inventory."
            )


def users(inventory: Inventory) -> Problems:
    """The door has users, each with a name that Unix and HTTP accept, and with a password."""
    doors = inventory.members("nginx")
    if not doors:
        return
    site, remedy = inventory.site(), "set it to a list like [{name: ada}]"
    wanted = site.get("odsp_users")
    if not isinstance(wanted, (list, tuple)) or not wanted:
        yield f"{doors[0]}: odsp_users is missing or empty, nobody could enter: {remedy}."
        return
    names: list[str] = []
    for user in wanted:
        name = user.get("name") if isinstance(user, Mapping) else None
        if not isinstance(name, str) or not USER_NAME.fullmatch(name):
            yield (
                f"{doors[0]}: odsp_users has an entry whose name is {name!r}: give it a name of"
                " small letters, digits, - and _, as in {name: ada}."
            )
        else:
            names.append(name)
    for name, count in Counter(names).items():
        if count > 1:
            yield f"{doors[0]}: odsp_users names {name} {count} times: leave one of them."
    passwords = site.get("vault_user_passwords")
    if isinstance(passwords, Mapping):
        for name in dict.fromkeys(names):
            if not passwords.get(name):
                yield (
                    f"{doors[0]}: vault_user_passwords has no password for {name}:"
                    f" {generate(inventory)}."
                )
            elif len(str(passwords[name]).encode()) > BCRYPT_BYTES:
                yield (
                    f"{doors[0]}: vault_user_passwords has a password for {name} that bcrypt would"
                    f" cut: choose one of {BCRYPT_BYTES} bytes or less."
                )
    for store in inventory.members("minio"):
        yield from store_users(inventory.hosts[store], doors[0], names, passwords)


def store_users(
    store: Mapping[str, Any], door: str, names: list[str], passwords: object
) -> Problems:
    """Users sign in to MinIO's console as they do at the door, within MinIO's limits."""
    if not store.get("minio_users_buckets"):
        return  # then nobody is a user of MinIO
    taken = {account.get("name") for account in store.get("minio_accounts") or []}
    taken.add(store.get("minio_root_user", "odsp"))
    for name in dict.fromkeys(names):
        if len(name) < 3:
            yield (
                f"{door}: odsp_users names {name}, which MinIO cannot take: use a name of 3"
                " characters or more."
            )
        if name in taken:
            yield (
                f"{door}: odsp_users names {name}, which is an account of MinIO already: use"
                " another name."
            )
        password = passwords.get(name) if isinstance(passwords, Mapping) else None
        if password and len(str(password)) < 8:
            yield (
                f"{door}: vault_user_passwords has a password for {name} that MinIO cannot take:"
                " choose one of 8 characters or more."
            )


def generate(inventory: Inventory) -> str:
    """Return the remedy for a missing secret."""
    return f"run `{inventory.command('playbooks/ops/generate_secrets.yml')}`"


def secrets(inventory: Inventory) -> Problems:
    """Every secret that a component of this inventory consumes has a value."""
    site = inventory.site()
    for group, names in site.get("odsp_secrets_by_group", {}).items():
        members = inventory.members(group)
        for name in names if members else ():
            if not site.get(name):
                state = "empty" if name in site else "missing"
                who = members[0] if group == "all" else f"{members[0]} ({group})"
                yield f"{who}: {name} is {state}: {generate(inventory)}."


Variables = Iterator[tuple[str, yaml.Node]]


def entries(node: yaml.Node | None) -> Variables:
    """Return the keys and values of a mapping, nothing of another node."""
    if isinstance(node, yaml.MappingNode):
        yield from ((str(key.value), value) for key, value in node.value)


def variables_of_groups(node: yaml.Node | None) -> Variables:
    """Return the variables in a YAML inventory."""
    for _, group in entries(node):
        parts = dict(entries(group))
        yield from entries(parts.get("vars"))
        for _, host in entries(parts.get("hosts")):
            yield from entries(host)
        yield from variables_of_groups(parts.get("children"))


def readable(value: str) -> bool:
    """Return whether a text is a secret itself: not empty, and no expression that fetches it."""
    return bool(value.strip()) and not re.fullmatch(r"\s*\{\{.*\}\}\s*", value, re.DOTALL)


def plain(node: yaml.Node) -> bool:
    """Return whether any part of a value is neither encrypted nor fetched from elsewhere."""
    if isinstance(node, yaml.MappingNode):
        return any(plain(value) for _, value in entries(node))
    if isinstance(node, yaml.SequenceNode):
        return any(plain(value) for value in node.value)
    if node.tag in ("!vault", "!vault-encrypted") and node.value.startswith("$ANSIBLE_VAULT;"):
        return False
    return not node.tag.endswith(":null") and readable(node.value)


def plain_secrets(path: Path, *, inventory: bool) -> list[str]:
    """Return the names of the secrets that anybody can read in a file."""
    text = path.read_text(errors="replace")
    if "vault_" not in text or text.startswith("$ANSIBLE_VAULT;"):
        return []
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        root = None
    if not isinstance(root, yaml.MappingNode):  # Ansible refuses all but INI and programs itself
        if os.access(path, os.X_OK):
            return []
        lines = re.sub(r"^[ \t]*[#;].*", "", text, flags=re.MULTILINE)
        value = r"""(\{\{.*?\}\}|"[^"\n]*"|'[^'\n]*'|\S+)"""
        found = re.findall(rf"(?:^|\s)(vault_\w+)[ \t]*=[ \t]*{value}", lines)
        return [name for name, given in found if readable(given.strip("\"'"))]
    variables = variables_of_groups(root) if inventory else entries(root)
    return [name for name, node in variables if name.startswith("vault_") and plain(node)]


def files_below(folder: Path, without: tuple[str, ...] = ()) -> Iterator[Path]:
    """Return the files that Ansible would read in a folder."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name not in without and name[0] != "."]
        for path in (Path(place, name) for name in sorted(names) if name[0] != "."):
            if path.suffix in ("", ".yml", ".yaml", ".json", ".ini") and path.is_file():
                yield path


def variable_files(inventory: Inventory) -> Iterator[tuple[Path, bool]]:
    """Return each file that may set variables, and whether it is itself an inventory."""
    yield Path(str(inventory.site().get("odsp_vault_file", ""))), False
    for source in filter(Path.exists, map(Path, inventory.sources)):  # not for -i name,name
        folder = source if source.is_dir() else source.parent
        for name in ("group_vars", "host_vars"):
            yield from ((path, False) for path in files_below(folder / name))
        if source.is_dir():
            yield from ((path, True) for path in files_below(source, ("group_vars", "host_vars")))
        else:
            yield source, True


def vault(inventory: Inventory) -> Problems:
    """Secrets of a real site lie encrypted, in whichever file of the inventory."""
    if not inventory.site().get("odsp_vault_encryption_required", True):
        return
    seen: set[Path] = set()
    for path, is_inventory in variable_files(inventory):
        if not path.is_file() or path.resolve() in seen:
            continue
        seen.add(path.resolve())
        for name in plain_secrets(path, inventory=is_inventory)[:1]:
            members = inventory.members("all")
            host = next((h for h in members if name in inventory.hosts[h]), members[0])
            yield (
                f"{host}: odsp_vault_encryption_required is true but"
                f" {name} lies in plain text: run `ansible-vault encrypt {os.path.relpath(path)}`."
            )


def workers(inventory: Inventory) -> Problems:
    """A worker's size, where it is given, is a size."""
    for host in inventory.members("dask_worker"):
        given = inventory.hosts[host]
        for name in ("dask_worker_processes", "dask_worker_threads"):
            value = given.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not re.fullmatch(r"0*[1-9]\d*", str(value)):
                yield (
                    f"{host}: {name} is {value!r}: set it to a whole number of at least 1, or take"
                    f" {host} out of dask_worker."
                )
        limit = given.get("dask_worker_memory_limit")
        if limit not in (None, "") and not parse_memory(limit):
            yield (
                f"{host}: dask_worker_memory_limit is {limit!r}: set it to a number with a unit,"
                " for instance 2GiB."
            )


def object_store(inventory: Inventory) -> Problems:
    """A server binary that the operator brings is the one the operator means."""
    for host in inventory.members("minio"):
        given = inventory.hosts[host]
        binary = str(given.get("minio_binary") or "")
        wanted = str(given.get("minio_binary_sha256") or "")
        if not binary:
            continue
        path = Path(binary).expanduser()
        if not SHA256.fullmatch(wanted):
            state = f"is {wanted!r}, no SHA-256" if wanted else "is missing beside minio_binary"
            yield f"{host}: minio_binary_sha256 {state}: set it to the 64 digits of `sha256sum`."
        elif not re.match(r"/|~/|https?://", binary):
            yield (
                f"{host}: minio_binary is {binary}, neither an absolute path nor an https URL:"
                " write the whole path."
            )
        elif "://" in binary:
            continue  # the next task downloads and proves it
        elif not path.is_file():
            yield (
                f"{host}: minio_binary is {binary}, and there is no such file here: correct the"
                " path, or remove the variable to build MinIO."
            )
        else:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != wanted.lower():
                yield (
                    f"{host}: minio_binary_sha256 is {wanted} but {binary} has {found}: correct"
                    " the digest if you trust the file, or the file."
                )


RULES: tuple[Callable[[Inventory], Problems], ...] = (
    group_sizes,
    providers,
    names_and_addresses,
    secrets,
    users,
    vault,
    workers,
    object_store,
)


def renamed_variables(inventory: Inventory, renamed: list[dict[str, str]]) -> Problems:
    """No variable is set under a name that nothing reads any more."""
    for host in inventory.members("all"):
        for entry in renamed:
            if entry["old"] in inventory.hosts[host]:
                yield (
                    f"{host}: {entry['old']} was renamed on {entry['since']}: call it"
                    f" {entry['new']}."
                )


def inventory_problems(
    hostvars: Mapping[str, Mapping[str, Any]],
    groups: Mapping[str, list[str]],
    sources: list[str],
    renamed: list[dict[str, str]],
) -> list[str]:
    """Return one sentence per problem; the first ones explain the later ones."""
    inventory = Inventory(hostvars, groups, sources)
    return list(contract(inventory)) or [
        *(problem for rule in RULES for problem in rule(inventory)),
        *renamed_variables(inventory, renamed),
    ]


# --- the hosts themselves: what was read on them --------------------------------------------------

DEBIAN = ("12", "13")
ONE_PYTHON = ("dask_scheduler", "dask_worker", "jupyterlab")
EVERY_ADDRESS = ("", "*", "0.0.0.0", "::")


@dataclass(frozen=True)
class Host:
    """A host as the rules see it."""

    name: str
    variables: Mapping[str, Any]

    @property
    def facts(self) -> Mapping[str, Any]:
        """Return what Ansible gathered, nothing if the host was not reached."""
        facts: Mapping[str, Any] = self.variables.get("ansible_facts") or {}
        return facts

    @property
    def address(self) -> str:
        """Return where Ansible looks for the host."""
        return str(self.variables.get("ansible_host") or self.name)

    @property
    def reached(self) -> bool:
        """Return whether facts of the host are known."""
        return "distribution_major_version" in self.facts

    @property
    def shares_python(self) -> bool:
        """Return whether the host's Python must be that of others."""
        return bool(set(ONE_PYTHON) & set(self.variables["group_names"]))

    @property
    def release(self) -> str:
        """Return the Debian release."""
        return str(self.facts["distribution_major_version"])


def unreachable(host: Host) -> Problems:
    """A host that does not answer can be neither checked nor changed."""
    if not (host.variables.get("__validate_facts") or {}).get("unreachable"):
        yield (
            f"{host.name}: ansible_host {host.address} lets us in but tells no facts, as shown"
            " above: install python3 and sudo there, for the account of ansible_user."
        )
        return
    yield f"{host.name}: ansible_host {host.address} cannot be reached: {start(host)}."


def start(host: Host) -> str:
    """Return the remedy for a host that does not answer."""
    return (
        "start the host, or correct its address, account and key in the inventory, until"
        f" `ssh {host.address}` works (`make hosts` for hosts in containers)"
    )


def operating_system(host: Host) -> Problems:
    """The locks and units are made and tested for two Debian releases."""
    name = host.facts.get("distribution")
    if name != "Debian" or host.release not in DEBIAN:
        yield (
            f"{host.name}: ansible_host is {name} {host.release}: name a host with"
            f" Debian {' or '.join(DEBIAN)}, or install one of them there."
        )


def architecture(host: Host) -> Problems:
    """The installer of Python environments is copied from the controller."""
    theirs, ours = host.facts.get("architecture"), platform.machine()
    if theirs != ours:
        yield (
            f"{host.name}: ansible_host has {theirs} processors and this controller {ours}:"
            f" run Ansible on a controller with {theirs}, or name a host with {ours}."
        )


def memory(host: Host) -> Problems:
    """Workers that may use more memory than there is are killed at the worst moment."""
    given = host.variables.get
    limit = parse_memory(given("dask_worker_memory_limit"))
    if "dask_worker" not in host.variables["group_names"] or limit is None:
        return
    threads = int(given("dask_worker_threads") or 1)
    count = int(given("dask_worker_processes") or host.facts["processor_vcpus"] // threads or 1)
    total = int(host.facts["memtotal_mb"]) << 20
    if count * limit > total:
        yield (
            f"{host.name}: dask_worker_memory_limit {given('dask_worker_memory_limit')} x"
            f" {count} dask_worker_processes is more than the host's {total / (1 << 30):.1f} GiB:"
            " lower one of them, or leave the limit out to have it computed."
        )


def overlap(held: str, wanted: str) -> bool:
    """Return whether two listeners on one port get into each other's way."""
    if held in EVERY_ADDRESS or wanted in EVERY_ADDRESS:
        return True
    try:
        return ipaddress.ip_address(held) == ipaddress.ip_address(wanted)
    except ValueError:  # a name: it stands for an address of the network
        return not ipaddress.ip_address(held).is_loopback


def ports(host: Host) -> Problems:
    """A port that a component needs is free, or the component's own unit holds it."""
    found = (host.variables.get("__validate_listeners") or {}).get("listeners", [])
    for wanted in host.variables.get("odsp_listeners", []):
        for held in found:
            if (
                int(wanted["port"]) == held["port"]
                and held["unit"] != f"odsp-{wanted['role']}.service"
                and overlap(held["address"], wanted["address"])
            ):
                holder = held["unit"] or f"{held['program'] or 'a process'} (pid {held['pid']})"
                yield (
                    f"{host.name}: port {held['port']} ({wanted['variable']}) is taken by {holder}:"
                    f" stop it, or give {wanted['role']} another port in {wanted['variable']}."
                )
                break


def ports_apart(host: Host) -> Problems:
    """Two components of one host need two ports."""
    wanted = [entry for entry in host.variables.get("odsp_listeners", []) if int(entry["port"])]
    for one, other in itertools.combinations(wanted, 2):
        addresses = {one["address"], other["address"]}
        if int(one["port"]) == int(other["port"]) and (len(addresses) == 1 or "" in addresses):
            yield (
                f"{host.name}: {one['variable']} and {other['variable']} are both"
                f" {one['port']}: give {other['role']} another port in {other['variable']}."
            )


def own_address(host: Host) -> Problems:
    """Components listen on the address that others use for their host."""
    given = host.variables.get
    address = str(given("odsp_address") or "")
    binds = any(entry["address"] == address for entry in given("odsp_listeners") or [])
    known = (given("__validate_listeners") or {}).get("addresses")
    if known is None or not (binds or "dask_worker" in host.variables["group_names"]):
        return
    if address not in known:
        others = [ip for ip in known if not ipaddress.ip_address(ip).is_loopback]
        yield (
            f"{host.name}: odsp_address is {address}, which is no IP address of this host: set"
            f" odsp_address to the one that other hosts use, of {', '.join(others) or 'none'}."
        )


def one_python(hosts: list[Host]) -> Problems:
    """What is pickled by one Python is unpickled by another only if both are the same."""
    members = [host for host in hosts if host.shares_python]
    releases = sorted({host.release for host in members})
    if len(releases) > 1:
        where = "; ".join(
            f"Debian {release} on {listed([h.name for h in members if h.release == release])}"
            for release in releases
        )
        yield (
            f"{members[0].name}: the hosts of {listed(list(ONE_PYTHON))} have two Pythons, {where}:"
            " name hosts of one Debian release in ansible_host."
        )


HOST_RULES = (operating_system, architecture, memory, own_address, ports_apart, ports)


def scheduler_beyond(
    hostvars: Mapping[str, Mapping[str, Any]], groups: Mapping[str, list[str]], names: list[str]
) -> str:
    """Return the scheduler's host if --limit leaves it out and a named host must match it."""
    for scheduler in groups.get("dask_scheduler", []):
        if scheduler not in names and any(Host(n, hostvars[n]).shares_python for n in names):
            return scheduler
    return ""


def host_problems(
    hostvars: Mapping[str, Mapping[str, Any]], names: list[str], scheduler: str
) -> list[str]:
    """Return one sentence per problem of the named hosts, and of them with a scheduler beyond."""
    hosts = [Host(name, hostvars[name]) for name in names]
    reached = [host for host in hosts if host.reached]
    beyond = [Host(scheduler, hostvars[scheduler])] if scheduler else []
    return [
        *(problem for host in hosts if host not in reached for problem in unreachable(host)),
        *(problem for rule in HOST_RULES for host in reached for problem in rule(host)),
        *(
            f"{host.name}: ansible_host {host.address} cannot be reached, to compare it with the"
            f" Debian release of {listed([h.name for h in hosts if h.shares_python])}:"
            f" {start(host)}."
            for host in beyond
            if not host.reached
        ),
        *one_python([*reached, *(host for host in beyond if host.reached)]),
    ]


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., object]]:
        """Return the filters of this file by name."""
        return {
            "inventory_problems": inventory_problems,
            "scheduler_beyond": scheduler_beyond,
            "host_problems": host_problems,
        }
