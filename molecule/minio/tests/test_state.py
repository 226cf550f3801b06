"""The module minio_state against a real server: does it repair, remove, and leave alone?"""

from __future__ import annotations

import datetime
import io
import ipaddress
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import holes
import minio
import pytest
import requests
import scenario
import urllib3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

# A server of its own on the controller: no Debian release changes it.
pytestmark = pytest.mark.once

ROLE = Path(__file__).resolve().parents[3] / "roles/minio"
ROOT_PASSWORD = secrets.token_hex(16)
SECRET = secrets.token_hex(16)
#: What the console says to a session that the server has ended.
ENDED = "The Access Key Id you provided does not exist in our records."
#: As the door takes them: 72 bytes, and characters that a shell, JSON or a URL would mind.
PASSWORD = "p\u00e4ss w\u00f6rd \"'$\\{{x}}%&+/" + secrets.token_hex(25)[:45]
OTHER_PASSWORD = secrets.token_hex(16)


def make_certificate(folder: Path) -> Path:
    """Write a self-signed certificate as the server wants it; return the file to trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "store")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("store"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "public.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "private.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return folder / "public.crt"


@pytest.fixture(scope="module")
def ports() -> list[int]:
    """Return the ports of the server and of its console."""
    return list(holes.free_ports())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, ports: list[int]) -> Iterator[dict[str, Any]]:
    """Run a server with TLS and return the module's arguments for it."""
    folder = tmp_path_factory.mktemp("minio")
    (folder / "certs").mkdir()
    ca = make_certificate(folder / "certs")
    build = [sys.executable, str(ROLE / "files/build/build.py")]
    binary = subprocess.run(build, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    port, console_port = ports
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "MINIO_ROOT_USER": "root-of-test",
        "MINIO_ROOT_PASSWORD": ROOT_PASSWORD,
        "MINIO_UPDATE": "off",
    }
    command = [binary, "server", "--quiet", "--certs-dir", str(folder / "certs")]
    command += ["--address", f"127.0.0.1:{port}", "--console-address", f"127.0.0.1:{console_port}"]
    log = (folder / "log").open("wb")
    with (
        subprocess.Popen([*command, str(folder / "data")], env=env, stdout=log, stderr=log) as it,
        ExitStack() as at_end,
    ):
        at_end.callback(it.kill)
        pool = urllib3.PoolManager(ca_certs=str(ca), retries=False, timeout=60)
        urls = (f"127.0.0.1:{port}/minio/health/cluster", f"127.0.0.1:{console_port}/login")

        def serves() -> bool:
            """Tell whether the server takes orders, and its console guests."""
            with suppress(urllib3.exceptions.HTTPError):
                return all(pool.request("GET", f"https://{url}").status == 200 for url in urls)
            return False

        # Dry runs, one of which comes first, do not wait for a server.
        scenario.wait_until(serves)
        yield {
            "address": "127.0.0.1",
            "port": port,
            "server_name": "store",
            "ca": str(ca),
            "root_user": "root-of-test",
            "root_password": ROOT_PASSWORD,
            "buckets": ["one", "two"],
            "accounts": [
                {"name": "one", "secret_key": SECRET, "buckets": ["one"]},
                {"name": "two", "secret_key": SECRET[::-1], "buckets": ["two"]},
            ],
            "users": [
                {"name": "ada", "password": PASSWORD, "buckets": ["one"]},
                {
                    "name": "bob.with_a-name-of-32-characters",
                    "password": SECRET,
                    "buckets": ["one"],
                },
            ],
        }
    log.close()


