"""What an operator asks of the database: does it answer, refuse, survive, keep its secrets?"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import faults
import psycopg
import pytest
import scenario

UNIT = "odsp-postgres.service"
DATA = "/var/lib/odsp/postgres"


@pytest.fixture(scope="module")
def inputs(host: Any) -> dict[str, Any]:
    """Return the role's inputs for this host."""
    return dict(host.ansible.get_variables())


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the file of the platform's authority, on this side."""
    file = tmp_path_factory.mktemp("tls") / "ca.crt"
    file.write_text(scenario.secrets()["vault_ca_certificate"])
    return str(file)


Connect = Callable[..., "psycopg.Connection[Any]"]


@pytest.fixture
def connect(inputs: dict[str, Any], authority: str) -> Iterator[Connect]:
    """Return what opens sessions of an owner from outside the host; they end with the test."""
    sessions = []

    def session(owner: str = "lab", **options: Any) -> psycopg.Connection[Any]:
        database = next(d for d in inputs["postgres_databases"] if d["owner"] == owner)
        connection: dict[str, Any] = {
            "host": inputs["odsp_address"],
            "port": inputs["postgres_listen_port"],
            "dbname": database["name"],
            "user": owner,
            "password": database["password"],
            "sslmode": "verify-full",
            "sslrootcert": authority,
            "connect_timeout": 10,
        }
        sessions.append(psycopg.connect(**connection | options, autocommit=True))
        return sessions[-1]

    yield session
    for one in sessions:
        one.close()


def ask(session: psycopg.Connection[Any], sql: str) -> Any:
    """Run a query; return its first value."""
    row = session.execute(sql.encode()).fetchone()
    return row and row[0]


def answers(connect: Connect, sql: str = "select true", **options: Any) -> Any:
    """Open a session for one query; None if the server does not let it in or does not answer."""
    try:
        with closing(connect(**options)) as session:
            return ask(session, sql)
    except psycopg.OperationalError:
        return None


def again(connect: Connect) -> float:
    """Wait until the server answers a new session; return the seconds."""
    started = time.monotonic()
    scenario.wait_until(lambda: answers(connect))
    return time.monotonic() - started


def change(**inputs: Any) -> None:
    """Run the role with other inputs, or with those of the scenario again."""
    run = scenario.site("--tags", "postgres", "--extra-vars", json.dumps(inputs))
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


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


def as_superuser(host: Any, sql: str, database: str = "postgres") -> str:
    """Run SQL as the administrator, through the Unix socket."""
    command = host.run(
        "setpriv --reuid postgres --regid postgres --clear-groups psql -At -c %s %s", sql, database
    )
    assert command.rc == 0, command.stderr
    return str(command.stdout).strip()


def test_unit_is_enabled_running_and_confined(host: Any) -> None:
    """The server runs, and cannot touch the rest of the host."""
    scenario.assert_confined(host, UNIT, "postgres", exposure=1.6)


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


def test_client_that_trusts_another_authority_stays_away(connect: Connect, authority: str) -> None:
    """The server proves who it is; another authority's word for it is not enough."""
    assert ask(connect(sslrootcert=authority), "select true")
    with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
        connect(sslrootcert="/etc/ssl/certs/ca-certificates.crt")


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


@pytest.mark.parametrize("blow", ["restart", "kill", "reboot"])
def test_data_survives(host: Any, connect: Connect, blow: str) -> None:
    """What was committed is there after a restart, a shot process, a reboot of the host."""
    connect().execute(f"create table survivor as select '{blow}'::text as x".encode())
    if blow == "restart":
        host.check_output(f"systemctl restart {UNIT}")
    elif blow == "kill":
        scenario.kill(host, UNIT)
    else:
        scenario.reboot(host)
    again(connect)
    assert ask(connect(), "select x from survivor") == blow
    connect().execute("drop table survivor")


def test_secrets_are_private(host: Any, inputs: dict[str, Any]) -> None:
    """No password in arguments, the journal or a file that everyone may read."""
    for database in inputs["postgres_databases"]:
        assert scenario.places_of(host, database["password"]) == []
    key = host.file("/etc/odsp/tls/postgres.key")
    assert (key.user, key.group, key.mode) == ("root", "postgres", 0o640)
    data = host.file(f"{inputs.get('postgres_data_directory', '/var/lib/odsp/postgres')}")
    assert data.mode & 0o007 == 0


def test_bad_input_stops_the_role(inputs: dict[str, Any], host: Any) -> None:
    """One sentence names the host, the variable and the remedy; the server goes on as before."""
    before = scenario.units(host)
    bad = [{**inputs["postgres_databases"][0], "password": ""}]
    run = scenario.site(
        "--tags", "postgres", "--extra-vars", json.dumps({"postgres_databases": bad})
    )
    assert run.returncode != 0
    sentence = "node-1: postgres_databases gives shop an empty password; generate it with playbooks"
    assert sentence in " ".join(run.stdout.split())
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert scenario.restarted(before, scenario.units(host)) == set()


