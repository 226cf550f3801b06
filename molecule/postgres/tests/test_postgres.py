"""What an operator asks of the database: does it answer, refuse, survive, keep its secrets?"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
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
            "connect_timeout": 60,
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


def create(session: psycopg.Connection[Any], table: str, definition: str) -> None:
    """Make a table, in place of one that a test left when it failed."""
    session.execute(f"drop table if exists {table}; create table {table} {definition}".encode())


def again(connect: Connect, sql: str = "select true") -> float:
    """Wait until the server does what a new session asks; return the seconds."""
    started = time.monotonic()

    def done() -> bool:
        """Tell whether the server lets a session in and does what it asks."""
        with suppress(psycopg.OperationalError):
            connect().execute(sql.encode())
            return True
        return False

    scenario.wait_until(done)
    return time.monotonic() - started


def psql(host: Any, inputs: dict[str, Any], sql: str, /, **options: str | None) -> Any:
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
        **options,
    }
    words = " ".join(f"{key}={value}" for key, value in connection.items() if value is not None)
    return host.run("psql -Xwqv ON_ERROR_STOP=1 -At -c %s %s", sql, words)


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
        "select sum(x), (select ssl from pg_stat_ssl where pid = pg_backend_pid()) from t; "
        "drop table t"
    )
    answer = psql(host, inputs, sql)
    assert answer.rc == 0, answer.stderr
    assert answer.stdout.splitlines() == ["83|t"]


REFUSED: dict[str, tuple[dict[str, str | None], str]] = {
    "no password": ({"password": None}, "no password supplied"),
    "wrong password": ({"password": "wrong-password"}, "password authentication failed"),
    "plain text": ({"sslmode": "disable"}, "no pg_hba.conf entry .* no encryption"),
    "other owner": (
        {"user": "stock", "password": "not-a-secret-of-stock"},
        'no pg_hba.conf entry .* user "stock", database "shop", SSL encryption',
    ),
    "other database": ({"dbname": "postgres"}, 'no pg_hba.conf entry .* database "postgres", SSL'),
    "other client": (
        {"dbname": "stock", "user": "stock", "password": "not-a-secret-of-stock"},
        'no pg_hba.conf entry .* user "stock", database "stock", SSL encryption',
    ),
    "superuser": (
        {"user": "postgres", "dbname": "postgres"},
        'no pg_hba.conf entry .* user "postgres", database "postgres", SSL encryption',
    ),
    # What the client refuses: a server that cannot prove who it is.
    "other name": ({"host": "elsewhere"}, 'does not match host name "elsewhere"'),
    "other authority": ({"sslrootcert": "/root/odsp-foreign.crt"}, "certificate verify failed"),
}


def test_refuses(host: Any, inputs: dict[str, Any], connect: Connect) -> None:
    """Whoever is not named exactly by the inventory stays outside, and is told why."""
    everybody = {"hostaddr": inputs["odsp_address"]}
    with scenario.foreign_pair(host, "node-1"):
        assert psql(host, inputs, "select 1", **everybody).stdout == "1\n"
        for name, (options, reason) in REFUSED.items():
            answer = psql(host, inputs, "select 1", **everybody, **options)
            assert answer.rc == 2, f"{name}: {answer.stdout}"
            assert re.search(reason, answer.stderr), f"{name}: {answer.stderr}"
    # Shop's password is right; shop's owner may come from the host alone, lab's from here, too.
    assert ask(connect("lab"), "select true")
    with pytest.raises(psycopg.OperationalError, match=r'no pg_hba\.conf entry .* user "shop"'):
        connect("shop")


def test_listens_only_where_it_should(host: Any, inputs: dict[str, Any]) -> None:
    """One address, neither the loopback nor all of them."""
    port = f":{inputs['postgres_listen_port']}"
    sockets = host.check_output("ss --listening --tcp --numeric --no-header | awk '{ print $4 }'")
    ours = [name for name in sockets.split() if name.endswith(port)]
    assert ours == [inputs["odsp_address"] + port]


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
    create(connect(), "survivor", f"as select '{blow}'::text as x")
    scenario.strike(host, UNIT, blow)
    again(connect)
    assert ask(connect(), "select x from survivor") == blow
    connect().execute("drop table survivor")


def test_secrets_are_private(host: Any, inputs: dict[str, Any]) -> None:
    """No password in arguments, the journal or a file that everyone may read."""
    passwords = [database["password"] for database in inputs["postgres_databases"]]
    assert scenario.places_of(host, *passwords) == []
    key = host.file(f"{scenario.TLS}/postgres.key")
    assert (key.user, key.group, key.mode) == ("root", "postgres", 0o640)
    assert host.file(DATA).mode & 0o007 == 0


@pytest.mark.once
def test_no_password_is_an_argument_while_the_role_works(
    host: Any, inputs: dict[str, Any], connect: Connect
) -> None:
    """Passwords pass the host's processes unseen; one that somebody changed by hand is repaired."""
    as_superuser(host, "alter role lab password 'changed-by-hand'")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        connect()
    passwords = [database["password"] for database in inputs["postgres_databases"]]
    with scenario.watched_arguments(host, *passwords):
        run = scenario.converge("postgres")
    assert scenario.changed(run) == 1
    assert ask(connect(), "select true")


