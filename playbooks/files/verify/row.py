"""Look run, model and alias up in PostgreSQL, past MLflow, as the database's own account."""

from __future__ import annotations

import json
import subprocess

from link import INPUTS, BrokenLinkError, prove

# psql quotes what stands in :'name'.
QUERY = """
select json_build_object(
  'run', (select status from runs where run_uuid = :'run' and lifecycle_stage = 'active'),
  'score', (select count(*) from latest_metrics where run_uuid = :'run' and key = 'accuracy'),
  'version', (select run_id from model_versions
              where name = :'name' and version = :'version'),
  'alias', (select version from registered_model_aliases
            where name = :'name' and alias = :'alias'));
"""

with prove("the run is a row in PostgreSQL", "postgres") as proof:
    command = ["runuser", "-u", "postgres", "--", "psql", "-XAtq", "-v", "ON_ERROR_STOP=1"]
    command += ["-h", "/run/postgresql", "-p", str(INPUTS["port"]), "-d", INPUTS["database"]]
    for name in ("run", "name", "version", "alias"):
        command += ["-v", f"{name}={INPUTS[name]}"]
    answer = subprocess.run(
        command, input=QUERY, capture_output=True, text=True, cwd="/", check=False
    )
    if answer.returncode:
        raise BrokenLinkError(answer.stderr.strip())
    rows = json.loads(answer.stdout)
    if rows["run"] != "FINISHED" or not rows["score"]:
        raise BrokenLinkError(
            f"the table runs has no finished run {INPUTS['run']} with its accuracy"
        )
    if rows["version"] != INPUTS["run"] or str(rows["alias"]) != str(INPUTS["version"]):
        raise BrokenLinkError(
            f"the registry's tables do not lead from @{INPUTS['alias']} to this run"
        )
    proof.detail = f"run {INPUTS['run'][:8]}, version {rows['alias']} by its alias"
