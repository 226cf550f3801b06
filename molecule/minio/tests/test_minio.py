"""What an operator asks of the object store: does it answer, refuse, survive, keep its secrets?"""

from __future__ import annotations

import json
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import boto3
import faults
import holes
import minio
import pytest
import requests
import scenario
import urllib3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, EndpointConnectionError, SSLError

UNIT = "odsp-minio.service"
DATA = "/var/lib/odsp/minio"


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


Connect = Callable[..., Any]


@pytest.fixture(scope="module")
def s3(inputs: dict[str, Any], authority: str) -> Connect:
    """Return what makes boto3's client of an account, of a user, or of root."""
    secrets = {one["name"]: one["secret_key"] for one in inputs["minio_accounts"]}
    secrets |= {one["name"]: one["password"] for one in inputs["minio_users"]}
    secrets["root"] = inputs["minio_root_password"]

    def client(
        name: str = "shop", *, secret: str = "", port: int = 0, signature: Any = None, **other: Any
    ) -> Any:
        config = Config(
            connect_timeout=60,
            read_timeout=60,
            retries={"total_max_attempts": 1},
            s3={"addressing_style": "path"},
            signature_version=signature,
        )
        url = f"https://{inputs['odsp_address']}:{port or inputs['minio_listen_port']}"
        connection = {"endpoint_url": url, "verify": authority, "region_name": "us-east-1"}
        return boto3.session.Session().client(
            "s3",
            aws_access_key_id=inputs.get("minio_root_user", "odsp") if name == "root" else name,
            aws_secret_access_key=secret or secrets[name],
            config=config,
            **connection | other,
        )

    return client


@pytest.fixture(scope="module")
def store(inputs: dict[str, Any], authority: str) -> holes.Store:
    """Return shop's account and its bucket, for requests that no client would send."""
    (shop,) = (one for one in inputs["minio_accounts"] if one["name"] == "shop")
    url = f"https://{inputs['odsp_address']}:{inputs['minio_listen_port']}"
    return holes.Store(url, "shop", shop["secret_key"], "shop", authority)


@pytest.fixture(scope="module")
def administer(inputs: dict[str, Any], authority: str) -> Callable[..., Any]:
    """Return what makes a client of the administration, by default the root user's."""

    def client(name: str = "", password: str = "") -> Any:
        known = (inputs.get("minio_root_user", "odsp"), inputs["minio_root_password"])
        return minio.MinioAdmin(
            endpoint=f"{inputs['odsp_address']}:{inputs['minio_listen_port']}",
            credentials=minio.credentials.StaticProvider(name or known[0], password or known[1]),
            http_client=urllib3.PoolManager(ca_certs=authority, retries=False),
        )

    return client


@pytest.fixture
def browser(authority: str) -> Iterator[requests.Session]:
    """Return a browser without cookies that trusts the platform."""
    with requests.Session() as session:
        session.trust_env = False
        session.verify = authority
        yield session


def put(client: Any, text: str, bucket: str = "shop", key: str = "odsp-test") -> None:
    """Store an object."""
    client.put_object(Bucket=bucket, Key=key, Body=text.encode())


def get(client: Any, bucket: str = "shop", key: str = "odsp-test") -> str:
    """Return an object's content."""
    return str(client.get_object(Bucket=bucket, Key=key)["Body"].read().decode())


def again(s3: Connect, seconds: float = 60) -> float:
    """Wait until the server answers; return the seconds."""
    started = time.monotonic()

    def answers() -> bool:
        """Tell whether shop's account finds its bucket."""
        with suppress(BotoCoreError, ClientError):
            s3().head_bucket(Bucket="shop")
            return True
        return False

    scenario.wait_until(answers, seconds)
    return time.monotonic() - started


@contextmanager
def refused(code: str) -> Iterator[None]:
    """The server says no, and why."""
    with pytest.raises(ClientError) as answer:
        yield
    assert answer.value.response["Error"]["Code"] == code


def passwords(inputs: dict[str, Any]) -> list[str]:
    """Return every secret that the role is given."""
    keys = [one["secret_key"] for one in inputs["minio_accounts"]]
    persons = [one["password"] for one in inputs["minio_users"]]
    return [*keys, *persons, inputs["minio_root_password"]]


def test_unit_is_enabled_running_and_confined(host: Any) -> None:
    """The server runs, and cannot touch the rest of the host."""
    scenario.assert_confined(host, UNIT, "minio", exposure=1.6)