def test_bad_input_stops_the_role(host: Any, inputs: dict[str, Any]) -> None:
    """One sentence names host, variable and remedy; good inputs beside the bad wait with them."""
    before = scenario.units(host)
    bad = [{**inputs["postgres_databases"][0], "password": ""}]
    run = scenario.layer("--tags", "postgres", postgres_databases=bad, postgres_memory_max="1G")
    assert run.returncode != 0
    sentence = (
        "node-1: postgres_databases gives shop an empty password; "
        "generate it with playbooks/ops/generate_secrets.yml."
    )
    assert sentence in " ".join(run.stdout.split())
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert scenario.restarted(before, scenario.units(host)) == set()


GOOD = {"name": "a", "owner": "a", "password": "long-enough", "clients": ["192.0.2.1"]}
#: Wrong inputs, and what is said of them before the remedy.
WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"postgres_databases": [{**GOOD, "password": ""}]},
        "postgres_databases gives a an empty password",
    ),
    (
        {"postgres_databases": [GOOD, {**GOOD, "owner": "b"}]},
        "postgres_databases lists a database twice",
    ),
    (
        {"postgres_databases": [GOOD, {**GOOD, "name": "b", "password": "another"}]},
        "postgres_databases gives one owner two passwords",
    ),
    (
        {"postgres_databases": [{**GOOD, "name": "all"}]},
        'postgres_databases has a database "all"',
    ),
    (
        {"postgres_databases": [{**GOOD, "name": "a b"}]},
        'postgres_databases has a database "a b"',
    ),
    (
        {"postgres_databases": [{**GOOD, "owner": "postgres"}]},
        'postgres_databases has an owner "postgres"',
    ),
    (
        {"postgres_databases": [{**GOOD, "clients": ["all"]}]},
        'postgres_databases has a client "all"',
    ),
    (
        {"postgres_databases": [{**GOOD, "clients": ["::1 trust"]}]},
        'postgres_databases has a client "::1 trust"',
    ),
    ({"postgres_listen_addresses": []}, "postgres_listen_addresses is empty"),
    ({"postgres_listen_port": 70000}, "postgres_listen_port is 70000"),
    ({"postgres_memory_max": "2 GB"}, 'postgres_memory_max is "2 GB"'),
    ({"postgres_shared_buffers": "lots"}, 'postgres_shared_buffers is "lots"'),
    (
        {"postgres_shared_buffers": "4GB"},
        "postgres_shared_buffers, 4GB, leave nothing of postgres_memory_max, 2G",
    ),
]


@pytest.mark.once
def test_every_wrong_input_has_its_sentence(tmp_path: Path) -> None:
    """What the types do not show is told before anything is touched; good inputs pass."""
    good = {"postgres_databases": [GOOD], "postgres_shared_buffers": "1GB"}
    cases = [good | wrong for wrong, _ in WRONG]
    *told, nothing = scenario.sentences("postgres", [*cases, good], tmp_path)
    assert nothing == ""
    for number, (_, fault) in enumerate(WRONG):
        sentence = rf"case-{number}: {re.escape(fault)}; [^;]+\."
        assert re.fullmatch(sentence, told[number]), told[number]


