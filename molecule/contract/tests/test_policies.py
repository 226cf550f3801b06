"""The repository keeps its policies, and each of them can fail."""

from __future__ import annotations

from pathlib import Path

import policy_names  # noqa: F401 - they register themselves
import policy_roles  # noqa: F401
import policy_scenarios  # noqa: F401
import policy_tree  # noqa: F401
import policy_variables  # noqa: F401
import pytest
from house import POLICIES, ROOT, House
from small_house import INTERNAL, Changes, breaks, build, change


@pytest.fixture(scope="module")
def repository() -> House:
    """Return the repository as it is now."""
    return House(ROOT)


@pytest.mark.parametrize("name", POLICIES)
def test_the_repository_keeps(repository: House, name: str) -> None:
    """Nothing in it goes against the policy."""
    complaints = list(POLICIES[name](repository))
    assert not complaints, "\n".join([str(POLICIES[name].__doc__), *complaints])


def test_a_small_house_keeps_them_all(tmp_path: Path) -> None:
    """No policy refuses what is in order, so that a refusal below has the break for its cause."""
    house = build(tmp_path)
    complaints = {name: list(policy(house)) for name, policy in POLICIES.items()}
    assert {name: found for name, found in complaints.items() if found} == {}


@pytest.mark.parametrize(
    ("name", "words", "changes"), breaks(), ids=[f"{name}: {words}" for name, words, _ in breaks()]
)
def test_a_break_is_noticed(tmp_path: Path, name: str, words: str, changes: Changes) -> None:
    """What is wrong is named."""
    build(tmp_path)
    change(tmp_path, changes)
    complaints = list(POLICIES[name](House(tmp_path, INTERNAL)))
    assert any(words in complaint for complaint in complaints), complaints


def test_every_policy_can_fail() -> None:
    """Each has a break that it notices."""
    assert {name for name, _, _ in breaks()} == POLICIES.keys()