def test_refuses(s3: Connect) -> None:
    """A wrong secret, a stranger, no credential and a client of another authority get nothing."""
    put(s3(), "x")
    with refused("SignatureDoesNotMatch"):
        put(s3(secret="not-the-secret"), "y")
    with refused("InvalidAccessKeyId"):
        put(s3("nobody", secret="not-the-secret"), "y")
    with refused("AccessDenied"):
        put(s3(signature=UNSIGNED), "y")
    with refused("AccessDenied"):
        get(s3(signature=UNSIGNED))
    with pytest.raises(SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        put(s3(verify="/etc/ssl/certs/ca-certificates.crt"), "y")
    assert get(s3()) == "x"
    s3().delete_object(Bucket="shop", Key="odsp-test")


def test_listens_only_where_it_should(host: Any, inputs: dict[str, Any]) -> None:
    """The console has one address; of the S3 interface the server adds the loopback by itself."""
    s3_port, console_port = inputs["minio_listen_port"], inputs["minio_console_port"]
    sockets = host.check_output("ss --listening --tcp --numeric --no-header | awk '{ print $4 }'")
    ours = [name for name in sockets.split() if name.endswith((f":{s3_port}", f":{console_port}"))]
    told = {f"{inputs['odsp_address']}:{port}" for port in (s3_port, console_port)}
    assert told <= {*ours} <= told | {f"127.0.0.1:{s3_port}", f"[::1]:{s3_port}"}


def test_answers_by_tls_only(
    inputs: dict[str, Any], authority: str, browser: requests.Session
) -> None:
    """S3 and the console prove who they are; plain HTTP gets a refusal and nothing else."""
    address, trusted = inputs["odsp_address"], ssl.create_default_context(cafile=authority)
    for port, path in (
        (inputs["minio_listen_port"], "/minio/health/ready"),
        (inputs["minio_console_port"], "/login"),
    ):
        url = f"https://{address}:{port}{path}"
        assert browser.get(url, timeout=60).status_code == 200
        with pytest.raises(requests.exceptions.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
            browser.get(url, timeout=60, verify=True)
        with (
            socket.create_connection((address, port), timeout=60) as raw,
            pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"),
        ):
            trusted.wrap_socket(raw, server_hostname="elsewhere")
        plain = browser.get(url.replace("https", "http"), timeout=60)
        assert plain.status_code == 400
        assert plain.text.strip() == "Client sent an HTTP request to an HTTPS server."


def test_account_reads_and_writes_its_bucket_and_no_other(s3: Connect) -> None:
    """Every account is confined to its own buckets."""
    for own, other in (("shop", "stock"), ("stock", "shop")):
        client, key = s3(own), "odsp-own"
        put(client, "own", bucket=own, key=key)
        assert get(client, bucket=own, key=key) == "own"
        with refused("AccessDenied"):
            put(s3(other), "foreign", bucket=own, key=key)
        with refused("AccessDenied"):
            get(s3(other), bucket=own, key=key)
        with refused("AccessDenied"):
            s3(other).list_objects_v2(Bucket=own)
        with refused("AccessDenied"):
            s3(other).delete_object(Bucket=own, Key=key)
        with refused("AccessDenied"):
            client.create_bucket(Bucket="another")
        listed = client.list_objects_v2(Bucket=own, Prefix=key)["Contents"]
        assert [one["Key"] for one in listed] == [key]
        client.delete_object(Bucket=own, Key=key)
        with refused("NoSuchKey"):
            get(client, bucket=own, key=key)


def test_user_signs_in_to_the_console_and_administers_nothing(
    inputs: dict[str, Any], s3: Connect, browser: requests.Session, administer: Callable[..., Any]
) -> None:
    """A person enters with the own password only, and finds the own buckets and nothing else."""
    ada = next(one for one in inputs["minio_users"] if one["name"] == "ada")
    console = f"https://{inputs['odsp_address']}:{inputs['minio_console_port']}/api/v1"

    def sign_in(name: str, password: str) -> int:
        login = {"accessKey": name, "secretKey": password}
        return browser.post(f"{console}/login", json=login, timeout=60).status_code

    assert browser.get(f"{console}/buckets", timeout=60).status_code == 403
    assert sign_in("ada", "not-the-password") == sign_in("nobody", ada["password"]) == 401
    assert sign_in("ada", ada["password"]) == 204
    seen = browser.get(f"{console}/buckets", timeout=60).json()["buckets"]
    assert [bucket["name"] for bucket in seen] == ["shop"]
    put(s3("ada"), "hers")
    assert get(s3("ada")) == "hers"
    s3("ada").delete_object(Bucket="shop", Key="odsp-test")
    with refused("AccessDenied"):
        put(s3("ada"), "hers", bucket="stock")
    with refused("AccessDenied"):
        s3("ada").create_bucket(Bucket="another")
    assert {"ada", "grace"} <= json.loads(administer().user_list()).keys()
    with pytest.raises(minio.error.MinioAdminException, match="AccessDenied"):
        administer("ada", ada["password"]).user_list()


@pytest.mark.once
def test_nobody_writes_in_another_name(store: holes.Store) -> None:
    """The holes of the last upstream source are closed; see holes.py."""
    trial = holes.Trial(store)
    trial.run()
    assert len(trial.verdicts) >= 22
    assert [text for good, text in trial.verdicts if not good] == []


@pytest.mark.parametrize("blow", ["restart", "kill", "reboot"])
def test_objects_survive(host: Any, s3: Connect, blow: str) -> None:
    """What was stored is there after a restart, a shot process, a reboot of the host."""
    put(s3(), blow)
    scenario.strike(host, UNIT, blow)
    again(s3)
    assert get(s3()) == blow
    s3("ada").delete_object(Bucket="shop", Key="odsp-test")


def test_secrets_are_private(host: Any, inputs: dict[str, Any]) -> None:
    """No password or secret key in arguments, the journal or a file that everyone may read."""
    assert scenario.places_of(host, *passwords(inputs)) == []
    for path in ("/etc/odsp/minio.env", f"{scenario.TLS}/minio.key"):
        file = host.file(path)
        assert (file.user, file.group, file.mode) == ("root", "minio", 0o640), path
    assert host.file(DATA).mode & 0o007 == 0


@pytest.mark.once
def test_no_secret_is_an_argument_while_the_role_works(
    host: Any, inputs: dict[str, Any], s3: Connect, administer: Callable[..., Any]
) -> None:
    """Secrets pass the host's processes unseen; one that somebody changed by hand is repaired."""
    administer().user_add("ada", "changed-by-hand")
    with refused("SignatureDoesNotMatch"):
        s3("ada").list_buckets()
    with scenario.watched_arguments(host, *passwords(inputs)):
        run = scenario.converge("minio")
    assert scenario.changed(run) == 1
    s3("ada").list_buckets()


GOOD: dict[str, Any] = {
    "minio_root_password": "long-enough",
    "minio_buckets": [{"name": "one"}],
    "minio_accounts": [{"name": "one", "secret_key": "long-enough", "buckets": ["one"]}],
    "minio_users": [{"name": "ada", "password": "long-enough", "buckets": ["one"]}],
}


def account_with(**other: Any) -> dict[str, Any]:
    """Return inputs with an account that differs from a good one."""
    return {"minio_accounts": [{**GOOD["minio_accounts"][0], **other}]}


def user_with(**other: Any) -> dict[str, Any]:
    """Return inputs with a user who differs from a good one."""
    return {"minio_users": [{**GOOD["minio_users"][0], **other}]}


#: Wrong inputs, and what is said of them before the remedy.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"minio_binary": "/srv/minio"}, "minio_binary is set but minio_binary_sha256 is no SHA-256"),
    (
        {"minio_binary": "minio", "minio_binary_sha256": "0" * 64},
        "minio_binary minio is neither an absolute path nor an https URL",
    ),
    ({"minio_root_password": "short"}, "minio_root_password has fewer than 8 characters"),
    ({"minio_root_user": "me"}, "minio_root_user has fewer than 3 characters"),
    ({"minio_listen_port": 0}, "minio_listen_port is 0"),
    ({"minio_console_port": 9000}, "minio_console_port is 9000"),
    ({"minio_console_url": "door/minio"}, 'minio_console_url is "door/minio"'),
    ({"minio_memory_max": "much"}, 'minio_memory_max is "much"'),
    ({"minio_buckets": [{"name": "One"}]}, 'minio_buckets names "One", which is no bucket name'),
    (
        {"minio_buckets": [{"name": "one"}, {"name": "a..b"}]},
        'minio_buckets names "a..b", which is no bucket name',
    ),
    (
        {"minio_buckets": [{"name": "one"}, {"name": "192.0.2.1"}]},
        'minio_buckets names "192.0.2.1", which is no bucket name',
    ),
    (account_with(name="a b"), 'minio_accounts names "a b"'),
    (account_with(name="odsp"), 'minio_accounts names "odsp", as the root user is called'),
    (
        account_with(secret_key="short"),
        'minio_accounts: the secret_key of "one" has fewer than 8 characters or more than 40',
    ),
    (account_with(buckets=[]), 'minio_accounts gives "one" no bucket'),
    (account_with(buckets=["two"]), 'minio_accounts uses the bucket "two"'),
    ({"minio_accounts": GOOD["minio_accounts"] * 2}, "minio_accounts lists a name twice"),
    (user_with(name="a/b"), 'minio_users names "a/b"'),
    (user_with(name="one"), 'minio_users names "one", as an account or the root user is called'),
    (user_with(password="short"), 'minio_users: the password of "ada" has fewer than 8 characters'),
    (user_with(buckets=[]), 'minio_users gives "ada" no bucket'),
    (user_with(buckets=["two"]), 'minio_users uses the bucket "two"'),
    ({"minio_users": GOOD["minio_users"] * 2}, "minio_users lists a name twice"),
]


@pytest.mark.once
def test_every_wrong_input_has_its_sentence(tmp_path: Path) -> None:
    """What the types do not show is told before anything is touched; good inputs pass."""
    *told, nothing = scenario.sentences("minio", [*(GOOD | w for w, _ in WRONG), GOOD], tmp_path)
    assert nothing == ""
    for number, (_, fault) in enumerate(WRONG):
        sentence = rf"case-{number}: {re.escape(fault)}[^:;]*[:;] .+\."
        assert re.fullmatch(sentence, told[number]), told[number]


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (
            {"minio_buckets": [{"name": "No_Bucket"}]},
            'node-1: minio_buckets names "No_Bucket", which is no bucket name: use 3 to 63 of ',
        ),
        (
            {"minio_binary_sha256": "0" * 64},
            r"node-1: minio_binary_sha256 is 0{64} but the binary built .* has \w{64}: correct ",
        ),
    ],
    ids=["wrong name", "wrong digest"],
)
def test_bad_input_stops_the_role(host: Any, bad: dict[str, Any], sentence: str) -> None:
    """One sentence names host, variable and remedy; good inputs beside the bad wait with them."""
    before = scenario.units(host)
    run = scenario.layer("--tags", "minio", minio_memory_max="1G", **bad)
    assert run.returncode != 0
    assert re.search(sentence, " ".join(run.stdout.split())), run.stdout
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert scenario.restarted(before, scenario.units(host)) == set()


