"""What an inventory that changes brings and takes away; the tests build on each other."""

from __future__ import annotations

import os

import pytest
import scenario
import test_wiring
from test_wiring import Store
from topology import Platform

#: Asked of the partial platform alone: elsewhere there is nothing to add.
__test__ = os.environ.get("MOLECULE_SCENARIO_NAME") == "platform_partial"

platform = test_wiring.platform
HOST = "edge-1"
PAGE = {"Bucket": "jupyterlab", "Key": "odsp-test/page", "Body": b"of the user"}


@pytest.fixture(scope="module")
def larger(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Platform:
    """Return the platform with notebooks."""
    groups = {**platform.topology.groups, "jupyterlab": [HOST]}
    return platform.changed(groups, tmp_path_factory.mktemp("larger"))


@pytest.fixture(scope="module")
def smaller(larger: Platform, tmp_path_factory: pytest.TempPathFactory) -> Platform:
    """Return the platform that had notebooks and a model server."""
    groups = dict(larger.topology.groups)
    del groups["jupyterlab"], groups["model_server"]
    return larger.changed(groups, tmp_path_factory.mktemp("smaller"))


def units(platform: Platform) -> dict[str, str]:
    """Return all units of the platform, each with what names its present run."""
    hosts = platform.topology.hosts
    return {f"{h} {u}": run for h in hosts for u, run in scenario.units(platform.on(h)).items()}


def agree(platform: Platform) -> None:
    """The hosts are as the inventory says."""
    for question in test_wiring.QUESTIONS:
        question(platform)


def test_a_component_without_its_secret_is_refused(larger: Platform) -> None:
    """One sentence names host, secret and remedy, and nothing has changed."""
    before = units(larger)
    run = larger.play("site.yml")
    assert run.returncode
    assert f"{HOST} (jupyterlab): vault_jupyterlab_s3_secret_key is missing: run" in run.stdout
    assert not any(counts["changed"] for counts in scenario.recap(run).values())
    assert units(larger) == before


def test_a_component_that_is_added_appears(larger: Platform) -> None:
    """With all it needs of others, and without disturbing them."""
    made = larger.play("ops/generate_secrets.yml")
    assert made.returncode == 0, made.stdout[-3000:]
    before = units(larger)
    run = larger.play("site.yml")
    assert run.returncode == 0, run.stdout[-3000:]
    assert scenario.restarted(before, units(larger)) == {f"{HOST} odsp-jupyterlab.service"}
    agree(larger)


def test_a_component_that_leaves_takes_its_access_along(
    larger: Platform, smaller: Platform
) -> None:
    """Its route, tile, account and login are gone with it; its data is there."""
    known = larger.secrets
    jupyterlab = Store(larger, "jupyterlab", known["vault_jupyterlab_s3_secret_key"])
    jupyterlab.s3.put_object(**PAGE)
    before = units(smaller)
    run = smaller.play("site.yml")
    assert run.returncode == 0, run.stdout[-3000:]
    assert scenario.restarted(before, units(smaller)) == set()
    agree(smaller)
    assert jupyterlab.says("jupyterlab") == "InvalidAccessKeyId"
    root = Store(smaller, "odsp", known["vault_minio_root_password"])
    page = root.s3.get_object(Bucket=PAGE["Bucket"], Key=PAGE["Key"])
    assert page["Body"].read() == PAGE["Body"]


@pytest.mark.long
def test_a_component_that_comes_back_finds_its_data(larger: Platform) -> None:
    """The former inventory makes the former platform, in one run."""
    run = larger.play("site.yml")
    assert run.returncode == 0, run.stdout[-3000:]
    agree(larger)
    again = larger.play("site.yml", "--check")
    assert not any(counts["changed"] for counts in scenario.recap(again).values()), again.stdout
    known = larger.secrets
    jupyterlab = Store(larger, "jupyterlab", known["vault_jupyterlab_s3_secret_key"])
    page = jupyterlab.s3.get_object(Bucket=PAGE["Bucket"], Key=PAGE["Key"])
    assert page["Body"].read() == PAGE["Body"]
