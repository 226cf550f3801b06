"""One name per thing: group = role = prefix = unit = scenario = play = line of the README."""

from __future__ import annotations

import re

import pytest
import yaml
from house import (
    INTERNAL,
    PUBLIC,
    ROLES,
    ROOT,
    below,
    defaults,
    load,
    name_of,
    plays,
    some,
    tasks,
    tracked,
)


def folders(parent: str, marker: str) -> set[str]:
    """Return the folders of `parent` that hold the file `marker`."""
    return {
        file.relative_to(ROOT / parent).parts[0]
        for file in below(parent)
        if name_of(file) == f"{parent}/{file.relative_to(ROOT / parent).parts[0]}/{marker}"
    }


def test_every_group_has_its_role() -> None:
    """The contract's groups and the roles that are no internal ones are the same."""
    assert folders("roles", "meta/main.yml") == set(ROLES)


def test_every_group_has_its_scenario() -> None:
    """Every component is tested alone, under its own name."""
    assert folders("molecule", "molecule.yml") == set(PUBLIC)


@pytest.mark.parametrize("role", PUBLIC)
def test_scenario_has_tests(role: str) -> None:
    """A scenario asks something of its role."""
    assert (ROOT / f"molecule/{role}/tests/test_{role}.py") in tracked()


def test_every_group_has_its_play() -> None:
    """Every component is installed by exactly one play, on the hosts of its group."""
    layers = [play for _, play in plays() if play["hosts"] != "all"]
    assert sorted(play["hosts"] for play in layers) == sorted(PUBLIC)
    for play in layers:
        (entry,) = play["roles"]
        assert entry == {"role": play["hosts"], "tags": [play["hosts"]]}


def test_layers_hold_nothing_but_plays_of_one_role() -> None:
    """A layer stops everywhere at the first error and decides nothing itself."""
    for file, play in plays():
        where = f"{name_of(file)}: {play['name']}"
        assert play.get("any_errors_fatal") is True, where
        assert play.get("become") is True, where
        assert not {"tasks", "pre_tasks", "post_tasks", "handlers", "when"} & play.keys(), where


def test_every_layer_is_in_the_table_of_contents() -> None:
    """`site.yml` runs every layer once."""
    contents = [e["ansible.builtin.import_playbook"] for e in load(ROOT / "playbooks/site.yml")]
    layers = {file.name for file, _ in plays()}
    assert len(contents) == len(set(contents))
    assert layers <= set(contents)


@pytest.mark.parametrize("role", PUBLIC)
def test_unit_carries_the_name(role: str) -> None:
    """A component's unit is called odsp-<role>.service."""
    texts = "\n".join(file.read_text() for file in below("roles", role, suffix=".yml"))
    names = set(re.findall(r"python_service_name: *\"?([a-z_{} ]+)", texts))
    units = set(re.findall(r"\bodsp-([a-z_]+)\.service\b", texts))
    assert role in {name.strip() for name in names} | units


@pytest.mark.parametrize("role", PUBLIC)
def test_readme_names_it(role: str) -> None:
    """The README's table tells what a host in the group gets."""
    rows = some(re.findall(r"^\|.*\|$", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert any(f"`{role}`" in row for row in rows)


@pytest.mark.parametrize("role", ROLES)
def test_variables_carry_the_prefix(role: str) -> None:
    """A variable says whose it is; one that nobody may turn begins with two underscores."""
    assert all(name.startswith(f"{role}_") for name in defaults(role))
    private = ROOT / "roles" / role / "vars/main.yml"
    if private.exists():
        assert all(name.startswith(f"__{role}_") for name in load(private))


def test_wiring_sets_only_its_own_prefix() -> None:
    """A wiring file speaks for one role, every other file of the contract for the platform."""
    for file in below("inventories/common/group_vars/all", suffix=".yml"):
        prefixes = (f"{file.stem}_",) if file.stem in ROLES else (f"{file.stem}_", "odsp_")
        assert [n for n in load(file) if not n.startswith(prefixes)] == [], name_of(file)


def test_contract_holds_no_host() -> None:
    """`inventories/common` says what may exist, never where."""
    assert not any(load(ROOT / "inventories/common/groups.yml").values())


def test_no_host_is_called_like_a_group() -> None:
    """A host that shares its name with a group would make the inventory ambiguous."""
    for file in some(f for f in tracked() if f.match("inventories/*/hosts.yml")):
        tree = load(file)
        groups = {**tree, **(tree.get("all") or {}).get("children", {})}
        hosts = {host for group in groups.values() for host in (group or {}).get("hosts") or {}}
        assert hosts.isdisjoint({*PUBLIC, *INTERNAL}), name_of(file)
        assert groups.keys() <= {"all", *PUBLIC}, name_of(file)


def test_the_cluster_example_shows_every_knob() -> None:
    """What a site may set stands in `inventories/cluster`; if commented out, at its default."""
    contract = {
        name: value
        for file in below("inventories/common/group_vars/all", suffix=".yml")
        for name, value in load(file).items()
    }
    # Components give these to the roles they build on; python_service knows no other callers.
    given = {name for role in ROLES for _, task in tasks(role) for name in task.get("vars", {})}
    knobs = {
        name: value
        for role in ROLES
        if role != "python_service"
        for name, value in defaults(role).items()
        if name not in contract and not (role in INTERNAL and name in given)
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
    del knobs["odsp_inventory_contract"]

    text = "\n".join(file.read_text() for file in below("inventories/cluster", suffix=".yml"))
    shown = set(re.findall(r"(?:^ *(?:# )?|[{,] ?)(\w+):", text, re.MULTILINE))
    assert sorted({*knobs, "odsp_users"} - shown) == []
    for line in some(re.findall(r"^ *# ([a-z]+_[a-z0-9_]+: .+)$", text, re.MULTILINE)):
        ((name, value),) = yaml.safe_load(line).items()
        assert name in knobs, f"{name} is no knob"
        assert value == knobs[name], f"{name} is {knobs[name]!r} by default"