def test_fewer_then_other_ports_then_all_as_before(
    host: Any, inputs: dict[str, Any], s3: Connect
) -> None:
    """Who is left out is out, nobody else notices. Ports and size: one restart, either way."""
    put(s3("stock"), "kept", bucket="stock")
    before, address = scenario.units(host), inputs["odsp_address"]
    lists = ("minio_buckets_extra", "minio_accounts_extra", "minio_users_extra")
    gone = ("stock", "grace")
    fewer = {name: [one for one in inputs[name] if one["name"] not in gone] for name in lists}

    def console_moved() -> bool:
        """Tell whether the console, which begins after all else, has its other port."""
        return bool(host.socket(f"tcp://{address}:9101").is_listening)

    try:
        scenario.converge("minio", **fewer)
        assert scenario.restarted(before, scenario.units(host)) == set()
        for name in gone:
            with refused("InvalidAccessKeyId"):
                get(s3(name), bucket="stock")
        put(s3(), "still at work")
        assert get(s3("ada")) == "still at work"
        assert get(s3("root"), bucket="stock") == "kept"

        scenario.converge(
            "minio", **fewer,
            odsp_minio_port=9100, odsp_minio_console_port=9101, minio_memory_max="1G",
        )  # fmt: skip
        moved = scenario.units(host)
        assert scenario.restarted(before, moved) == {UNIT}
        assert get(s3(port=9100)) == "still at work"
        with refused("InvalidAccessKeyId"):
            get(s3("stock", port=9100), bucket="stock")
        with pytest.raises(EndpointConnectionError):
            get(s3())
        scenario.wait_until(console_moved)
        assert not host.socket(f"tcp://{address}:{inputs['minio_console_port']}").is_listening
        assert host.service(UNIT).systemd_properties["MemoryMax"] == str(2**30)
    finally:
        scenario.converge("minio")
    assert scenario.restarted(moved, scenario.units(host)) == {UNIT}
    assert get(s3("stock"), bucket="stock") == get(s3("grace"), bucket="stock") == "kept"
    with pytest.raises(EndpointConnectionError):
        get(s3(port=9100))
    assert host.service(UNIT).systemd_properties["MemoryMax"] == str(2**31)
    s3("stock").delete_object(Bucket="stock", Key="odsp-test")
    s3().delete_object(Bucket="shop", Key="odsp-test")