def run(arguments: dict[str, Any], *, check_mode: bool = False) -> dict[str, Any]:
    """Run the module as Ansible does and return its answer."""
    given = {"ANSIBLE_MODULE_ARGS": arguments | {"_ansible_check_mode": check_mode}}
    done = subprocess.run(
        [sys.executable, str(ROLE / "library/minio_state.py")],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    said = done.stdout + done.stderr
    for secret in (ROOT_PASSWORD, SECRET, SECRET[::-1], PASSWORD, OTHER_PASSWORD):
        assert secret not in said and json.dumps(secret)[1:-1] not in said
    return dict(json.loads(done.stdout.splitlines()[-1]))


def settle(server: dict[str, Any]) -> None:
    """Bring the server to the state that every test begins with."""
    assert "failed" not in run(server)


def admin(server: dict[str, Any], name: str = "", password: str = ROOT_PASSWORD) -> Any:
    """Return a client of the administration, to change things by hand; root's if nobody's."""
    return minio.MinioAdmin(
        endpoint=f"127.0.0.1:{server['port']}",
        credentials=minio.credentials.StaticProvider(name or server["root_user"], password),
        http_client=urllib3.PoolManager(ca_certs=server["ca"]),
    )


def client_of(server: dict[str, Any], name: str, password: str) -> Any:
    """Return an S3 client."""
    return minio.Minio(
        f"127.0.0.1:{server['port']}",
        access_key=name,
        secret_key=password,
        region="us-east-1",
        http_client=urllib3.PoolManager(ca_certs=server["ca"]),
    )


class Console:
    """A browser at the console."""

    def __init__(self, server: dict[str, Any], ports: list[int]) -> None:
        self.url = f"https://127.0.0.1:{ports[1]}/api/v1"
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.verify = server["ca"]

    def sign_in(self, name: str, password: str) -> int:
        """Sign in; return the status."""
        login = {"accessKey": name, "secretKey": password}
        return self.session.post(f"{self.url}/login", json=login, timeout=30).status_code

    def lists(self, bucket: str) -> str:
        """Look into a bucket; return why that is refused, or nothing."""
        answer = self.session.get(f"{self.url}/buckets/{bucket}/objects", timeout=30)
        return "" if answer.status_code == 200 else str(answer.json()["detailedMessage"])


def test_dry_run_first_run_second_run(server: dict[str, Any]) -> None:
    """A dry run tells and does nothing, the first run does it, the second has nothing to do."""
    told = run(server, check_mode=True)["actions"]
    assert len(told) == 6
    assert run(server)["actions"] == told
    assert run(server)["changed"] is False
    assert run(server, check_mode=True)["changed"] is False


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("secret", {"secret_key": "another-secret"}),
        ("status", {"status": "off"}),
        (
            "policy",
            {
                "policy": {
                    "Version": "2012-10-17",
                    "Statement": [
                        {"Effect": "Allow", "Action": ["s3:*"], "Resource": ["arn:aws:s3:::*"]}
                    ],
                }
            },
        ),
    ],
)
def test_repairs_what_was_changed_by_hand(
    server: dict[str, Any], fault: str, change: dict[str, Any]
) -> None:
    """A secret, a state or a policy that drifted is found and put right."""
    settle(server)
    client = admin(server)
    # The server takes an update without a policy for one that removes the policy.
    policy = json.loads(json.loads(client.get_service_account("one"))["policy"])
    client.update_service_account(access_key="one", **({"policy": policy} | change))
    assert run(server)["actions"] == [f"write account one ({fault})"]
    assert run(server)["changed"] is False


def test_removes_its_own_accounts_and_no_others(server: dict[str, Any]) -> None:
    """An account that is no longer listed goes; one made by somebody else stays."""
    settle(server)
    client = admin(server)
    client.add_service_account(access_key="by-hand", secret_key="made-by-hand", name="mine")
    fewer = server | {"accounts": server["accounts"][:1]}
    assert run(fewer)["actions"] == ["remove account two"]
    assert "by-hand" in client.list_service_account(server["root_user"])
    taken = {"name": "by-hand", "secret_key": "some-secret", "buckets": ["one"]}
    refused = run(server | {"accounts": [taken]})
    assert refused["failed"] and "did not make" in refused["msg"]
    client.delete_service_account("by-hand")


def test_user_signs_in_and_has_no_more_than_the_buckets(
    server: dict[str, Any], ports: list[int]
) -> None:
    """The console admits a user; whom it admitted has none of the root key's rights."""
    settle(server)
    console = Console(server, ports)
    assert console.sign_in("ada", "not-the-password") == 401
    assert console.sign_in("one", SECRET) == 401, "a service account is no user"
    assert console.sign_in("ada", PASSWORD) == 204
    assert (console.lists("one"), console.lists("two")) == ("", "Access Denied.")
    made = console.session.post(f"{console.url}/buckets", json={"name": "three"}, timeout=30)
    assert made.status_code == 403

    client = client_of(server, "ada", PASSWORD)
    client.put_object("one", "note", io.BytesIO(b"kept"), 4)
    assert client.get_object("one", "note").data == b"kept"
    client.remove_object("one", "note")
    assert [bucket.name for bucket in client.list_buckets()] == ["one"]
    own = admin(server, "ada", PASSWORD)
    forbidden: list[Callable[[], Any]] = [
        lambda: list(client.list_objects("two")),
        lambda: client.make_bucket("three"),
        lambda: client.set_bucket_policy("one", "{}"),
        own.user_list,
        own.info,
        own.policy_list,
        lambda: own.policy_set("readwrite", user="ada"),
        lambda: own.user_add("ada", "a-password-of-the-own"),
        lambda: own.user_add("eve", "made-by-ada"),
        lambda: own.add_service_account(access_key="eve", secret_key="made-by-ada"),
    ]
    for attempt in forbidden:
        with pytest.raises(
            (minio.error.S3Error, minio.error.MinioAdminException), match="AccessDenied"
        ):
            attempt()


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("password", lambda client: client.user_add("ada", "changed-by-hand")),
        ("status", lambda client: client.user_disable("ada")),
        ("rights", lambda client: client.policy_set("readwrite", user="ada")),
        ("rights", lambda client: client.detach_policy(["odsp-user-ada"], user="ada")),
        ("rights", lambda client: client.group_add("mighty", ["ada"])),
        (
            "policy",
            lambda client: client.policy_add(
                "odsp-user-ada",
                policy={
                    "Version": "2012-10-17",
                    "Statement": [
                        {"Effect": "Allow", "Action": ["s3:*"], "Resource": ["arn:aws:s3:::*"]}
                    ],
                },
            ),
        ),
    ],
)
def test_repairs_users(server: dict[str, Any], fault: str, change: Callable[[Any], object]) -> None:
    """What was changed by hand about a user is found and put right."""
    settle(server)
    change(admin(server))
    assert run(server)["actions"] == [f"write user ada ({fault})"]
    assert run(server)["changed"] is False
    found = json.loads(admin(server).user_list())["ada"]
    assert found["policyName"] == "odsp-user-ada"
    assert not found.get("memberOf")


