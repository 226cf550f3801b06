"""One name per thing: group = role = prefix = unit = scenario = play = line of the README."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import yaml
from house import WIRING, House, mappings, policy, some

#: Scenarios that are topologies of the whole platform; they share their tests.
TOPOLOGY = "platform_"


@policy
def every_group_has_its_role(house: House) -> Iterator[str]:
    """The contract's groups and the roles that are no internal ones are the same."""
    found = {file.parents[1].name for file in house.below("roles", "meta/main.yml")}
    found |= {file.relative_to(house.root / "roles").parts[0] for file in house.below("roles")}
    for name in sorted(found ^ set(house.roles)):
        yield f"{name} is {'a role but no group' if name in found else 'no role'}"


@policy
def every_role_has_its_scenario(house: House) -> Iterator[str]:
    """Every role is tested alone under its own name; all else is a topology of the platform."""
    alone = {name for name in house.scenarios() if not name.startswith(TOPOLOGY)}
    for name in sorted(alone ^ set(house.roles)):
        yield f"molecule/{name} {'tests no role' if name in alone else 'has no molecule.yml'}"
    for role in house.roles:
        for part in (f"tests/test_{role}.py", "mutations.yml"):
            if house.root / f"molecule/{role}/{part}" not in house.files:
                yield f"molecule/{role} has no {part}"


@policy
def topologies_share_their_tests(house: House) -> Iterator[str]:
    """A topology of the platform says where hosts are; the questions are the same for all."""
    for name in house.scenarios():
        if not name.startswith(TOPOLOGY):
            continue
        folder = house.root / "molecule" / name
        for file in house.below(f"molecule/{name}"):
            if file.name != "molecule.yml":
                yield f"{house.name(file)} belongs below molecule/platform"
        said = house.load(folder / "molecule.yml").get("verifier", {}).get("directory", "tests")
        shared = (folder / said).resolve()
        if not shared.is_relative_to(house.root / "molecule/platform"):
            yield f"molecule/{name} takes its tests from {said}"
        elif not any(shared.glob("test_*.py")):
            yield f"molecule/{name} has no tests in {said}"


@policy
def every_group_has_its_play(house: House) -> Iterator[str]:
    """Every component is installed by exactly one play, on the hosts of its group."""
    layers = [play for _, play in house.plays() if play["hosts"] != "all"]
    if sorted(play["hosts"] for play in layers) != sorted(house.public):
        yield "the layers' plays are not one for each group"
    for play in layers:
        if play["roles"] != [{"role": play["hosts"], "tags": [play["hosts"]]}]:
            yield f"the play of {play['hosts']} does not run the role of that name under its tag"


@policy
def layers_hold_nothing_but_plays_of_one_role(house: House) -> Iterator[str]:
    """A layer stops everywhere at the first error and decides nothing itself."""
    for file, play in house.plays():
        more = {"tasks", "pre_tasks", "post_tasks", "handlers", "when"} & play.keys()
        if more or not (play.get("any_errors_fatal") is True and play.get("become") is True):
            yield f"{house.name(file)}: {play['name']}: {', '.join(more) or 'lacks its settings'}"


@policy
def every_layer_is_in_the_table_of_contents(house: House) -> Iterator[str]:
    """`site.yml` runs every layer once."""
    site = house.load("playbooks/site.yml")
    contents = [entry["ansible.builtin.import_playbook"] for entry in site]
    for layer in {file.name for file, _ in house.plays()} | set(contents):
        if contents.count(layer) != 1:
            yield f"playbooks/site.yml has {layer} {contents.count(layer)} times"


@policy
def every_list_of_components_is_whole(house: House) -> Iterator[str]:
    """Where nearly all components are listed, none has been forgotten."""
    lists: list[tuple[str, set[str]]] = []
    for file in [*house.below("playbooks", ".py"), *house.below("molecule", "run.py")]:
        for node in ast.walk(ast.parse(house.text(file))):
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                words = {str(e.value) for e in node.elts if isinstance(e, ast.Constant)}
                lists.append((house.name(file), words))
    for file in [*house.below("playbooks", ".yml"), *house.below("molecule/_shared", ".yml")]:
        values = (v for found in mappings(house.load(file)) for v in found.values())
        lists += [(house.name(file), {str(e) for e in v}) for v in values if isinstance(v, list)]
    for where, words in lists:
        lacks = set(house.public) - words
        if 0 < len(lacks) <= len(house.public) / 4:
            yield f"{where}: a list of components lacks {', '.join(sorted(lacks))}"