@pytest.mark.fault(
    "full disk",
    "An upload that has no room is refused by that name and leaves nothing behind; what was stored"
    " can be read, and uploads work again as soon as there is room.",
)
def test_full_disk(host: Any, s3: Connect, measured: Callable[[str], None]) -> None:
    """Objects outlive a disk without a block left, and nobody has to repair anything."""
    with faults.full_disk(host, UNIT, DATA, mib=256) as disk:
        again(s3)
        put(s3(), "before", key="before")
        disk.fill()
        with pytest.raises(ClientError) as answer:
            s3().put_object(Bucket="shop", Key="big", Body=b"x" * 2**23)
        code = answer.value.response["Error"]["Code"]
        assert code == "XMinioStorageFull"
        assert get(s3(), key="before") == "before"
        with refused("NoSuchKey"):
            get(s3(), key="big")
        disk.free()
        started = time.monotonic()

        def stored() -> bool:
            """Tell whether uploads work again."""
            with suppress(ClientError):
                put(s3(), "after", key="after")
                return True
            return False

        scenario.wait_until(stored)
        seconds = time.monotonic() - started
        assert get(s3(), key="before") + get(s3(), key="after") == "beforeafter"
    again(s3)
    measured(f"'{code}'; reads went on; the first upload {seconds:.1f} s after there was room")