def test_new_password_ends_the_sessions_of_the_old(
    server: dict[str, Any], ports: list[int]
) -> None:
    """Who knew the former password is out, also where that opened something before."""
    settle(server)
    before, after = Console(server, ports), Console(server, ports)
    assert before.sign_in("ada", PASSWORD) == 204
    assert before.lists("one") == ""
    ada, other = server["users"]
    changed = server | {"users": [ada | {"password": OTHER_PASSWORD}, other]}
    assert run(changed)["actions"] == ["write user ada (password)"]
    assert run(changed)["changed"] is False
    assert before.lists("one") == ENDED
    assert before.sign_in("ada", PASSWORD) == 401
    assert after.sign_in("ada", OTHER_PASSWORD) == 204
    assert after.lists("one") == ""
    wider = server | {"users": [changed["users"][0] | {"buckets": ["one", "two"]}, other]}
    assert run(wider)["actions"] == ["write user ada (policy)"]
    assert after.lists("two") == "", "another bucket is no reason to sign in again"
    # Both at once: the password is proven again after the policy was written.
    settle(server)
    assert after.lists("one") == ENDED
    assert before.sign_in("ada", PASSWORD) == 204
    assert run(server)["changed"] is False


def test_removes_its_own_users_and_no_others(server: dict[str, Any], ports: list[int]) -> None:
    """Who is no longer listed is out at once; whom somebody else made stays."""
    settle(server)
    console = Console(server, ports)
    assert console.sign_in("ada", PASSWORD) == 204
    client = admin(server)
    client.user_add("by-hand", "made-by-hand")
    fewer = server | {"users": server["users"][1:]}
    assert run(fewer, check_mode=True)["actions"] == ["remove user ada"]
    assert run(fewer)["actions"] == ["remove user ada"]
    assert run(fewer)["changed"] is False
    assert "by-hand" in json.loads(client.user_list())
    assert "odsp-user-ada" not in client.policy_list()
    assert console.lists("one") == ENDED
    assert console.sign_in("ada", PASSWORD) == 401
    taken = {"name": "by-hand", "password": "some-password", "buckets": ["one"]}
    refused = run(server | {"users": [taken]})
    assert refused["failed"] and "did not make" in refused["msg"]
    client.user_remove("by-hand")
    client.add_service_account(access_key="by-hand", secret_key="made-by-hand", name="mine")
    refused = run(server | {"users": [taken]})
    assert refused["failed"] and "did not make" in refused["msg"]
    client.delete_service_account("by-hand")


def test_a_name_may_move_from_the_accounts_to_the_users(server: dict[str, Any]) -> None:
    """A name is free for a person once no program bears it, and the other way round."""
    settle(server)
    moved = {
        "accounts": server["accounts"][1:],
        "users": [{"name": "one", "password": PASSWORD, "buckets": ["one"]}],
    }
    told = run(server | moved, check_mode=True)["actions"]
    assert "write user one (missing)" in told
    assert run(server | moved)["actions"] == told
    assert run(server | moved)["changed"] is False
    told = run(server, check_mode=True)["actions"]
    assert "write account one (missing)" in told
    assert run(server)["actions"] == told
    assert run(server)["changed"] is False


def test_wrong_root_password_and_wrong_server_are_told(server: dict[str, Any]) -> None:
    """What cannot be done is said in a sentence, and never taken for done."""
    refused = run(server | {"root_password": "not-the-password"})
    assert refused["failed"] and "refuses the root user" in refused["msg"]
    refused = run(server | {"server_name": "somebody-else", "timeout": 1})
    assert refused["failed"] and "somebody-else" in refused["msg"]