GOOD = {"name": "a", "owner": "a", "password": "long-enough", "clients": ["192.0.2.1"]}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"postgres_databases": [GOOD, {**GOOD, "owner": "b"}]}, "lists a database twice"),
        (
            {"postgres_databases": [GOOD, {**GOOD, "name": "b", "password": "another"}]},
            "gives one owner two passwords",
        ),
        ({"postgres_databases": [{**GOOD, "name": "all"}]}, 'has a database "all"'),
        ({"postgres_databases": [{**GOOD, "name": "a b"}]}, 'has a database "a b"'),
        ({"postgres_databases": [{**GOOD, "owner": "postgres"}]}, 'has an owner "postgres"'),
        ({"postgres_databases": [{**GOOD, "clients": ["all"]}]}, 'has a client "all"'),
        ({"postgres_databases": [{**GOOD, "clients": ["::1 trust"]}]}, 'has a client "::1 trust"'),
        ({"postgres_listen_addresses": []}, "postgres_listen_addresses is empty"),
        ({"postgres_listen_port": 70000}, "postgres_listen_port is 70000"),
        ({"postgres_shared_buffers": "lots"}, 'postgres_shared_buffers is "lots"'),
        ({"postgres_shared_buffers": "4GB"}, "leave nothing of postgres_memory_max"),
        ({"postgres_shared_buffers": "1GB", "postgres_databases": [GOOD]}, ""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_wrong_input_has_its_sentence(
    refusals: dict[str, str], wrong: dict[str, Any], sentence: str
) -> None:
    """What the types do not show is told before anything is touched; good inputs pass."""
    told = refusals[json.dumps(wrong)]
    assert (sentence in told and told.startswith("node-1: ")) if sentence else told == ""


@pytest.fixture(scope="module")
def refusals(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    """Show all wrong inputs to the role in one run of Ansible; return its sentences."""
    (mark,) = test_every_wrong_input_has_its_sentence.pytestmark
    cases = [json.dumps(wrong) for wrong, _ in mark.args[1]]
    folder = tmp_path_factory.mktemp("refusals")
    role = {"name": "postgres", "tasks_from": "validate.yml"}
    tasks = [
        {
            "block": [{"ansible.builtin.include_role": role, "vars": json.loads(case)}],
            "rescue": [
                {"ansible.builtin.set_fact": {f"told_{n}": "{{ ansible_failed_result.msg }}"}}
            ],
        }
        for n, case in enumerate(cases)
    ]
    names = "{{ query('vars', *names, default='') | to_json }}"
    tell = {
        "ansible.builtin.copy": {"content": names, "dest": str(folder / "told"), "mode": "0600"},
        "vars": {"names": [f"told_{number}" for number in range(len(cases))]},
    }
    play = {"hosts": "all", "gather_facts": False, "connection": "local", "tasks": [*tasks, tell]}
    (folder / "play.json").write_text(json.dumps([play]))
    run = subprocess.run(
        ["ansible-playbook", "--inventory", "node-1,", str(folder / "play.json")],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return dict(zip(cases, json.loads((folder / "told").read_text()), strict=True))


def test_database_fewer_loses_its_access_and_nothing_else(
    host: Any, inputs: dict[str, Any], connect: Connect
) -> None:
    """Nobody else notices; the owner is out at once; data and other people's roles stay."""
    guest, lab = connect("guest"), connect()
    guest.execute("drop table if exists kept")
    guest.execute("create table kept as select 42 as x")
    backend, before = ask(lab, "select pg_backend_pid()"), scenario.units(host)
    as_superuser(host, "create role by_hand login")
    fewer = [d for d in inputs["postgres_databases_extra"] if d["name"] != "guest"]
    try:
        change(postgres_databases_extra=fewer)
        assert scenario.restarted(before, scenario.units(host)) == set()
        assert ask(lab, "select pg_backend_pid()") == backend, "another owner's session ended"
        with pytest.raises(psycopg.OperationalError):
            guest.execute("select x from kept")
        with pytest.raises(psycopg.OperationalError, match="no pg_hba"):
            connect("guest")
        logins = "select string_agg(rolname, ' ' order by rolname) from pg_roles where rolcanlogin"
        assert as_superuser(host, logins) == "by_hand lab postgres shop stock"
        assert as_superuser(host, "select x from kept", "guest") == "42"
    finally:
        as_superuser(host, "drop role by_hand")
        change()
    assert ask(connect("guest"), "select x from kept") == 42
    connect("guest").execute("drop table kept")


def test_other_port_and_size_restart_the_server(
    host: Any, inputs: dict[str, Any], connect: Connect
) -> None:
    """The new values are in force for the next client, the old port is closed."""
    before, port = scenario.units(host), inputs["postgres_listen_port"] + 1
    try:
        change(odsp_postgres_port=port, postgres_max_connections=61, postgres_memory_max="1G")
        assert scenario.restarted(before, scenario.units(host)) == {UNIT}
        assert ask(connect(port=port), "select current_setting('max_connections')") == "61"
        with pytest.raises(psycopg.OperationalError, match="refused"):
            connect()
        assert host.service(UNIT).systemd_properties["MemoryMax"] == str(2**30)
    finally:
        change()
    assert ask(connect(), "select current_setting('max_connections')") == "100"


@pytest.mark.fault(
    "full disk",
    "A write that has no room fails with a plain error and reads go on; what was committed is"
    " there, and writes work again as soon as there is room.",
)
def test_full_disk(host: Any, connect: Connect, measured: Callable[[str], None]) -> None:
    """Committed rows outlive a disk without a block left, and nobody has to repair anything."""
    insert = "insert into big select repeat(md5(random()::text), 30000) from generate_series(1, {})"
    with faults.full_disk(host, UNIT, DATA, mib=320) as disk:
        session = connect()
        session.execute("create table big (x text)")
        session.execute("alter table big alter x set storage external")
        session.execute(insert.format(9).encode())
        disk.fill()
        with pytest.raises(psycopg.errors.DiskFull) as refused:
            session.execute(insert.format(900).encode())
        assert ask(session, "select count(*) from big") == 9, "reads go on"
        disk.free()
        seconds = again(connect)
        assert ask(connect(), "select count(*) from big") == 9
        connect().execute(insert.format(9).encode())
        assert ask(connect(), "select count(*) from big") == 18
    measured(
        f"'{str(refused.value).splitlines()[0]}'; 9 of 9 committed rows; the server wrote"
        f" again {seconds:.1f} s after there was room"
    )


@pytest.mark.fault(
    "out of memory",
    "The query that took it fails, the server comes back by itself, what was committed is there.",
)
def test_out_of_memory(host: Any, connect: Connect, measured: Callable[[str], None]) -> None:
    """A greedy query costs the open sessions, and no data."""
    faults.eat_memory(host, UNIT)
    again(connect)
    connect().execute("create table survivor as select 42 as x")
    before = main = scenario.main_pid(host, UNIT)
    host.check_output(f"systemctl set-property --runtime {UNIT} MemoryMax=200M MemorySwapMax=0")
    try:
        greedy = "select length(string_agg(repeat('x', 1000000), '')) from generate_series(1, 900)"
        with pytest.raises(psycopg.OperationalError):
            connect().execute(greedy.encode())
        seconds = again(connect)
        main = scenario.main_pid(host, UNIT)
    finally:
        host.check_output(f"rm -rf /run/systemd/system.control/{UNIT}.d; systemctl daemon-reload")
    assert ask(connect(), "select x from survivor") == 42
    connect().execute("drop table survivor")
    how = "the same process" if main == before else "a new process"
    measured(f"the query was ended; {how} answered {seconds:.1f} s later; no row was lost")


@pytest.mark.fault(
    "clock jump",
    "Sessions go on and new ones are let in, whichever way the clock jumps; no commit is lost.",
)
def test_clock_jump(host: Any, connect: Connect, measured: Callable[[str], None]) -> None:
    """A day forwards and two days back change time stamps and nothing else."""
    day = 86400
    with faults.clock(host, UNIT) as clock:
        again(connect)
        session = connect()
        session.execute("create table ticks (n serial, at timestamptz default clock_timestamp())")
        for jump in (0, day, -day):
            clock.jump(jump)

            def moved(jump: int = jump) -> bool:
                """Tell whether the server's clock is where it was put."""
                now = ask(session, "select extract(epoch from clock_timestamp())")
                return abs(float(now) - time.time() - jump) < 60

            scenario.wait_until(moved)
            session.execute("insert into ticks default values")
            connect().execute("insert into ticks default values")
        count = "select count(*) from ticks"
        assert ask(session, count) == 6
        ordered = "select string_agg(n::text, ' ' order by at, n) from ticks"
        assert ask(session, ordered) == "5 6 1 2 3 4", "the server did not see the jumps"
        host.check_output(f"systemctl restart {UNIT}")
        again(connect)
        assert ask(connect(), count) == 6, "a restart with the clock back lost commits"
    again(connect)
    connect().execute("drop table ticks")
    measured("clock 1 day ahead, then 1 day behind: one session lived on, 6 of 6 commits are there")


@pytest.mark.fault(
    "expired certificate",
    "Clients refuse it; the next run of the playbook renews it without a restart.",
)
def test_expired_certificate(host: Any, connect: Connect, measured: Callable[[str], None]) -> None:
    """A client says what is wrong; one run puts it right and costs no session."""
    with faults.expired_certificate(host, "postgres", UNIT):
        with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
            connect()
        assert ask(connect(sslmode="require", sslrootcert=""), "select true"), (
            "nothing but its date is wrong"
        )
        before, started = scenario.units(host), time.monotonic()
        change()
        seconds = time.monotonic() - started
        assert scenario.restarted(before, scenario.units(host)) == set()
        assert ask(connect(), "select true")
    measured(f"'certificate verify failed'; renewed by one run of {seconds:.0f} s, no restart")