@policy
def unit_carries_the_name(house: House) -> Iterator[str]:
    """A component's unit is called odsp-<role>.service."""
    for role in house.public:
        texts = "\n".join(house.text(file) for file in house.below(f"roles/{role}", ".yml"))
        names = set(re.findall(r"python_service_name: *\"?([a-z_{} ]+)", texts))
        units = set(re.findall(r"\bodsp-([a-z_]+)\.service\b", texts))
        if role not in {name.strip() for name in names} | units:
            yield f"{role} has no odsp-{role}.service"


@policy
def readme_names_every_component(house: House) -> Iterator[str]:
    """The README's table tells what a host in the group gets."""
    rows = some(re.findall(r"^\|.*\|$", house.text("README.md"), re.MULTILINE))
    for role in house.public:
        if not any(f"`{role}`" in row for row in rows):
            yield f"README.md: no row names `{role}`"


@policy
def variables_carry_the_prefix(house: House) -> Iterator[str]:
    """A variable says whose it is; one that nobody may turn begins with two underscores."""
    for role in house.roles:
        for file, prefix in (("defaults", f"{role}_"), ("vars", f"__{role}_")):
            for name in house.load(f"roles/{role}/{file}/main.yml") or {}:
                if not name.startswith(prefix):
                    yield f"roles/{role}/{file}/main.yml: {name} does not begin with {prefix}"


@policy
def wiring_sets_only_its_own_prefix(house: House) -> Iterator[str]:
    """A wiring file speaks for one role, every other file of the contract for the platform."""
    for file in some(house.below(WIRING, ".yml")):
        prefixes = (f"{file.stem}_",) if file.stem in house.roles else (f"{file.stem}_", "odsp_")
        for name in house.load(file):
            if not name.startswith(prefixes):
                yield f"{house.name(file)}: {name} begins with none of {', '.join(prefixes)}"


@policy
def contract_holds_no_host(house: House) -> Iterator[str]:
    """`inventories/common` says what may exist, never where."""
    for group, content in house.load("inventories/common/groups.yml").items():
        if content:
            yield f"inventories/common/groups.yml: {group} is not empty"


@policy
def no_host_is_called_like_a_group(house: House) -> Iterator[str]:
    """A host that shares its name with a group would make the inventory ambiguous."""
    for file in some(f for f in house.files if f.match("inventories/*/hosts.yml")):
        tree = house.load(file)
        groups = {**tree, **(tree.get("all") or {}).get("children", {})}
        hosts = {host for group in groups.values() for host in (group or {}).get("hosts") or {}}
        for name in sorted(hosts & set(house.roles)):
            yield f"{house.name(file)}: the host {name} is called like a role"
        for name in sorted(groups.keys() - {"all", *house.public}):
            yield f"{house.name(file)}: {name} is no group of the contract"


@policy
def the_cluster_example_shows_every_knob(house: House) -> Iterator[str]:
    """What a site may set stands in `inventories/cluster`; if commented out, at its default."""
    contract = {n: v for file in house.below(WIRING, ".yml") for n, v in house.load(file).items()}
    # Components give these to the roles they build on; python_service knows no other callers.
    given = {
        n for role in house.roles for _, task in house.tasks(role) for n in task.get("vars", {})
    }
    knobs = {
        name: value
        for role in house.roles
        if role != "python_service"
        for name, value in house.defaults(role).items()
        if name not in contract and not (role in house.internal and name in given)
    }
    # The rest of the contract is derived: it has expressions for values.
    meant = ("odsp_address", "odsp_door_host", "odsp_vault_file")
    knobs |= {
        name: value
        for name, value in contract.items()
        if name.endswith("_extra")
        or name in meant
        or (name.startswith("odsp_") and not isinstance(value, dict) and "{{" not in str(value))
    }
    knobs.pop("odsp_inventory_contract", None)

    text = "\n".join(house.text(file) for file in some(house.below("inventories/cluster", ".yml")))
    shown = set(re.findall(r"(?:^ *(?:# )?|[{,] ?)(\w+):", text, re.MULTILINE))
    for name in sorted({*knobs, "odsp_users"} - shown):
        yield f"inventories/cluster does not show {name}"
    for line in some(re.findall(r"^ *# ([a-z]+_[a-z0-9_]+: .+)$", text, re.MULTILINE)):
        ((name, value),) = yaml.safe_load(line).items()
        if name not in knobs:
            yield f"inventories/cluster: {name} is no knob"
        elif value != knobs[name]:
            yield f"inventories/cluster: {name} is {knobs[name]!r} by default, not {value!r}"
