"""The verdict of playbooks/verify.yml: the cause comes first, with the unit and host behind it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
GROUPS = {
    "postgres": ["core-1"],
    "mlflow": ["core-1"],
    "dask_worker": ["compute-1", "compute-2"],
    "nginx": ["edge-1"],
}
STEPS = [{"name": "the door serves", "role": "nginx", "host": "localhost", "register": "__door"}]


@pytest.fixture(scope="module")
def proof() -> ModuleType:
    """Return the filters of the verdict."""
    spec = importlib.util.spec_from_file_location(
        "proof", ROOT / "playbooks/filter_plugins/proof.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answered(**holds: bool) -> dict[str, Any]:
    """Return what a host's visit found: whether each component answers."""
    links = [
        {"name": f"{role} answers", "role": role, "behind": [role], "ok": ok, "ms": 1, "detail": ""}
        for role, ok in holds.items()
    ]
    return {"__verify_answers": {"links": links, "started": "2026-01-01T00:00:00+00:00"}}


def behind(**states: str) -> dict[str, Any]:
    """Return what was seen behind a broken link."""
    units = {f"odsp-{r}.service": {"state": s, "journal": f"{r} said"} for r, s in states.items()}
    return {"__verify_behind": {"facts": {"units": units}}}


@pytest.fixture
def hostvars() -> dict[str, dict[str, Any]]:
    """Return a platform on which everything answers."""
    return {
        "core-1": answered(mlflow=True, postgres=True),
        "compute-1": answered(dask_worker=True),
        "compute-2": answered(dask_worker=True),
        "edge-1": answered(nginx=True),
        "localhost": {},
    }


def verdict(proof: ModuleType, hostvars: dict[str, Any]) -> dict[str, Any]:
    """Return the verdict on a platform."""
    links = proof.proof_links(hostvars, GROUPS, STEPS)
    given: dict[str, Any] = proof.proof_verdict(hostvars, GROUPS, links, "test")
    return given


def test_a_whole_platform_has_no_failure(proof: ModuleType, hostvars: dict[str, Any]) -> None:
    """Every component of the inventory has its link, in order of dependency, and no other."""
    given = verdict(proof, hostvars)
    assert given["ok"] is True
    assert given["failure"] is None
    assert [(link["name"].split()[0], link["host"]) for link in given["links"]] == [
        ("postgres", "core-1"),
        ("mlflow", "core-1"),
        ("dask_worker", "compute-1"),
        ("dask_worker", "compute-2"),
        ("nginx", "edge-1"),
    ]


def test_a_stopped_unit_is_named_before_its_consumer(
    proof: ModuleType, hostvars: dict[str, Any]
) -> None:
    """When database and tracking both fail, the database is the cause."""
    hostvars["core-1"] = answered(mlflow=False, postgres=False) | behind(postgres="inactive")
    failure = verdict(proof, hostvars)["failure"]
    assert (failure["unit"], failure["host"]) == ("odsp-postgres.service", "core-1")
    assert failure["journal"] == "postgres said"
    assert "systemctl start odsp-postgres.service" in failure["message"]


def test_one_of_several_workers_is_named_by_its_host(
    proof: ModuleType, hostvars: dict[str, Any]
) -> None:
    """A worker host that is broken is told from one that is not."""
    hostvars["compute-1"] |= behind(dask_worker="active")
    hostvars["compute-2"] = answered(dask_worker=False) | behind(dask_worker="failed")
    failure = verdict(proof, hostvars)["failure"]
    assert (failure["unit"], failure["host"]) == ("odsp-dask_worker.service", "compute-2")


def test_an_unreachable_host_is_named_by_its_first_component(
    proof: ModuleType, hostvars: dict[str, Any]
) -> None:
    """A host that cannot be asked is out of reach, not well."""
    hostvars["core-1"] = {"__verify_answers": {"unreachable": True}}
    given = verdict(proof, hostvars)
    assert [link["ok"] for link in given["links"][:2]] == [False, False]
    assert given["failure"]["state"] == "out of reach"
    assert "start the host core-1" in given["failure"]["message"]


def test_a_later_link_is_traced_to_the_unit_that_died(
    proof: ModuleType, hostvars: dict[str, Any]
) -> None:
    """A request that fails at the door is the database's fault if that is what has stopped."""
    link = {"name": "the door loads", "role": "nginx", "ok": False, "ms": 7, "detail": "503"}
    hostvars["localhost"]["__door"] = {"links": [link | {"behind": ["postgres", "nginx"]}]}
    hostvars["core-1"] |= behind(postgres="failed")
    hostvars["edge-1"] |= behind(nginx="active")
    given = verdict(proof, hostvars)
    assert given["failure"]["unit"] == "odsp-postgres.service"
    assert proof.proof_suspects(
        given["links"][-1] | {"behind": ["postgres", "nginx"], "role": "nginx"}, GROUPS
    ) == {
        "core-1": ["odsp-postgres.service"],
        "edge-1": ["odsp-nginx.service"],
    }
    table = proof.proof_table(given)
    assert "BROKEN the door loads" in table
    assert "postgres said" in table


def test_a_program_that_could_not_run_is_a_broken_link(
    proof: ModuleType, hostvars: dict[str, Any]
) -> None:
    """A module that failed says so in the verdict."""
    hostvars["localhost"]["__door"] = {"failed": True, "msg": "no Python"}
    given = verdict(proof, hostvars)
    assert given["ok"] is False
    assert given["links"][-1]["detail"] == "no Python"
