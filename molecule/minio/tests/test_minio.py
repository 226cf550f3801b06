"""What an operator asks of the object store: does it answer, refuse, survive, keep its secrets?"""

from __future__ import annotations

import base64
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import boto3
import faults
import holes
import pytest
import scenario
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    EndpointConnectionError,
    SSLError,
)

UNIT = "odsp-minio.service"
CA = "/etc/odsp/tls/ca.crt"
DATA = "/var/lib/odsp/minio"
FOLDER = "/tmp/odsp-minio-test"


@pytest.fixture(scope="module")
def inputs(host: Any) -> dict[str, Any]:
    """Return the role's inputs for this host."""
    variables = host.ansible.get_variables()
    assert len(variables["minio_accounts"]) > 1, "the tests need two accounts with own buckets"
    return dict(variables)


def python(host: Any, code: str, **values: Any) -> Any:
    """Run Python on the host, with the module holes at hand; return what it prints as JSON."""
    source = (Path(__file__).parent / "holes.py").read_bytes()
    for name, text in (("holes.py", source), ("values.json", json.dumps(values).encode())):
        encoded = base64.b64encode(text).decode()
        host.check_output(
            f"umask 077; mkdir -p {FOLDER}; echo {encoded} | base64 -d > {FOLDER}/{name}"
        )
    prelude = f"import json, holes\nv = json.load(open('{FOLDER}/values.json'))\n"
    encoded = base64.b64encode((prelude + code).encode()).decode()
    run = f"echo {encoded} | base64 -d | PYTHONPATH={FOLDER} python3 -; code=$?"
    answer = host.run(f"{run}; rm -rf {FOLDER}; exit $code")
    assert answer.rc == 0, answer.stdout + answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


def account(host: Any, inputs: dict[str, Any], number: int = 0) -> dict[str, Any]:
    """Return the arguments of a Store for one of the accounts."""
    one = inputs["minio_accounts"][number]
    name = host.check_output("hostname")
    return {
        "url": f"https://{name}:{inputs.get('minio_listen_port', 9000)}",
        "access_key": one["name"],
        "secret_key": one["secret_key"],
        "bucket": one["buckets"][0],
        "ca": CA,
    }


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

    def client(name: str = "shop", *, secret: str = "", port: int = 0, **options: Any) -> Any:
        config = Config(
            connect_timeout=5,
            read_timeout=20,
            retries={"total_max_attempts": 1},
            s3={"addressing_style": "path"},
        )
        url = f"https://{inputs['odsp_address']}:{port or inputs['minio_listen_port']}"
        connection = {"endpoint_url": url, "verify": authority, "region_name": "us-east-1"}
        return boto3.session.Session().client(
            "s3",
            aws_access_key_id=inputs.get("minio_root_user", "odsp") if name == "root" else name,
            aws_secret_access_key=secret or secrets[name],
            config=config,
            **connection | options,
        )

    return client


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


def change(**inputs: Any) -> None:
    """Run the role with other inputs, or with those of the scenario again."""
    run = scenario.site("--tags", "minio", "--extra-vars", json.dumps(inputs))
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


def test_unit_is_enabled_running_and_confined(host: Any) -> None:
    """The server runs, and cannot touch the rest of the host."""
    scenario.assert_confined(host, UNIT, "minio", exposure=1.6)


