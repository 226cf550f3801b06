"""What an operator asks of the database: does it answer, refuse, survive, keep its secrets?"""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest
import scenario

UNIT = "odsp-postgres.service"


@pytest.fixture(scope="module")
def inputs(host: Any) -> dict[str, Any]:
    """Return the role's inputs for this host."""
    return dict(host.ansible.get_variables())


def psql(host: Any, inputs: dict[str, Any], sql: str, options: dict[str, str] | None = None) -> Any:
    """Run SQL on the host as shop's owner over TCP; options replace parts of the connection."""
    shop = inputs["postgres_databases"][0]
    connection = {
        "host": inputs["odsp_address"],
        "port": str(inputs["postgres_listen_port"]),
        "dbname": shop["name"],
        "user": shop["owner"],
        "password": shop["password"],
        "sslmode": "verify-full",
        "sslrootcert": scenario.CA,
        **(options or {}),
    }
    words = " ".join(f"{key}={value}" for key, value in connection.items())
    return host.run("psql --no-psqlrc -v ON_ERROR_STOP=1 -At -c %s %s", sql, words)


def as_superuser(host: Any, sql: str) -> str:
    """Run SQL as the administrator, through the Unix socket."""
    command = host.run(
        "setpriv --reuid postgres --regid postgres --clear-groups psql -At -c %s", sql
    )
    assert command.rc == 0, command.stderr
    return str(command.stdout).strip()


def test_unit_is_enabled_running_and_confined(host: Any) -> None:
    """The server runs, survives a reboot, and cannot touch the rest of the host."""
    scenario.assert_confined(host, UNIT, "postgres")


def test_owner_works_in_its_database_over_tls(host: Any, inputs: dict[str, Any]) -> None:
    """Password, TLS and the server's name are right; the owner may do what it needs."""
    sql = (
        "create table t (x int); insert into t values (41), (42); "
        "select sum(x), (select ssl from pg_stat_ssl where pid = pg_backend_pid()) from t"
    )
    answer = psql(host, inputs, sql)
    assert answer.rc == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == "83|t"
    assert psql(host, inputs, "drop table t").rc == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"password": "wrong-password"}, "password authentication failed"),
        ({"sslmode": "disable"}, "no encryption"),
        ({"user": "stock", "password": "not-a-secret-of-stock"}, "no pg_hba.conf entry"),
        ({"dbname": "postgres"}, "no pg_hba.conf entry"),
        (
            {"dbname": "stock", "user": "stock", "password": "not-a-secret-of-stock"},
            "no pg_hba.conf",
        ),
        ({"user": "postgres", "dbname": "postgres"}, "no pg_hba.conf entry"),
    ],
    ids=[
        "wrong password",
        "plain text",
        "other owner",
        "other database",
        "other client",
        "superuser",
    ],
)
def test_refuses(host: Any, inputs: dict[str, Any], options: dict[str, str], reason: str) -> None:
    """Whoever is not named exactly by the inventory stays outside."""
    answer = psql(host, inputs, "select 1", options)
    assert answer.rc != 0
    assert reason in answer.stderr


def test_refuses_another_host(inputs: dict[str, Any]) -> None:
    """The right password from a host the inventory does not name is worth nothing."""
    shop = inputs["postgres_databases"][0]
    with pytest.raises(psycopg.OperationalError, match=r"no pg_hba\.conf entry"):
        psycopg.connect(
            host=inputs["odsp_address"],
            port=inputs["postgres_listen_port"],
            dbname=shop["name"],
            user=shop["owner"],
            password=shop["password"],
            sslmode="require",
            connect_timeout=10,
        )


def test_certificate_is_for_this_host_only(host: Any, inputs: dict[str, Any]) -> None:
    """A client that asks for another name notices."""
    answer = psql(
        host, inputs, "select 1", {"host": "elsewhere", "hostaddr": inputs["odsp_address"]}
    )
    assert answer.rc != 0
    assert 'does not match host name "elsewhere"' in answer.stderr


def test_listens_only_where_it_should(host: Any, inputs: dict[str, Any]) -> None:
    """Neither on the loopback address nor on all."""
    port = inputs["postgres_listen_port"]
    assert host.socket(f"tcp://{inputs['odsp_address']}:{port}").is_listening
    assert not host.socket(f"tcp://127.0.0.1:{port}").is_listening
    assert not host.socket(f"tcp://0.0.0.0:{port}").is_listening


def test_owners_own_one_database_and_nothing_else(host: Any, inputs: dict[str, Any]) -> None:
    """No owner is more than an owner, and its password is kept as a strong hash."""
    sql = (
        "select json_agg(json_build_array(rolname, rolsuper, rolcreaterole, rolcreatedb, "
        "rolpassword like 'SCRAM-SHA-256$%') order by rolname) from pg_authid where rolcanlogin"
    )
    owners = [[d["owner"], False, False, False, True] for d in inputs["postgres_databases"]]
    found = [row for row in json.loads(as_superuser(host, sql)) if row[0] != "postgres"]
    assert found == sorted(owners)


def test_settings_are_in_force(host: Any) -> None:
    """The running server agrees with what protects the data."""
    for name, value in {
        "ssl": "on",
        "password_encryption": "scram-sha-256",
        "data_checksums": "on",
        "fsync": "on",
    }.items():
        assert as_superuser(host, f"show {name}") == value, name


@pytest.mark.parametrize("blow", ["restart", "kill"])
def test_data_survives(host: Any, inputs: dict[str, Any], blow: str) -> None:
    """What was committed is there after a restart, and after the process was shot."""
    assert psql(host, inputs, f"create table survivor as select '{blow}'::text as x").rc == 0
    if blow == "restart":
        host.check_output(f"systemctl restart {UNIT}")
    else:
        scenario.kill(host, UNIT)
    scenario.wait_until(lambda: psql(host, inputs, "select 1").rc == 0)
    assert psql(host, inputs, "select x from survivor").stdout.strip() == blow
    assert psql(host, inputs, "drop table survivor").rc == 0


def test_secrets_are_private(host: Any, inputs: dict[str, Any]) -> None:
    """No password in arguments, the journal or a file that everyone may read."""
    for database in inputs["postgres_databases"]:
        assert scenario.places_of(host, database["password"]) == []
    key = host.file("/etc/odsp/tls/postgres.key")
    assert (key.user, key.group, key.mode) == ("root", "postgres", 0o640)
    data = host.file(f"{inputs.get('postgres_data_directory', '/var/lib/odsp/postgres')}")
    assert data.mode & 0o007 == 0


def test_empty_password_stops_the_role(host: Any, inputs: dict[str, Any]) -> None:
    """One sentence names the host and the remedy; the server goes on as before."""
    before = scenario.main_pid(host, UNIT)
    bad = [{**inputs["postgres_databases"][0], "password": ""}]
    run = scenario.site(
        "--tags", "postgres", "--extra-vars", json.dumps({"postgres_databases": bad})
    )
    assert run.returncode != 0
    assert "node-1: postgres_databases gives shop an empty password" in " ".join(run.stdout.split())
    assert "changed=0" in run.stdout
    assert scenario.main_pid(host, UNIT) == before
