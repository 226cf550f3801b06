"""What the repository may hold: every byte proven, no secret, no private place."""

from __future__ import annotations

import ast
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from house import House, mappings, policy, some

REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[a-z,]+\])?(==[^\s;#]+)?", re.MULTILINE)
PINNED = re.compile(r"^[ \"]*([a-z_-]+)(?:\[[a-z,]+\])?==([\w.]+)", re.MULTILINE)
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
SECRET_NAME = re.compile(
    r"(?i)(?:^|[_-])(?:pass(?:word|phrase|wd)|secret|token|(?:secret_access|secret|private|api)_?key)s?$"
)
#: Forms of secrets that need no name.
SECRET_FORMS = re.compile(
    r"-----BEGIN (?:\w+ )?PRIVATE KEY-----\n[A-Za-z0-9+/]{40}"
    r"|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_\w{36}|\bglpat-[\w-]{20}|\bxox[abp]-[\w-]{10}"
    r"|\$2[aby]\$\d\d\$[./\w]{53}|\$[156y]\$[./\w]+\$[./\w]{20}|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\."
)
ASSIGNED = re.compile(r"""(?m)([\w-]+)["']?\s*[:=]\s*["']?([^\s"'`,;<>{}()$]{8,})["']?""")
#: How every secret of a test begins.
INNOCENT = "not-a-secret"

#: What may only be done as the words behind it say, within a few lines.
DOWNLOADS = {
    r"\bpip['\",\s]+(?:install|sync|download)\b": "--require-hashes",
    r"[\"'](?:curl|wget)[\"'\s]": r"sha256sum\s.*(?:-c|--check)\b",
    # Nothing makes the next ones safe.
    r"\buv['\",\s]+(?:add|run|tool|python)\b|\b(?:uvx|pipx|easy_install|npx|ansible-galaxy)\b": "",
    r"\b(?:npm|gem|cargo)['\",\s]+(?:install|add|update)\b": "",
    r"\bgo['\",\s)]+(?:get|install)\b|-mod=mod\b|\bGO(?:NOSUMDB|NOSUMCHECK|INSECURE)\b": "",
    r"\bGOSUMDB\W+off\b|--(?:trusted-host|allow-unauthenticated|no-check-certificate)\b": "",
    r"\b(?:podman|docker)['\",\s]+pull\b|^FROM\s": r"@sha256:[0-9a-f]{64}",
}
#: Python only mentions a command that is not quoted.
SHELL_DOWNLOADS = {r"(?:^|[|;&(])\s*(?:curl|wget)\s": r"sha256sum\s.*(?:-c|--check)\b"}
#: What a command says, it says within so many lines.
NEAR = 4


def locks(house: House) -> list[Path]:
    """Return the files that pip or uv install from."""
    texts = house.below("", ".txt")
    return some(f for f in texts if f.name == "requirements.txt" or "--hash=" in house.text(f))


@policy
def locks_prove_every_byte(house: House) -> Iterator[str]:
    """Each requirement is one version with hashes, and no line says where it comes from."""
    for lock in locks(house):
        text = re.sub(r"^#.*\n", "", house.text(lock), flags=re.MULTILINE).strip()
        if "://" in text:
            yield f"{house.name(lock)} names a place"
        for entry in some(re.split(r"\n(?=\S)", text)):
            if not re.match(r"[a-z0-9._-]+(\[[a-z,]+\])?==[^ ]+", entry):
                yield f"{house.name(lock)}: no version: {entry.splitlines()[0]}"
            elif "--hash=sha256:" not in entry:
                yield f"{house.name(lock)}: no hash: {entry.splitlines()[0]}"


@policy
def locks_hold_what_was_asked_for(house: House) -> Iterator[str]:
    """Every requirement of an .in file is in the lock made from it, at the version it names."""
    for asked in some(f for f in house.below("", ".in") if f.with_suffix(".txt") in house.files):
        lock = house.text(asked.with_suffix(".txt"))
        for name, version in REQUIREMENT.findall(house.text(asked)):
            normal = re.sub(r"[-_.]+", "-", name).lower() + (version or "==")
            if name[0] != "-" and not re.search(rf"^{re.escape(normal)}", lock, re.MULTILINE):
                yield f"{house.name(asked)}: the lock lacks {name}{version}"


@policy
def what_is_ours_is_pinned(house: House) -> Iterator[str]:
    """What gives a role its name is of one version, chosen by hand; our own package needs none."""
    chosen: dict[str, str] = {"ansible": ""}
    for role in house.public:
        text = house.text(f"roles/{role}/files/requirements.in")
        name = role.split("_", maxsplit=1)[0]
        ours = not text or (house.root / role).exists()
        if not ours and name not in {pinned for pinned, _ in PINNED.findall(text)}:
            yield f"roles/{role}/files/requirements.in does not pin {name}"
    # The same program is of the same version wherever it is named.
    for asked in [*house.below("", ".in"), *house.below("", "pyproject.toml")]:
        for name, version in PINNED.findall(house.text(asked)):
            if chosen.setdefault(name, version) not in {"", version}:
                yield f"{house.name(asked)}: {name} is {version} here, {chosen[name]} elsewhere"
            chosen[name] = version
    if not chosen["ansible"]:
        yield "no .in file pins ansible"


@policy
def our_package_is_locked(house: House) -> Iterator[str]:
    """The lock of a component that is our own is made from its package's dependencies."""
    for role in house.public:
        package = house.text(f"{role}/pyproject.toml")
        if package:
            (listed,) = re.findall(
                r"^dependencies = \[\n(.*?)^\]", package, re.MULTILINE | re.DOTALL
            )
            asked = house.text(f"roles/{role}/files/requirements.in").splitlines()
            wanted = {line for line in asked if line and not line.startswith("#")}
            for line in sorted(wanted ^ set(re.findall(r'"(.+)"', listed))):
                yield f"roles/{role}/files/requirements.in and {role}/pyproject.toml: {line}"


@policy
def compute_has_one_lock(house: House) -> Iterator[str]:
    """What a task is pickled with, it is unpickled with: all of Dask's peers share one file."""
    peers = [
        f for f in house.below("roles", ".txt") if re.search(r"(?m)^distributed==", house.text(f))
    ]
    if len({os.path.realpath(lock) for lock in peers}) > 1:
        yield f"{', '.join(house.name(lock) for lock in peers)} are more than one lock"


def scripts(house: House) -> list[Path]:
    """Return what runs commands: playbooks, roles, programs; not the tests' own clients."""
    kinds = (".yml", ".py", ".sh", ".sh.j2", "Makefile", "Dockerfile", "Containerfile", "/run")
    apart = {"tests", "wiring", "docs", "inventories", "model_server"}
    names = ((file, f"/{house.name(file)}") for file in house.files)
    known = ((file, name) for file, name in names if name.endswith(kinds))
    return [file for file, name in known if not apart & set(name.split("/")[:-1])]


@policy
def commands_download_nothing_unproven(house: House) -> Iterator[str]:
    """A program that fetches something knows its digest beforehand.

    Debian's packages are the exception by design: apt checks the archive's signature, and whatever
    Debian has repaired since is wanted. (What a model asks for is its author's: model_server/.)
    """
    for file in some(scripts(house)):
        lines = [re.sub(r"^\s*#.*", "", line) for line in house.text(file).splitlines()]
        for number, line in enumerate(lines):
            near = "\n".join(lines[max(0, number - NEAR) : number + NEAR + 1])
            for wild, tame in (
                DOWNLOADS | ({} if file.suffix == ".py" else SHELL_DOWNLOADS)
            ).items():
                if re.search(wild, line) and not (tame and re.search(tame, near)):
                    yield f"{house.name(file)}:{number + 1}: {line.strip()}"
        text = "\n".join(lines)
        fetches = re.search(r"\burl(?:open|retrieve)\(|\brequests\.get\(", text)
        keeps = re.search(r"\bcopyfileobj\(|\burlretrieve\(|\.write_(?:bytes|text)\(", text)
        if file.suffix == ".py" and fetches and keeps and "sha256" not in text:
            yield f"{house.name(file)} keeps what it fetches without asking for its digest"


def unproven(module: str, given: dict[str, Any]) -> bool:
    """Tell whether a task's module may bring something that nobody has proven."""
    match module.rsplit(".", maxsplit=1)[-1]:
        case "get_url":
            return not re.match(r"sha(256|384|512):", str(given.get("checksum", "")))
        case "uri":
            return "dest" in given
        case "unarchive":
            return "://" in str(given.get("src", "")) or bool(given.get("remote_src"))
        case "git":
            return not re.fullmatch(r"[0-9a-f]{40}", str(given.get("version", "")))
        case "apt" | "package":
            return (
                "://" in str(given.get("deb", ""))
                or bool(given.get("allow_unauthenticated"))
                or given.get("state") == "latest"
            )
        case "podman_container" | "docker_container":
            return not re.match(r"localhost/|\{\{|.*@sha256:", str(given.get("image", "")))
        case name:
            # Archives other than Debian's own; pip and its like: uv installs from locks.
            return name in {
                "apt_key", "apt_repository", "deb822_repository", "pip", "npm", "gem",
                "podman_image", "docker_image",
            }  # fmt: skip


@policy
def tasks_download_nothing_unproven(house: House) -> Iterator[str]:
    """A task that fetches something names its digest; Debian's packages are signed, see above."""
    for file in some(f for f in scripts(house) if f.suffix == ".yml"):
        for task in mappings(house.load(file)):
            for module, given in task.items():
                if isinstance(given, dict) and unproven(str(module), given):
                    yield f"{house.name(file)}: {task.get('name')}: {module}"


@policy
def versions_are_numbers(house: House) -> Iterator[str]:
    """No variable asks for whatever is the newest on the day."""
    for role in house.roles:
        for name, value in house.defaults(role).items():
            exact = re.search(r"\d|\{\{", str(value)) and "latest" not in str(value)
            if re.search(r"_(version|release|tag|image)$", name) and not exact:
                yield f"roles/{role}: {name} is {value!r}"


@policy
def no_registry_is_named(house: House) -> Iterator[str]:
    """Which registries a machine may reach is its own configuration."""
    for file in house.files:
        text = house.text(file)
        for host in (host for host in REGISTRIES if host in text):
            if re.search(rf"(?<![\w.-]){re.escape(host)}\b", text):
                yield f"{house.name(file)}: {host}"


@policy
def no_private_path_is_named(house: House) -> Iterator[str]:
    """No file knows where its author worked."""
    private = re.compile(r"(?<![\w.])/(work|tmp/b)/|/home/(?!debian|\{|<|\$)[a-z]+/|/Users/")
    for file in house.files:
        if private.search(house.text(file).replace(private.pattern, "")):
            yield house.name(file)


def looks_random(text: str) -> bool:
    """Tell whether a text has the letters of a secret: many different ones, of several kinds."""
    if len(text) < 12 or not re.search(r"\d", text) or not re.search(r"[A-Za-z]", text):
        return False
    count = Counter(text)
    return -sum(n / len(text) * math.log2(n / len(text)) for n in count.values()) > 3


def said(house: House, file: Path) -> Iterator[tuple[str, str, bool]]:
    """Return what a file assigns: name, text, and whether nothing but a secret is plausible."""
    text = house.text(file)
    if file.suffix in {".yml", ".yaml"} and not text.startswith("$ANSIBLE_VAULT"):
        # Where inventories and roles are read, a text below such a name is the secret itself.
        kept = file.name not in {"argument_specs.yml", "secrets.yml"}
        for found in mappings(house.load(file)):
            for name, value in found.items():
                if isinstance(value, str):
                    yield str(name), value, kept
    elif file.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            pairs: list[tuple[Any, Any]] = []
            if isinstance(node, ast.Assign):
                pairs = [(ast.unparse(target), node.value) for target in node.targets]
            elif isinstance(node, ast.AnnAssign):
                pairs = [(ast.unparse(node.target), node.value)]
            elif isinstance(node, ast.Dict):
                keys = (getattr(key, "value", "") for key in node.keys)
                pairs = list(zip(keys, node.values, strict=True))
            elif isinstance(node, ast.Call):
                pairs = [(keyword.arg or "", keyword.value) for keyword in node.keywords]
            for name, value in pairs:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield str(name), value.value, False
    elif "--hash=" not in text and file.name != "go.sum":  # which hold nothing but digests
        yield from ((name, value, False) for name, value in ASSIGNED.findall(text))


@policy
def no_secret_is_kept(house: House) -> Iterator[str]:
    """A secret in the tree is everybody's; those of tests say what they are, `not-a-secret…`."""
    for file in house.files:
        if SECRET_FORMS.search(house.text(file)):
            yield f"{house.name(file)} holds what looks like a key or a password's hash"
        if file.name == "vault.yml" and not house.text(file).startswith("$ANSIBLE_VAULT"):
            yield f"{house.name(file)} is not encrypted"
        for name, value, plausible in said(house, file):
            free = not value or INNOCENT in value or "{{" in value or value.startswith("/")
            if SECRET_NAME.search(name) and not free and (plausible or looks_random(value)):
                yield f"{house.name(file)}: {name}"


@policy
def shell_programs_stop_at_the_first_error(house: House) -> Iterator[str]:
    """A script that goes on after an error proves nothing."""
    for file in some([*house.below("", ".sh", ".sh.j2"), *house.below(".ci", "run")]):
        if not re.search(r"^set -eu", house.text(file), re.MULTILINE):
            yield house.name(file)


@policy
def every_yaml_file_begins_like_one(house: House) -> Iterator[str]:
    """`---` first."""
    for file in some(house.below("", ".yml", ".yaml")):
        if not house.text(file).startswith(("---\n", "$ANSIBLE_VAULT")):
            yield house.name(file)


@policy
def packages_run_on_the_older_release(house: House) -> Iterator[str]:
    """Debian 12 has Python 3.11."""
    for file in house.below("", "pyproject.toml"):
        if 'requires-python = ">=3.11"' not in house.text(file):
            yield house.name(file)