def test_fewer_databases_then_another_port_then_all_as_before(
    host: Any, inputs: dict[str, Any], connect: Connect
) -> None:
    """An owner less: out at once, nobody else notices. Port and size: one restart, either way."""
    guest, lab = connect("guest"), connect()
    create(guest, "kept", "as select 42 as x")
    as_superuser(host, "drop role if exists by_hand; create role by_hand login")
    backend, before = ask(lab, "select pg_backend_pid()"), scenario.units(host)
    extra = [d for d in inputs["postgres_databases_extra"] if d["name"] != "guest"]
    port = inputs["postgres_listen_port"] + 1
    try:
        scenario.converge("postgres", postgres_databases_extra=extra)
        assert scenario.restarted(before, scenario.units(host)) == set()
        assert ask(lab, "select pg_backend_pid()") == backend, "another owner's session ended"
        with pytest.raises(psycopg.errors.AdminShutdown):
            guest.execute("select x from kept")
        with pytest.raises(psycopg.OperationalError, match=r"no pg_hba\.conf entry"):
            connect("guest")
        logins = "select string_agg(rolname, ' ' order by rolname) from pg_roles where rolcanlogin"
        assert as_superuser(host, logins) == "by_hand lab postgres shop stock"
        assert as_superuser(host, "select x from kept", "guest") == "42"

        # Only what its own settings say: a changed unit would be a restart of its own.
        scenario.converge(
            "postgres", postgres_databases_extra=extra, odsp_postgres_port=port,
            postgres_max_connections=61,
        )  # fmt: skip
        moved = scenario.units(host)
        assert scenario.restarted(before, moved) == {UNIT}
        assert ask(connect(port=port), "select current_setting('max_connections')") == "61"
        with pytest.raises(psycopg.OperationalError, match="refused"):
            connect()
        with pytest.raises(psycopg.OperationalError, match=r"no pg_hba\.conf entry"):
            connect("guest", port=port)
        assert host.service(UNIT).systemd_properties["MemoryMax"] == str(2 * 2**30)
    finally:
        scenario.converge("postgres")
        as_superuser(host, "drop role by_hand")
    assert scenario.restarted(moved, scenario.units(host)) == {UNIT}
    assert ask(connect("guest"), "select x from kept") == 42
    assert ask(connect(), "select current_setting('max_connections')") == "100"
    with pytest.raises(psycopg.OperationalError, match="refused"):
        connect(port=port)
    connect("guest").execute("drop table kept")


@pytest.mark.fault(
    "full disk",
    "A write that has no room fails with a plain error and reads go on; where the log itself has no"
    " room for its next file, the server ends and is back as soon as there is room; what was"
    " committed is there.",
)
def test_full_disk(host: Any, connect: Connect, measured: Callable[[str], None]) -> None:
    """Committed rows outlive a disk without a block left, and nobody has to repair anything."""
    insert = "insert into big select repeat(md5(random()::text), 30000) from generate_series(1, {})"
    count = "select count(*) from big"
    with faults.full_disk(host, UNIT, DATA, mib=320) as disk:
        again(connect)
        session = connect()
        create(session, "big", "(x text)")
        session.execute("alter table big alter x set storage external")
        # A server whose log needs its next file now ends, so that one is begun before.
        as_superuser(host, "select pg_switch_wal()")
        session.execute(insert.format(9).encode())
        disk.fill()
        with pytest.raises(psycopg.errors.DiskFull) as refused:
            session.execute(insert.format(900).encode())
        assert ask(session, count) == 9, "reads go on"
        disk.free()
        seconds = again(connect, insert.format(9))
        disk.fill()
        scenario.wait_until(lambda: "server closed the connection" in _use_up_log(host))
        disk.free()
        after = again(connect, insert.format(9))
        kept = ask(connect(), count)
        assert kept == 27
    reason = str(refused.value).splitlines()[0].partition(": ")[2]
    measured(
        f"'{reason}'; reads went on; {seconds:.1f} s after there was room rows were written again,"
        f" and {after:.1f} s where the server had ended; {kept} of 27 committed ones are there"
    )


def _use_up_log(host: Any) -> str:
    """Begin as many of the log's files as it keeps in stock; return what the server complains."""
    sql = "select pg_logical_emit_message(true, 'a', 'b'); select pg_switch_wal();"
    user = "setpriv --reuid postgres --regid postgres --clear-groups"
    return str(host.run(f"{user} psql -v ON_ERROR_STOP=1 -c %s", sql).stderr)