@pytest.mark.fault(
    "out of memory",
    "The server is ended by its own limit and starts again by itself; what was stored is there.",
)
def test_out_of_memory(host: Any, s3: Connect, measured: Callable[[str], None]) -> None:
    """The limit costs the requests of a few seconds, no object, and nobody else on the host."""
    put(s3(), "survivor")
    before, since = scenario.main_pid(host, UNIT), float(host.check_output("date +%s.%N"))
    # The kernel is told to take the server first, as if that were what grows.
    host.check_output(f"echo 1000 > /proc/{before}/oom_score_adj")
    faults.eat_memory(host, UNIT)
    seconds = again(s3)
    assert scenario.main_pid(host, UNIT) not in (0, before)

    def killed() -> bool:
        """Tell whether systemd saw the server killed."""
        said = scenario.journal(host, UNIT, since)
        return "status=9/KILL" in said or "oom-kill" in said

    scenario.wait_until(killed)
    assert get(s3()) == "survivor"
    s3().delete_object(Bucket="shop", Key="odsp-test")
    measured(f"ended by its limit; a new process answered {seconds:.1f} s later; no object lost")


# A program in Go asks the kernel itself: its clock cannot be moved alone, but that of clients can.
@pytest.mark.fault(
    "clock jump",
    "A client whose clock is off is told so by name, and no one else notices.",
)
def test_clock_jump(s3: Connect, store: holes.Store, measured: Callable[[str], None]) -> None:
    """Twenty minutes, either way, are refused; ten are not."""
    put(s3(), "in time")
    told = {}
    for minutes in (-20, -10, 10, 20):
        request = store.signed(holes.Request("GET", "/shop/odsp-test"), age=60.0 * minutes)
        answer = store.send(request)
        code = re.search(rb"<Code>(\w+)</Code>", answer.body)
        told[minutes] = f"{answer.status} {code[1].decode()}" if code else answer.body.decode()
    skewed = "403 RequestTimeTooSkewed"
    assert told == {-20: skewed, -10: "in time", 10: "in time", 20: skewed}
    assert get(s3()) == "in time"
    s3().delete_object(Bucket="shop", Key="odsp-test")
    measured("a client's clock and what it is told: " + "; ".join(
        f"{-minutes:+d} min: {'its object' if answer == 'in time' else answer}"
        for minutes, answer in told.items()
    ))  # fmt: skip


@pytest.mark.fault(
    "expired certificate",
    "Clients refuse it by name; the next run of the playbook renews it and they are served again.",
)
def test_expired_certificate(host: Any, s3: Connect, measured: Callable[[str], None]) -> None:
    """A client says what is wrong, and one run with one restart puts it right."""
    put(s3(), "kept")
    with faults.expired_certificate(host, "minio", UNIT):
        reason = "certificate has expired"

        def expired() -> bool:
            """Tell whether the client refuses the certificate for its date."""
            with pytest.raises(BotoCoreError) as refusal:
                get(s3())
            return reason in str(refusal.value)

        scenario.wait_until(expired)
        before, started = scenario.units(host), time.monotonic()
        scenario.converge("minio")
        seconds = time.monotonic() - started
        assert scenario.restarted(before, scenario.units(host)) == {UNIT}
        assert get(s3()) == "kept"
    s3().delete_object(Bucket="shop", Key="odsp-test")
    measured(f"'{reason}'; renewed by one run of {seconds:.0f} s, one restart")
