"""What an operator asks of the object store: does it answer, refuse, survive, keep its secrets?"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

UNIT = "odsp-minio.service"
CA = "/etc/odsp/tls/ca.crt"
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


def test_unit_is_enabled_running_and_confined(host: Any) -> None:
    """The server runs, survives a reboot, and cannot touch the rest of the host."""
    unit = host.service(UNIT)
    assert unit.is_enabled and unit.is_running, host.run(f"journalctl -u {UNIT} -n 50").stdout
    properties = unit.systemd_properties
    assert properties["User"] == "minio"
    assert properties["ProtectSystem"] == "strict"
    assert properties["NoNewPrivileges"] == "yes"
    assert int(properties["MemoryMax"]) < 2**40


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


def test_objects_survive_a_restart(host: Any, inputs: dict[str, Any]) -> None:
    """What was stored is there after the server was restarted."""
    code = """
store = holes.Store(**v)
path = f"/{store.bucket}/odsp-test-restart"
answer = store.send(store.signed(holes.Request(v2[0], path, body=v2[1].encode())))
print(json.dumps([answer.status, answer.body.decode()]))
"""

    def ask(method: str, body: str = "") -> Any:
        return python(host, f"v2 = {[method, body]!r}\n" + code, **account(host, inputs))

    assert ask("PUT", "still here")[0] == 200
    host.check_output(f"systemctl restart {UNIT}")
    assert ask("GET") == [200, "still here"]
    assert ask("DELETE")[0] == 204


def test_secrets_are_private(host: Any, inputs: dict[str, Any]) -> None:
    """Root password and certificate key are for the service alone, on disk and in sight."""
    for path in ("/etc/odsp/minio.env", "/etc/odsp/tls/minio.key"):
        file = host.file(path)
        assert (file.user, file.group, file.mode) == ("root", "minio", 0o640), path
    secrets = [one["secret_key"] for one in inputs["minio_accounts"]]
    secrets += [one["password"] for one in inputs["minio_users"]]
    secrets.append(inputs["minio_root_password"])
    seen = host.check_output("ps -eo args") + host.check_output(f"journalctl -u {UNIT}")
    seen += host.check_output(f"systemctl show {UNIT}")
    assert not any(secret in seen for secret in secrets)