def test_refuses(s3: Connect, inputs: dict[str, Any]) -> None:
    """A wrong secret, a stranger, no credential, plain HTTP and another authority get nothing."""
    with refused("SignatureDoesNotMatch"):
        put(s3(secret="not-the-secret"), "x")
    with refused("InvalidAccessKeyId"):
        put(s3("nobody", secret="not-the-secret"), "x")
    with refused("AccessDenied"):
        put(s3(), "x", bucket="stock")
    with refused("AccessDenied"):
        s3().create_bucket(Bucket="another")
    plain = f"http://{inputs['odsp_address']}:{inputs['minio_listen_port']}"
    with pytest.raises((BotoCoreError, ClientError), match=r"400|closed"):
        put(s3(endpoint_url=plain), "x")
    with pytest.raises(SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        put(s3(verify="/etc/ssl/certs/ca-certificates.crt"), "x")


def test_listens_only_where_it_should(host: Any, inputs: dict[str, Any]) -> None:
    """The console has one address; of the S3 interface the server adds the loopback by itself."""
    s3_port, console_port = inputs["minio_listen_port"], inputs["minio_console_port"]
    sockets = host.check_output("ss --listening --tcp --numeric --no-header | awk '{ print $4 }'")
    ours = [name for name in sockets.split() if name.endswith((f":{s3_port}", f":{console_port}"))]
    told = {f"{inputs['odsp_address']}:{port}" for port in (s3_port, console_port)}
    assert told <= {*ours} <= told | {f"127.0.0.1:{s3_port}", f"[::1]:{s3_port}"}


def test_answers_by_tls_only(host: Any, inputs: dict[str, Any]) -> None:
    """It proves who it is; without the platform's authority, or by plain HTTP, nobody gets in."""
    code = """
import ssl, urllib.request
def ask(url, cafile):
    try:
        context = ssl.create_default_context(cafile=cafile)
        return urllib.request.urlopen(url, context=context, timeout=10).status
    except urllib.error.HTTPError as refused:
        return refused.code
    except OSError as refused:
        return str(refused)
url = v['url'] + '/minio/health/ready'
print(json.dumps([ask(url, v['ca']), ask(url, None), ask(url.replace('https', 'http'), v['ca'])]))
"""
    trusted, untrusted, plain = python(host, code, **account(host, inputs))
    assert trusted == 200
    assert "CERTIFICATE_VERIFY_FAILED" in str(untrusted)
    assert plain != 200


def test_account_reads_and_writes_its_bucket_and_no_other(
    host: Any, inputs: dict[str, Any]
) -> None:
    """Every account is confined to its own buckets."""
    code = """
own, other = holes.Store(**v['own']), v['other']
def ask(method, path, body=b''):
    return own.send(own.signed(holes.Request(method, path, body=body))).status
mine, theirs = f"/{own.bucket}/odsp-test", f"/{other['bucket']}/odsp-test"
print(json.dumps([ask('PUT', mine, b'x'), ask('GET', mine), ask('DELETE', mine),
                  ask('PUT', theirs, b'x'), ask('GET', theirs), ask('GET', '/' + other['bucket']),
                  ask('PUT', '/odsp-test-new-bucket')]))
"""
    answers = python(host, code, own=account(host, inputs, 0), other=account(host, inputs, 1))
    assert answers == [200, 200, 204, 403, 403, 403, 403]


def test_user_signs_in_to_the_console_and_administers_nothing(
    host: Any, inputs: dict[str, Any]
) -> None:
    """A person enters with the own password only, and finds the own buckets and nothing else."""
    code = """
import ssl, urllib.request
context = ssl.create_default_context(cafile=v['ca'])
def ask(path, body=None, cookie=''):
    headers = {'Content-Type': 'application/json', 'Cookie': cookie}
    data = body and json.dumps(body).encode()
    request = urllib.request.Request(v['console'] + path, data, headers)
    try:
        answer = urllib.request.urlopen(request, context=context, timeout=20)
    except urllib.error.HTTPError as refused:
        answer = refused
    return answer, answer.status
def login(name, password):
    answer, status = ask('/api/v1/login', {'accessKey': name, 'secretKey': password})
    return (answer.headers['Set-Cookie'] or '').split(';')[0], status
cookie, right = login(v['name'], v['password'])
buckets = json.load(ask('/api/v1/buckets', cookie=cookie)[0])['buckets']
def s3(user, method, path, body=b''):
    store = holes.Store(v['url'], *user, '', v['ca'])
    return store.send(store.signed(holes.Request(method, path, body=body))).status
me, root = (v['name'], v['password']), v['root']
own, other, users = f"/{v['own']}/odsp-test", f"/{v['other']}", '/minio/admin/v3/list-users'
print(json.dumps({
    'logins': [right, login(v['name'], 'not-the-password')[1], login('nobody', v['password'])[1]],
    'buckets': [bucket['name'] for bucket in buckets],
    'own': [s3(me, 'PUT', own, b'x'), s3(me, 'GET', own), s3(me, 'DELETE', own)],
    'others': [s3(me, 'GET', other), s3(me, 'PUT', other + '/x', b'x'),
               s3(me, 'PUT', '/odsp-test-bucket')],
    'root lists the users': s3(root, 'GET', users),
    'the user does': s3(me, 'GET', users),
}))
"""
    name = host.check_output("hostname")
    user = inputs["minio_users"][0]
    (own,) = user["buckets"]
    others = [one["name"] for one in inputs["minio_buckets"] if one["name"] != own]
    answers = python(
        host,
        code,
        ca=CA,
        url=f"https://{name}:{inputs.get('minio_listen_port', 9000)}",
        console=f"https://{name}:{inputs.get('minio_console_port', 9001)}",
        root=[inputs.get("minio_root_user", "odsp"), inputs["minio_root_password"]],
        name=user["name"],
        password=user["password"],
        own=own,
        other=others[0],
    )
    assert answers == {
        "logins": [204, 401, 401],
        "buckets": [own],
        "own": [200, 200, 204],
        "others": [403, 403, 403],
        "root lists the users": 200,
        "the user does": 403,
    }


def test_nobody_writes_in_another_name(host: Any, inputs: dict[str, Any]) -> None:
    """The holes of the last upstream source are closed; see holes.py."""
    code = """
trial = holes.Trial(holes.Store(**v))
trial.run()
print(json.dumps(trial.verdicts))
"""
    verdicts = python(host, code, **account(host, inputs))
    assert len(verdicts) >= 22
    assert [text for good, text in verdicts if not good] == []


@pytest.mark.parametrize("blow", ["restart", "kill", "reboot"])
def test_objects_survive(host: Any, s3: Connect, blow: str) -> None:
    """What was stored is there after a restart, a shot process, a reboot of the host."""
    put(s3(), blow)
    if blow == "restart":
        host.check_output(f"systemctl restart {UNIT}")
    elif blow == "kill":
        scenario.kill(host, UNIT)
    else:
        scenario.reboot(host)
    again(s3)
    assert get(s3()) == blow
    s3("ada").delete_object(Bucket="shop", Key="odsp-test")


def test_secrets_are_private(host: Any, inputs: dict[str, Any]) -> None:
    """No password or secret key in arguments, the journal or a file that everyone may read."""
    secrets = [one["secret_key"] for one in inputs["minio_accounts"]]
    secrets += [one["password"] for one in inputs["minio_users"]]
    for secret in (*secrets, inputs["minio_root_password"]):
        assert scenario.places_of(host, secret) == []
    for path in ("/etc/odsp/minio.env", "/etc/odsp/tls/minio.key"):
        file = host.file(path)
        assert (file.user, file.group, file.mode) == ("root", "minio", 0o640), path
    assert host.file(DATA).mode & 0o007 == 0


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


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (
            {"minio_binary": "/srv/minio"},
            "minio_binary is set but minio_binary_sha256 is no SHA-256",
        ),
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
        ({"minio_buckets": [{"name": "One"}]}, 'minio_buckets names "One"'),
        ({"minio_buckets": [{"name": "one"}, {"name": "a..b"}]}, 'minio_buckets names "a..b"'),
        ({"minio_buckets": [{"name": "one"}, {"name": "192.0.2.1"}]}, 'names "192.0.2.1"'),
        (account_with(name="a b"), 'minio_accounts names "a b"'),
        (account_with(name="odsp"), 'minio_accounts names "odsp", as the root user is called'),
        (account_with(secret_key="short"), 'the secret_key of "one" must have 8 to 40'),
        (account_with(buckets=[]), 'minio_accounts gives "one" no bucket'),
        (account_with(buckets=["two"]), 'minio_accounts uses the bucket "two"'),
        ({"minio_accounts": GOOD["minio_accounts"] * 2}, "minio_accounts lists a name twice"),
        (user_with(name="a/b"), 'minio_users names "a/b"'),
        (user_with(name="one"), 'minio_users names "one", as an account or the root user'),
        (user_with(password="short"), 'the password of "ada" has fewer than 8'),
        (user_with(buckets=[]), 'minio_users gives "ada" no bucket'),
        (user_with(buckets=["two"]), 'minio_users uses the bucket "two"'),
        ({"minio_users": GOOD["minio_users"] * 2}, "minio_users lists a name twice"),
        ({}, ""),
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
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Show all wrong inputs to the role in one run of Ansible; return its sentences."""
    (mark,) = test_every_wrong_input_has_its_sentence.pytestmark
    cases = [json.dumps(wrong) for wrong, _ in mark.args[1]]
    folder = tmp_path_factory.mktemp("refusals")
    role = {"name": "minio", "tasks_from": "validate.yml"}
    message = "{{ ansible_failed_result.msg }}"
    tasks = [
        {
            "block": [{"ansible.builtin.include_role": role, "vars": GOOD | json.loads(case)}],
            "rescue": [{"ansible.builtin.set_fact": {f"told_{number}": message}}],
        }
        for number, case in enumerate(cases)
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


def test_bad_input_stops_the_role(host: Any, s3: Connect) -> None:
    """A server program with a wrong digest, or a wrong name, changes nothing on the host."""
    before = scenario.units(host)
    wrong = {"minio_buckets_extra": [{"name": "shop"}, {"name": "stock"}, {"name": "No_Bucket"}]}
    run = scenario.site("--tags", "minio", "--extra-vars", json.dumps(wrong))
    assert run.returncode != 0
    assert 'node-1: minio_buckets names "No_Bucket"' in " ".join(run.stdout.split())
    assert scenario.recap(run)["node-1"]["changed"] == 0
    assert scenario.restarted(before, scenario.units(host)) == set()
    assert again(s3) < 30


def test_fewer_lose_their_access_and_nothing_else(
    host: Any, inputs: dict[str, Any], s3: Connect
) -> None:
    """Account and user are out, the bucket is there with what it holds, nobody else notices."""
    put(s3("stock"), "kept", bucket="stock")
    before = scenario.units(host)
    lists = ("minio_buckets_extra", "minio_accounts_extra", "minio_users_extra")
    gone = ("stock", "grace")
    try:
        change(**{name: [one for one in inputs[name] if one["name"] not in gone] for name in lists})
        assert scenario.restarted(before, scenario.units(host)) == set()
        for name in gone:
            with refused("InvalidAccessKeyId"):
                get(s3(name), bucket="stock")
        put(s3(), "still at work")
        assert get(s3("ada")) == "still at work"
        assert get(s3("root"), bucket="stock") == "kept"
    finally:
        change()
    assert get(s3("stock"), bucket="stock") == get(s3("grace"), bucket="stock") == "kept"
    s3("stock").delete_object(Bucket="stock", Key="odsp-test")


def test_other_ports_and_size_restart_the_server(
    host: Any, inputs: dict[str, Any], s3: Connect
) -> None:
    """The new values are in force for the next client, the old ports are closed."""
    put(s3(), "moved")
    before = scenario.units(host)
    try:
        change(odsp_minio_port=9100, odsp_minio_console_port=9101, minio_memory_max="1G")
        assert scenario.restarted(before, scenario.units(host)) == {UNIT}
        assert get(s3(port=9100)) == "moved"
        with pytest.raises(EndpointConnectionError):
            get(s3())
        address = inputs["odsp_address"]
        assert host.socket(f"tcp://{address}:9101").is_listening
        assert not host.socket(f"tcp://{address}:{inputs['minio_console_port']}").is_listening
        assert host.service(UNIT).systemd_properties["MemoryMax"] == str(2**30)
    finally:
        change()
    assert get(s3()) == "moved"


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
    before = scenario.main_pid(host, UNIT)
    # The kernel is told to take the server first, as if that were what grows.
    host.check_output(f"echo 1000 > /proc/{before}/oom_score_adj")
    faults.eat_memory(host, UNIT)
    seconds = again(s3)
    assert scenario.main_pid(host, UNIT) not in (0, before)
    assert get(s3()) == "survivor"
    measured(f"ended by its limit; a new process answered {seconds:.1f} s later; no object lost")


@pytest.mark.fault(
    "clock jump",
    "A client whose clock is off is told so by name, and no one else notices.",
)
def test_clock_jump(
    inputs: dict[str, Any], s3: Connect, authority: str, measured: Callable[[str], None]
) -> None:
    """Twenty minutes, either way, are refused; ten are not."""
    one = inputs["minio_accounts"][0]
    url = f"https://{inputs['odsp_address']}:{inputs['minio_listen_port']}"
    store = holes.Store(url, one["name"], one["secret_key"], "shop", authority)
    put(s3(), "in time")
    seen = {}
    for minutes in (-20, -10, 10, 20):
        request = store.signed(holes.Request("GET", "/shop/odsp-test"), age=60.0 * minutes)
        answer = store.send(request)
        seen[minutes] = answer.status
        if abs(minutes) == 20:
            assert b"<Code>RequestTimeTooSkewed</Code>" in answer.body, answer.body
    assert seen == {-20: 403, -10: 200, 10: 200, 20: 403}
    assert get(s3()) == "in time"
    measured("a client 20 minutes fast or slow: 403 RequestTimeTooSkewed; 10 minutes: served")


@pytest.mark.fault(
    "expired certificate",
    "Clients refuse it by name; the next run of the playbook renews it and they are served again.",
)
def test_expired_certificate(host: Any, s3: Connect, measured: Callable[[str], None]) -> None:
    """A client says what is wrong, and one run puts it right."""
    put(s3(), "kept")
    with faults.expired_certificate(host, "minio", UNIT):

        def expired() -> bool:
            """Tell whether the client refuses the certificate for its date."""
            with pytest.raises(BotoCoreError) as refusal:
                get(s3())
            return "certificate has expired" in str(refusal.value)

        scenario.wait_until(expired)
        started = time.monotonic()
        change()
        seconds = time.monotonic() - started
        assert get(s3()) == "kept"
    measured(f"'certificate has expired'; renewed by one run of {seconds:.0f} s")
