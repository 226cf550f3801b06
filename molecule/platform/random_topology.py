"""Writes the scenario platform_random: a topology drawn from a seed.

    molecule/platform/random_topology.py [SEED]

The same seed draws the same topology; it is printed, and stands in the scenario's first line.
"""

from __future__ import annotations

import json
import random
import runpy
import secrets
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCENARIO = ROOT / "molecule/platform_random/molecule.yml"
STEPS = "destroy, syntax, create, prepare, converge, idempotence, verify, destroy"
RULES = runpy.run_path(str(ROOT / "playbooks/filter_plugins/problems.py"))
#: The groups, each with those it cannot do without.
NEEDS: dict[str, tuple[str, ...]] = RULES["NEEDS"]


def closed(groups: set[str]) -> set[str]:
    """Return the groups with all that they need."""
    needed = groups.union(*(NEEDS[group] for group in groups))
    return needed if needed == groups else closed(needed)


def draw(seed: int) -> dict[str, Any]:
    """Return a scenario: some of the components on one to four hosts, workers of any size."""
    rng = random.Random(seed)
    first = rng.choice(sorted(NEEDS))
    groups = closed({first, *(group for group in sorted(NEEDS) if rng.random() < 0.4)})
    hosts = [f"node-{number}" for number in range(1, rng.randint(1, 4) + 1)]
    members = {
        group: rng.sample(hosts, rng.randint(1, len(hosts)))
        if group in RULES["SEVERAL_HOSTS"]
        else [rng.choice(hosts)]
        for group in sorted(groups)
    }
    sizes = {
        host: {
            "dask_worker_processes": rng.randint(1, 3),
            "dask_worker_threads": rng.randint(1, 2),
            "dask_worker_memory_limit": f"{rng.randint(512, 1024)}MiB",
        }
        for host in sorted(members.get("dask_worker", []))
    }
    homes = {host: [group for group in members if host in members[group]] for host in hosts}
    return {
        "hosts": [{"name": host, "groups": groups} for host, groups in homes.items() if groups],
        "sizes": sizes,
    }


def written(seed: int, topology: dict[str, Any]) -> str:
    """Return the topology as a scenario of molecule."""
    hosts = "\n".join(f"  - {json.dumps(host)}" for host in topology["hosts"])
    own = [
        f"    {json.dumps(host)}: {json.dumps(size)}" for host, size in topology["sizes"].items()
    ]
    sizes = ",\n".join(own)
    return f"""---
# Drawn by molecule/platform/random_topology.py {seed}
platforms:
{hosts}
provisioner:
  inventory: {{host_vars: {{
{sizes}
  }}}}
verifier: {{directory: ../platform/wiring}}
scenario: {{test_sequence: [{STEPS}]}}
"""


def main() -> None:
    """Entry point."""
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else secrets.randbelow(10**6)
    topology = draw(seed)
    SCENARIO.parent.mkdir(exist_ok=True)
    SCENARIO.write_text(written(seed, topology))
    print(f"seed {seed}:")
    for host in topology["hosts"]:
        print(f"  {host['name']}: {', '.join(host['groups'])}")


if __name__ == "__main__":
    main()