@pytest.mark.fault(
    "out of memory",
    "The query that took it fails, the server itself goes on, what was committed is there.",
)
def test_out_of_memory(host: Any, connect: Connect, measured: Callable[[str], None]) -> None:
    """A greedy query costs the open sessions, and no data."""
    create(connect(), "survivor", "as select 42 as x")
    faults.eat_memory(host, UNIT)
    again(connect)
    main, since = scenario.main_pid(host, UNIT), float(host.check_output("date +%s.%N"))
    greedy = "select length(string_agg(repeat('x', 1000000), '')) from generate_series(1, 900)"
    with faults.memory_limit(host, UNIT, 200):
        with pytest.raises(psycopg.OperationalError):
            connect().execute(greedy.encode())
        seconds = again(connect)
        assert scenario.main_pid(host, UNIT) == main, "the kernel took the server, not the session"

    def killed() -> bool:
        """Tell whether the server saw the kernel end the greedy query."""
        said = scenario.journal(host, UNIT, since)
        ended = "terminated by signal 9: Killed" in said
        return ended and "process was running: select length(string_agg(" in said

    scenario.wait_until(killed)
    assert ask(connect(), "select x from survivor") == 42
    connect().execute("drop table survivor")
    measured(f"the query's process was killed; the server answered others {seconds:.1f} s later")


@pytest.mark.fault(
    "clock jump",
    "Sessions go on and new ones are let in, whichever way the clock jumps; no commit is lost.",
)
def test_clock_jump(host: Any, connect: Connect, measured: Callable[[str], None]) -> None:
    """A day forwards and two days back change time stamps and nothing else."""
    day, slowest, seen = 86400, 0.0, []
    with faults.clock(host, UNIT) as clock:
        again(connect)
        session = connect()
        create(session, "ticks", "(n serial, at timestamptz default clock_timestamp())")

        def ahead() -> float:
            """Return how far the server's clock is ahead of ours."""
            now = ask(session, "select extract(epoch from clock_timestamp())")
            return float(now) - time.time()

        for jump in (0, day, -day):
            clock.jump(jump)

            def moved(jump: int = jump) -> bool:
                """Tell whether the server's clock is where it was put."""
                return abs(ahead() - jump) < 60

            scenario.wait_until(moved)
            seen.append(ahead() / 3600)
            started = time.monotonic()
            session.execute("insert into ticks default values")
            connect().execute("insert into ticks default values")
            slowest = max(slowest, time.monotonic() - started)
        ordered = "select string_agg(n::text, ' ' order by at, n) from ticks"
        assert ask(session, ordered) == "5 6 1 2 3 4", "the server did not see the jumps"
        host.check_output(f"systemctl restart {UNIT}")
        again(connect)
        kept = ask(connect(), "select count(*) from ticks")
        assert kept == 6, "a restart with the clock back lost commits"
    again(connect)
    connect().execute("drop table ticks")
    measured(
        f"clock {seen[1]:+.0f} h, then {seen[2]:+.0f} h: the open session and a new one committed"
        f" within {slowest:.1f} s each time; after a restart {kept} of 6 commits are there"
    )


@pytest.mark.fault(
    "expired certificate",
    "Clients refuse it; the next run of the playbook renews it without a restart.",
)
def test_expired_certificate(
    host: Any, inputs: dict[str, Any], connect: Connect, measured: Callable[[str], None]
) -> None:
    """A client says what is wrong; one run puts it right and costs no session."""
    where = f"{inputs['odsp_address']}:{inputs['postgres_listen_port']}"
    look = f"openssl s_client -starttls postgres -connect {where} -CAfile {scenario.CA}"
    with faults.expired_certificate(host, "postgres", UNIT):
        again(lambda: connect(sslmode="require", sslrootcert=""))
        with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
            connect()
        code = re.search(r"return code: \d+ \((.*)\)", host.run(f"{look} < /dev/null").stdout)
        assert code and code[1] == "certificate has expired", code
        session = connect(sslmode="require", sslrootcert="")
        before, started = scenario.units(host), time.monotonic()
        scenario.converge("postgres")
        seconds = time.monotonic() - started
        assert scenario.restarted(before, scenario.units(host)) == set()
        assert ask(connect(), "select true")
        assert ask(session, "select true"), "a session ended"
    measured(f"'{code[1]}'; renewed by one run of {seconds:.0f} s, no restart, no session ended")
